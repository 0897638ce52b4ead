"""Multi-view teachers: what the views know of one another, cameras, MVDream's names and numbers, a run that resumes."""

import json
import math
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck.core.run.build import Build
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput
from limbeck.core.run.recipe import Recipe, load
from limbeck.core.run.rng import Draws
from limbeck.domains.threed import law, multiview
from limbeck.domains.threed.cameras import Cameras, ring
from limbeck.domains.threed.config import Law

torch.set_num_threads(1)
KNOWN = json.loads((Path(__file__).parent / "mvdream.json").read_text())


def unet(**more: Any) -> Any:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=16,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        **more,
    )


def weight(key: str, shape: list[int]) -> Tensor:
    """Numbers without a generator; the key says where they begin."""
    count = math.prod(shape)
    place = torch.arange(count, dtype=torch.float64) + zlib.crc32(key.encode()) % 1000
    wide = 4 if len(shape) == 1 else count / shape[0]
    hashed = (torch.sin(place * 12.9898) * 43758.5453) % 1 - 0.5
    found = (hashed * (12 * 1.7 / wide) ** 0.5).float().reshape(shape)
    return found + 1 if len(shape) == 1 and key.endswith("weight") else found


def mvdream() -> dict[str, Tensor]:
    """Weights under the names of MVDream's checkpoints."""
    return {key: weight(key, shape) for key, shape in KNOWN["shapes"].items()}


def question() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Two groups of four views, each at a time of its own."""
    x = torch.sin(torch.arange(8 * 4 * 64, dtype=torch.float64) * 0.37).float().view(8, 4, 8, 8)
    states = torch.cos(torch.arange(8 * 5 * 16, dtype=torch.float64) * 0.53).float().view(8, 5, 16)
    cond = {"states": states, "camera": ring(4, 8, elevation=15).rows().repeat(2, 1)}
    return x, torch.tensor([100.0] * 4 + [700.0] * 4), cond


@torch.no_grad()
def answer(net: Any, rows: Tensor | None = None, change: Tensor | float = 0.0) -> Tensor:
    x, t, cond = question()
    index = torch.arange(8) if rows is None else rows
    return multiview.call(net, (x + change)[index], t[index], {key: value[index] for key, value in cond.items()})


@pytest.fixture(scope="module")
def net() -> Any:
    made = multiview.with_cameras(unet(), mvdream())
    multiview.join(made, 4)
    return made


def test_mvdream_under_its_own_names_gives_its_own_numbers(net: Any) -> None:
    """The numbers are those of the authors' architecture (file mvdream.json), computed once."""
    torch.testing.assert_close(answer(net).flatten()[::97], torch.tensor(KNOWN["answer"]), rtol=0, atol=1e-4)


