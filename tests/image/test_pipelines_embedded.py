"""The slot `teacher`: embedded names, our folders, diffusers folders and hub ids behind one kind."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from limbeck.core.run import recipe as recipes
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.domains.image import models, pipelines, students, teacher
from limbeck.domains.image.config import Student, Teacher
from limbeck.domains.image.pipelines import PipelineModel

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random teacher in the embedded format."""
    path = tmp_path_factory.mktemp("teacher") / "mine"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models.save_teacher(models.build_unet(channels=(32, 64, 64)), path)
    return path


@pytest.fixture(scope="module")
def build() -> Build:
    return Build(recipes.load("image/dmd2"))


def make(build: Build, model: Path | str, **options: object) -> object:
    return teacher.build(Teacher.model_validate({"model": str(model), **options}), build)


def test_our_folder_is_a_flow_model_on_pixels(folder: Path, build: Build) -> None:
    model = make(build, folder)
    assert model.shape == (3, 32, 32) and not any(p.requires_grad for p in model.denoiser.parameters())
    gen = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 3, 32, 32, generator=gen), torch.tensor([0.25, 1.0])
    cond = model.encode(["red apple", "rocket"])
    net, _ = models.load_teacher(folder)
    with torch.no_grad():
        prediction = model.denoiser.predict(x, t, cond, features=True)
        raw = models.flow(net, x, t, cond["states"], cond["mask"])
    assert torch.equal(prediction.raw, raw) and prediction.features is not None
    assert torch.allclose(prediction.x0, x - t[:, None, None, None] * raw, atol=1e-6)
    assert torch.equal(model.grid(4), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))


def test_guidance_uses_the_empty_prompt(folder: Path, build: Build) -> None:
    model = make(build, folder)
    x, t = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    denoiser, cond = pipelines.guided(model, model.encode(["rocket"]), 3.0)
    with torch.no_grad():
        c, u = (model.denoiser.predict(x, t, model.encode([text])).flow for text in ("rocket", ""))
        assert (denoiser.predict(x, t, cond).flow - (u + 3 * (c - u))).abs().max() < 1e-4
        same, _ = pipelines.guided(model, cond, 1.0)
        assert same is model.denoiser


def test_a_prompts_states_do_not_depend_on_its_company(folder: Path, build: Build) -> None:
    """Resume repeats a run bit for bit only if a row is the same alone, in a crowd, and from the memory."""
    first, second = make(build, folder).encode, make(build, folder).encode
    crowd = [f"{name}" for name in teacher.vocabulary()[0].names[:40]]
    alone = first([crowd[17]])
    together, again = second(crowd), second([crowd[17], ""])
    for key in ("states", "mask"):
        assert torch.equal(alone[key][0], together[key][17]) and torch.equal(alone[key][0], again[key][0])
    assert together["states"].shape == (40, 16, 384)


def test_the_memory_is_bounded(folder: Path) -> None:
    states = teacher.PromptStates(torch.device("cpu"), lambda prompt: None, limit=3)
    expected = states(["rocket"])["states"]
    for name in teacher.vocabulary()[0].names[:6]:
        states([name])
    assert len(states.read.known) == 3 and torch.equal(states(["rocket"])["states"], expected)


def test_unknown_prompts_are_told_the_nearest(folder: Path, build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    encode = make(build, folder).encode
    encode(["red apple", "", "animal", "Rocket"])
    assert capsys.readouterr().err == ""
    encode(["a gren aple"])
    err = capsys.readouterr().err
    assert '"a gren aple"' in err and "apple" in err and err.count("\n") == 1
    encode(["a gren aple"])
    assert capsys.readouterr().err == "", "once a prompt"


def test_a_diffusers_folder_goes_the_same_way(pipeline_folder: Folder, build: Build) -> None:
    model = make(build, pipeline_folder("sd15"), size=16)
    assert isinstance(model, PipelineModel) and model.shape == (4, 8, 8)


def test_misspelt_names_get_a_hint(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "names", lambda: ["fluent-32"])
    with pytest.raises(BadInput, match=r'did you mean "fluent-32"'):
        make(build, "fluent32")
    with pytest.raises(BadInput, match="embedded teachers: fluent-32"):
        make(build, "dalle")


def test_a_hub_id_without_network_is_one_line(build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BadInput) as caught:
        make(build, "nobody/nothing")
    assert "nobody/nothing" in str(caught.value) and "\n" not in str(caught.value)


def test_students_of_embedded_teachers_are_full_copies(folder: Path, build: Build) -> None:
    build._pieces["teacher"] = model = make(build, folder)
    student = students.build(Student(), build)
    assert all(p.requires_grad for p in student.parameters())
    theirs = list(model.denoiser.parameters())
    assert all(torch.equal(a, b) and a is not b for a, b in zip(student.parameters(), theirs, strict=True))
    with pytest.raises(BadInput, match="student.lora=null"):
        students.build(Student(lora=4), build)
