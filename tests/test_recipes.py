"""Every recipe, made tiny: it runs, and three steps, a stop and three more are six steps bit for bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.core.rewards import stored
from limbeck.core.run import checkpoint, job, table
from limbeck.core.run import recipe as recipes
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.domains.image import models, reward_clip
from limbeck.domains.sequence import models as sequence_models

STEPS, STOP = 6, 3
COMMON = [f"steps={STEPS}", f"checkpoint.every={STOP}", "checkpoint.keep=5"]
COMMON += ["sample.every=1000", "log.every=2", "eval=[]"]
EMBEDDED = [name for name in recipes.names() if name.split("/")[0] in ("image", "sequence", "threed", "toy", "video")]
JOBS = {name: recipes.source(name).data.get("job", "train") for name in EMBEDDED}
SAMPLING = [name for name in EMBEDDED if JOBS[name] == "sample" and name.startswith("image/")]
SEQUENCE_SAMPLING = [name for name in EMBEDDED if JOBS[name] == "sample" and name.startswith("sequence/")]
REFUSED = "image/draft-compressibility"
PAIRS = "image/diffusion-dpo"  # needs a file: tests/alignment/test_preference.py
OWN_FILES = ("sequence/pretrain", "sequence/oracle")  # need a file: tests/sequence
RECIPES = [name for name in EMBEDDED if JOBS[name] == "train" and name not in (REFUSED, PAIRS, *OWN_FILES)]


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher in the embedded format with random weights."""
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models.save_teacher(models.build_unet(32, (32, 32)), folder)
        save_sequences(folder.parent / "sequences")
    return folder


SEQUENCE_NET = {"kind": "cnn", "width": 8, "kernel": 3, "dilations": [1]}


def save_sequences(folder: Path) -> None:
    """A masked DNA model and an oracle with random weights."""
    net = sequence_models.network({"alphabet": "dna", "net": SEQUENCE_NET})
    sequence_models.save(net, folder / "model", {**net.meta, "length": 200})
    build = Build(recipes.load("sequence/oracle-a", ["student.members=1", "student.of.width=8"]))
    stored.export(build, folder / "oracle")


def small_sequences(name: str, folder: Path) -> list[str]:
    """What makes a recipe of sequences tiny."""
    sets = [*COMMON, "batch=4"]
    if recipes.source(name).data.get("space"):
        sets += ["space.steps=2"]
    if name == "sequence/fly-upstream":
        return [*sets, "teacher.net.width=8", "teacher.net.dilations=[1]"]
    if name.startswith("sequence/oracle"):
        return [*sets, "student.of.width=8"]
    if name == "sequence/drakes-protein":
        return [*sets, "batch=2", "student.steps=2", "stages.0.losses.0.walk.steps=3", "stages.0.losses.0.last=2"]
    tuned = f"stages.{len(recipes.source(name).data['stages']) - 1}"
    sets += [f"teacher.model={folder / 'model'}", "student.steps=2", f"{tuned}.losses.0.walk.steps=3"]
    data, oracle = recipes.source(name).data, folder / "oracle.safetensors"
    if data["rewards"]["train"][0].get("of", {}).get("kind") == "sequence.oracle":
        sets += [f"rewards.train.0.of.model={oracle}", f"rewards.held_out.0.model={oracle}"]
        sets += [f"data.by={oracle}", "data.among=64"]
    if name == "sequence/drakes-splice":
        sets += ["stages.0.steps=2", "data.regions=16", "data.least=0.5"]
    loss = recipes.source(name).data["stages"][-1]["losses"][0]
    return [*sets, *([f"{tuned}.losses.0.last=2"] if loss["kind"] == "drakes" else [])]


def small_clips(name: str) -> list[str]:
    """What makes a recipe of clips tiny: a small net from random weights instead of a trained teacher."""
    sets = [*COMMON, "batch=2", "space.steps=1", "sample.prompts=[fish]"]
    if name == "video/teacher":
        return [*sets, "teacher.channels=[16, 16]", "precision=fp32"]
    sets += ["teacher={kind: video.fresh, channels: [16, 16]}"]
    if name == "video/accvideo":
        walks = "{count: 6, each: 1, guidance: 3.0}"
        return [*sets, "student.steps=2", "stages.0.steps=3", *(f"stages.{i}.losses.0.set={walks}" for i in range(2))]
    if name == "video/instructvideo":
        return [*sets, "student.steps=2", "stages.0.losses.0.walk.steps=3"]
    return sets


