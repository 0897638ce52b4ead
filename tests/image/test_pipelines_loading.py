"""What a model folder may bring: safetensors of known families, and nothing else; each refusal is one clear line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limbeck.core.run.errors import BadInput
from limbeck.domains.image import pipelines

Folder = Callable[[str], Path]


@pytest.fixture
def copy(pipeline_folder: Folder, tmp_path: Path) -> Path:
    """A Stable Diffusion folder to spoil."""
    return Path(shutil.copytree(pipeline_folder("sd15"), tmp_path / "model"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refusal(folder: Path | str, **options: Any) -> str:
    with pytest.raises(BadInput) as caught:
        pipelines.load_pipeline(str(folder), **options)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    return text


def test_unknown_family_lists_the_known(copy: Path) -> None:
    edit(copy / "model_index.json", _class_name="StableDifusionPipeline")
    text = refusal(copy)
    assert 'did you mean "StableDiffusionPipeline"' in text and "FluxPipeline" in text and "PixArtAlphaPipeline" in text


def test_pipeline_code_is_refused(copy: Path) -> None:
    canary = copy / "canary"
    (copy / "pipeline.py").write_text(f"open({str(canary)!r}, 'w')")
    edit(copy / "model_index.json", _class_name=["pipeline", "Mine"])
    assert "never run" in refusal(copy) and not canary.exists()


def test_component_code_is_refused(copy: Path) -> None:
    canary = copy / "canary"
    (copy / "unet" / "mine.py").write_text(f"open({str(canary)!r}, 'w')")
    edit(copy / "model_index.json", unet=["mine", "UNet"])
    assert "unet" in refusal(copy) and not canary.exists()


@pytest.mark.parametrize("part", ("unet", "vae", "text_encoder"))
def test_pickled_weights_are_refused(copy: Path, part: str) -> None:
    for file in (copy / part).glob("*.safetensors"):
        file.rename(file.with_name("pytorch_model.bin"))
    assert part in (text := refusal(copy)) and "pickle" in text


def test_schedulers_that_change_samples_are_refused(copy: Path) -> None:
    for key in ("thresholding", "rescale_betas_zero_snr"):
        edit(
            copy / "scheduler" / "scheduler_config.json",
            **{"thresholding": False, "rescale_betas_zero_snr": False, key: True},
        )
        assert key in refusal(copy)
    edit(copy / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=False, beta_schedule="squaredcos_cap_v2")
    assert "squaredcos_cap_v2" in refusal(copy)


def test_wrong_paths_say_what_to_give(copy: Path, tmp_path: Path) -> None:
    assert "there is no folder" in refusal(tmp_path / "nothing")
    assert "model_index.json" in refusal(tmp_path)
    assert "single file" in refusal(copy / "model_index.json")
    (copy / "model_index.json").write_text("{")
    assert "JSON" in refusal(copy)


def test_size_must_fill_tokens(copy: Path) -> None:
    assert "multiple of 4" in refusal(copy, size=18)


def test_a_missing_component_is_one_line(copy: Path) -> None:
    shutil.rmtree(copy / "vae")
    refusal(copy)