def test_views_see_their_own_group_and_no_other(net: Any) -> None:
    plain = answer(net)
    for row in (0, 6):
        moved = torch.zeros(8, 1, 1, 1)
        moved[row] = 0.5
        changed = (answer(net, change=moved) - plain).flatten(1).abs().amax(1) > 1e-4
        assert changed.tolist() == [i // 4 == row // 4 for i in range(8)]


def test_views_in_another_order_are_answered_in_that_order(net: Any) -> None:
    order = torch.tensor([2, 0, 3, 1, 4, 7, 6, 5])
    torch.testing.assert_close(answer(net, order), answer(net)[order], rtol=1e-3, atol=1e-3)


def test_one_view_at_a_time_is_the_plain_net(net: Any) -> None:
    alone, apart = (multiview.with_cameras(unet(), mvdream()) for _ in range(2))
    multiview.join(alone, 1)
    assert torch.equal(answer(alone), answer(apart))
    assert (answer(net) - answer(apart)).abs().mean() > 0.1


def test_cameras_are_those_of_mvdream() -> None:
    """Its first view, azimuth 90 in its own count, is ours at 0: in front, at +x, whatever the distance."""
    found = multiview.matrices(ring(4, 8, elevation=0, distance=2.5).rows()).view(4, 4, 4)
    front = [[0, 0, 1, 1], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    torch.testing.assert_close(found[0], torch.tensor(front).float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(found[1, :3, 3], torch.tensor([0.0, 1.0, 0.0]), atol=1e-6, rtol=0)


def context(batch: int = 8, rank: int = 0, world: int = 1) -> Context:
    return Context(3, "make", Draws(0, 3, batch, rank, world), world, rank, torch.device("cpu"))


def test_cameras_of_a_group_are_even_at_one_elevation() -> None:
    config = Law(prompt="a horse", fov=(30.0, 60.0), background="random")
    asked = law.Law(config, 4).ask(context(), ["a horse"] * 8)[1]
    cameras = Cameras.of(asked["camera"])
    azimuth, elevation = (torch.rad2deg(angle).view(2, 4) for angle in cameras.angles())
    torch.testing.assert_close(azimuth.diff() % 360, torch.full((2, 3), 90.0), atol=1e-2, rtol=0)
    assert torch.allclose(elevation, elevation[:, :1], atol=1e-3) and (elevation[0, 0] - elevation[1, 0]).abs() > 0.1
    assert (cameras.fov.view(2, 4).std(1) == 0).all() and len(asked["background"].unique(dim=0)) == 2
    parts = [law.Law(config, 4).ask(context(8, rank, 2), ["a horse"] * 4)[1] for rank in range(2)]
    assert torch.equal(asked["camera"], torch.cat([part["camera"] for part in parts]))


@pytest.fixture(scope="module")
def folder(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline with an embedding of cameras in its U-Net."""
    place = tmp_path_factory.mktemp("multiview") / "pipeline"
    shutil.copytree(pipeline, place)
    plain: Any = UNet2DConditionModel.from_pretrained(place / "unet")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made: Any = UNet2DConditionModel.from_config(plain.config, **multiview.CAMERA)
    made.load_state_dict(plain.state_dict(), strict=False)
    made.save_pretrained(place / "unet")
    return place


def recipe(model: Path, *more: str) -> Recipe:
    teacher = f"teacher={{kind: threed.multiview, of: {{kind: image.teacher, model: {model}}}}}"
    small = ["data.prompt=a cat", "data.size=16", "student.field.size=8", "steps=2", "checkpoint.every=1", "eval=[]"]
    return load("threed/sds-nerf", [teacher, *small, "stages.0.losses.0.guidance=5.0", *more])


def test_a_run_shares_t_and_resumes(
    folder: Path, resumed: Callable[[Recipe], tuple[bytes, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    times, plain = [], multiview.call

    def kept(net: Any, x: Tensor, time: Tensor, cond: dict[str, Tensor]) -> Tensor:
        times.append(time.tolist())
        return plain(net, x, time, cond)

    monkeypatch.setattr(multiview, "call", kept)
    whole, again = resumed(recipe(folder))
    assert whole == again
    assert len(times) >= 3 and all(len(row) == 8 and len(set(row)) == 1 for row in times)


def test_what_does_not_fit_is_told(pipeline: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no embedding of cameras"):
        Build(recipe(pipeline)).piece("teacher")
    with pytest.raises(BadInput, match="do not fit the pipeline's U-Net"):
        multiview.with_cameras(unet(), {**mvdream(), "out.2.bias": torch.zeros(8)})
    with pytest.raises(BadInput, match="cannot read"):
        multiview.read(tmp_path / "nothing.safetensors")
    with pytest.raises(BadInput, match="another kind"):
        Build(recipe(pipeline, "teacher.of={kind: threed.solids}")).piece("teacher")
    with pytest.raises(BadInput, match="4 views together"):
        Build(recipe(folder, "batch=6")).piece("data")


def test_weights_come_from_a_file(pipeline: Path, folder: Path, tmp_path: Path) -> None:
    """Under diffusers' names, beside the pipeline that has everything else."""
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    save_file({key: value + 1 for key, value in weights.items()}, tmp_path / "unet.safetensors")
    found = Build(recipe(pipeline, f"teacher.weights={tmp_path / 'unet.safetensors'}")).piece("teacher")
    assert found.together == 4
    assert all(torch.equal(value + 1, found.denoiser.net.state_dict()[key]) for key, value in weights.items())