SOLID = "a red and blue sphere with a green patch"


def small_assets(name: str) -> list[str]:
    """What makes a recipe of 3D tiny: the solids of checks instead of a trained teacher."""
    sets = [*COMMON, "batch=4"]
    if name == "threed/teacher":
        return [*sets, "teacher.widths=[8,8,8]", "teacher.hidden=16"]
    kind = recipes.load(name).student.kind
    if name.startswith("threed/vsd") and name != "threed/vsd-geometry":  # its critic starts as the teacher's net
        tiny = "student.texture=16" if kind == "threed.mesh" else "student.field.size=6"
        return [*sets, "teacher={kind: threed.fresh, widths: [8, 8, 8], hidden: 16}", tiny]
    if kind == "threed.latent":  # pictures begin between the stop and the end
        sets += ["teacher.of={kind: threed.solids, size: 8}", "data.size=[[66.67%, 4], [66.67%, 8]]"]
        return [*sets, f"data.prompt={SOLID}", "student.of.field.size=6"]
    if name == "threed/grown-gaussians":
        sets += ["stages.0.losses.1.every=2"]  # once before the stop and once after it
    if kind == "threed.amortised":
        sets += [f"data.prompts=[{SOLID}, a green and yellow torus with a red patch]", "student.width=8"]
    sets += [f"data.prompt={SOLID}", "teacher={kind: threed.solids, size: 8}", "data.size=8"]
    tiny = {
        "threed.gaussians": "student.count=40",
        "threed.mesh": "student.texture=16",
        "threed.amortised": "student.size=16",
    }
    return [*sets, tiny.get(kind, "student.field.size=6")]


def overrides(name: str, teacher: Path) -> list[str]:
    """What makes a recipe tiny."""
    if name.startswith("sequence/"):
        return small_sequences(name, teacher.parent / "sequences")
    if name.startswith("threed/") or name == "toy/solids":
        return small_assets(name)
    if name.startswith("video/"):
        return small_clips(name)
    if name == "toy/words":
        return [*COMMON, "batch=8", "stages.0.losses.0.walk.steps=3"]
    if name.startswith("toy/"):
        return [*COMMON, "batch=8", "stages.0.losses.0.critic.warm=2"]
    if name.startswith("image/reward-clip"):
        return [*COMMON, "batch=2", "space.count=4", "stages.0.losses.0.keywords=0"]
    sets = [*COMMON, "batch=2", "space.steps=1", "sample.prompts=[red apple]"]
    if name == "image/teacher":
        return [*sets, "teacher.channels=[32, 32]", "stages.0.steps=2"]
    if name == "image/progressive":
        return [*sets, f"teacher.model={teacher}", *(f"stages.{i}.steps=2" for i in range(3))]
    loss = recipes.source(name).data["stages"][0]["losses"][0]
    if "per_prompt" in loss:
        sets = [*sets, "batch=4", "stages.0.losses.0.per_prompt=2"]
    if "walk" in loss:
        sets = [*sets, "student.steps=1", "stages.0.losses.0.walk.steps=3"]
    return [*sets, f"teacher.model={teacher}"]


def small(name: str, teacher: Path) -> recipes.Recipe:
    """A recipe made tiny, with a held-out side that is judged before the stop and after it."""
    recipe = recipes.load(name, overrides(name, teacher))
    for loss in (loss for stage in recipe.stages for loss in stage.losses):
        if hasattr(loss, "judge"):
            loss.judge.every = STOP  # numbers of the last step before the stop are written after it
    return recipe


def ending(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint, which must be the last step's."""
    loaded = checkpoint.latest(folder / "checkpoints")
    assert loaded is not None and loaded.manifest.step == STEPS
    return loaded.tensors


def rows(folder: Path) -> list[dict[str, float]]:
    """The logged numbers without the wall clock's."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("time", "speed", "memory")} for line in lines]


def cut(whole: Path, halves: Path) -> None:
    """The run as a kill after step 3 leaves it: later checkpoints gone, later log lines still there."""
    shutil.rmtree(halves, ignore_errors=True)
    shutil.copytree(whole, halves)
    (halves / "eval.json").unlink(missing_ok=True)
    for folder in (halves / "checkpoints").iterdir():
        if int(folder.name.rpartition("-")[2]) > STOP:  # stages before the last are shorter
            shutil.rmtree(folder)


def assert_same(whole: Path, halves: Path) -> None:
    one, two = ending(whole), ending(halves)
    assert one.keys() == two.keys()
    assert [key for key in one if not torch.equal(one[key], two[key])] == []
    assert rows(whole) == rows(halves)


@pytest.mark.parametrize("name", RECIPES)
def test_three_and_three_are_six(
    name: str, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_clip, "FITTED", 16)  # pictures
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    recipe = small(name, tiny_teacher)
    assert job.run(recipe, whole, device="cpu", quiet=True) == 0
    assert (whole / "report.html").stat().st_size > 1000
    assert recipe.space is None or list((whole / "samples").iterdir())
    cut(whole, halves)
    assert job.run(recipe, halves, device="cpu", resume=True, quiet=True) == 0
    assert_same(whole, halves)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_shows_and_resumes_on_a_gpu(name: str, tiny_teacher: Path, tmp_path: Path) -> None:
    recipe = small(name, tiny_teacher)
    assert job.run(recipe, tmp_path / "run", device="cuda", quiet=True) == 0
    assert recipe.space is None or list((tmp_path / "run" / "samples").iterdir())
    cut(tmp_path / "run", tmp_path / "half")
    assert job.run(recipe, tmp_path / "half", device="cuda", resume=True, quiet=True) == 0
    one, two = ending(tmp_path / "run"), ending(tmp_path / "half")
    for key, value in one.items():  # CUDA adds up in no fixed order
        assert torch.allclose(value.float(), two[key].float(), rtol=0.05, atol=0.05), key


def steered(name: str, teacher: Path, student: Path) -> list[str]:
    """What makes a sampling recipe tiny."""
    own = [f"student.of={student}"] if recipes.source(name).data.get("student") else []
    short = [
        f"eval.0.samplers.{i}.{'steps' if kind == 'reno' else 'walk.steps'}={2 if kind == 'reno' else 3}"
        for i, kind in enumerate(one["kind"] for one in recipes.source(name).data["eval"][0]["samplers"])
    ]
    walk = ["sampler.steps=2"] if "reno" in name else ["sampler.walk.steps=3"]
    return [*own, *short, *walk, "eval.0.count=2", "sample.prompts=[red apple, bus]", f"teacher.model={teacher}"]


@pytest.fixture(scope="module")
def student(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, whose student is steered."""
    folder, sets = tmp_path_factory.mktemp("demo") / "student", [*overrides("image/demo", tiny_teacher), "steps=1"]
    assert job.run(recipes.load("image/demo", sets), folder, device="cpu", quiet=True) == 0
    return folder


@pytest.mark.parametrize("name", SAMPLING)
def test_a_steered_recipe_draws_and_compares(name: str, tiny_teacher: Path, student: Path, tmp_path: Path) -> None:
    folder = tmp_path / "steered"
    assert job.run(recipes.load(name, steered(name, tiny_teacher, student)), folder, device="cpu", quiet=True) == 0
    assert len(list((folder / "samples").glob("0*.png"))) == 2 and (folder / "samples" / "samplers.png").exists()
    lines = json.loads((folder / "eval.json").read_text())["samplers"]
    assert [line["reward: gain"] for line in lines][0] == 0.0 and all(line["calls"] > 0 for line in lines)


@pytest.mark.parametrize("name", SEQUENCE_SAMPLING)
def test_a_recipe_of_sequences_draws_and_measures(name: str, tiny_teacher: Path, tmp_path: Path) -> None:
    folder = tiny_teacher.parent / "sequences"
    sets = ["sampler.walk.steps=3", "space.steps=3", "eval.0.count=4", "eval.0.steps=3", "eval.0.levels=2"]
    if name.endswith("-protein"):
        sets += ["sample.prompts=['', '']"]
    else:
        sets += ["eval.0.pool=256"]
        sets += [f"rewards.{split}.0.model={folder / 'oracle.safetensors'}" for split in ("train", "held_out")]
        sets += [f"teacher.model={folder / 'model'}"]
    assert job.run(recipes.load(name, sets), tmp_path / "run", device="cpu", quiet=True) == 0
    assert list((tmp_path / "run" / "samples").glob("*.fasta"))
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["sequence.quality"]


def test_a_students_run_must_be_there(tmp_path: Path, tiny_teacher: Path) -> None:
    recipe = recipes.load("image/reno", [f"teacher.model={tiny_teacher}", f"student.of={tmp_path / 'none'}"])
    with pytest.raises(BadInput, match="none is no run folder; train a student first and name its folder"):
        job.run(recipe, tmp_path / "run", device="cpu", quiet=True)


def test_a_reward_without_a_gradient_is_refused_by_the_methods_that_follow_one(
    tmp_path: Path, tiny_teacher: Path
) -> None:
    recipe = recipes.load(REFUSED, [f"teacher.model={tiny_teacher}", "sample.prompts=[]"])
    with pytest.raises(BadInput, match="draft follows the gradient .* image.compressibility has none; use ddpo"):
        job.run(recipe, tmp_path / "run", device="cpu", quiet=True)


def test_a_table_cut_in_a_row_ends_as_the_whole_one(tiny_teacher: Path, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    tiny = [key for key in overrides("image/dmd2", tiny_teacher) if not key.startswith(("steps", "batch"))]
    recipe = recipes.load("image/table", [f"steps={STEPS}", "batch=2"])
    recipe = recipe.model_copy(update={"rows": recipe.rows[1:3], "set": tiny})
    assert job.run(recipe, whole, device="cpu", quiet=True) == 0
    shutil.copytree(whole, halves)
    cut(whole / "rows/sim", halves / "rows/sim")
    assert job.run(recipe, halves, device="cpu", resume=True, quiet=True) == 0
    for row in ("swiftbrush", "sim"):
        assert_same(whole / "rows" / row, halves / "rows" / row)


@pytest.mark.parametrize("name", [name for name in EMBEDDED if JOBS[name] == "table"])
def test_the_rows_of_a_table_are_recipes_that_measure(name: str) -> None:
    whole = recipes.load(name)
    found = [table.recipe_of(whole, row) for row in whole.rows]
    assert all(one.eval and (one.steps, one.seed) == (whole.steps, whole.seed) for one in found)


@pytest.mark.parametrize("name", ["image/dmd2", "toy/ring4"])
def test_a_domain_resumes_as_a_process(name: str, tiny_teacher: Path, tmp_path: Path, python: Any) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert job.run(small(name, tiny_teacher), whole, device="cpu", quiet=True) == 0
    cut(whole, halves)
    python.run(["-m", "limbeck", "resume", halves, "--device", "cpu"], check=True)
    assert_same(whole, halves)


def test_data_of_another_size_than_the_teacher_is_refused(tmp_path: Path, tiny_teacher: Path) -> None:
    """The net is convolutional: it would train on the wrong size without a word."""
    recipe = recipes.load("image/teacher", [*overrides("image/teacher", tiny_teacher), "teacher.size=64"])
    with pytest.raises(BadInput, match=r"shape \[3, 32, 32\], the teacher has \[3, 64, 64\]"):
        job.run(recipe, tmp_path / "run", device="cpu", quiet=True)


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_is_short_and_says_what_it_does(name: str) -> None:
    data = recipes.source(name).data
    assert data["about"] and data["expect"]["minutes"] > 0
    path = Path(recipes.registry().recipe(name))
    assert len(path.read_text().splitlines()) <= 40


def test_a_trained_teacher_is_exported_as_a_teacher(tiny_teacher: Path, tmp_path: Path) -> None:
    recipe = recipes.load("image/teacher", [*overrides("image/teacher", tiny_teacher), "steps=2"])
    assert job.run(recipe, tmp_path / "run", device="cpu", quiet=True) == 0
    build = job.open_run(tmp_path / "run", "cpu")
    build.piece("space").export(build, tmp_path / "mine", "diffusers")
    made, meta = models.load_teacher(tmp_path / "mine")
    assert meta["size"] == 32 and meta["trained"] == {"recipe": "image/teacher", "steps": 2, "batch": 2}
    for key, value in build.piece("teacher").denoiser.net.state_dict().items():
        assert torch.equal(made.state_dict()[key], value.bfloat16().float()), key
    again = Build(recipes.load("image/dmd2", [f"teacher.model={tmp_path / 'mine'}"])).piece("teacher")
    assert again.shape == (3, 32, 32)


def test_a_teacher_goes_on_from_given_weights(tiny_teacher: Path) -> None:
    recipe = recipes.load("image/teacher", [f"teacher.start={tiny_teacher}"])
    started = Build(recipe).piece("teacher").denoiser.net.state_dict()
    given = models.load_teacher(tiny_teacher)[0].state_dict()
    assert started.keys() == given.keys() and all(torch.equal(started[key], given[key]) for key in given)
