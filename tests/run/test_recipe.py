"""Recipes as data: what is read, merged and set, and what the errors say."""

import hashlib
import re
from pathlib import Path

import pytest

from limbeck.core.run import recipe, yamlio
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.core.scheduled import at, in_steps

BASE = "about: a sample job\njob: sample\nsteps: 10\nbatch: 4\n"


def write(folder: Path, text: str, name: str = "r.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def refused(path: str, *sets: str, **inputs: str) -> str:
    with pytest.raises(BadInput) as caught:
        recipe.load(path, sets, inputs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_and_the_common_keys(tmp_path: Path) -> None:
    found = recipe.load(write(tmp_path, BASE))
    assert (found.name, found.steps, found.batch, found.seed) == ("r", 10, 4, 0)
    assert (found.checkpoint.every, found.checkpoint.keep, found.log.every, found.sample.every) == (100, 3, 10, 100)


def test_scalars_read_as_meant() -> None:
    text = "a: 1e-4\nb: 1.5E+3\nc: .5\nd: 10\ne: '1e-4'\nf: yes\ng: 2020-01-01\nh: 0o17\n"
    text += "i: null\nj: true\nk: 1_000\nl: -3\n"
    assert yamlio.parse(text, "x").data == {
        "a": 1e-4, "b": 1500.0, "c": 0.5, "d": 10, "e": "1e-4", "f": "yes", "g": "2020-01-01", "h": "0o17", "i": None,
        "j": True, "k": "1_000", "l": -3,
    }  # fmt: skip


def test_dump_reads_back_equal(tmp_path: Path) -> None:
    odd = ["1e-4", "5", "true", "null", "a: b", "- x", "#", "é 🦊", " lead", "line\nbreak", "'", "~", "2020-01-01", ""]
    sets = [f"sample.prompts.{i}={yamlio.dump(text).strip().removesuffix('...')}" for i, text in enumerate(odd[:1])]
    found = recipe.load(write(tmp_path, BASE), sets)
    found = found.model_copy(update={"sample": found.sample.model_copy(update={"prompts": odd})})
    again = recipe.load(write(tmp_path, recipe.dump(found), "again.yaml"))
    assert again == found
    assert recipe.digest(again) == recipe.digest(found)
    assert len(recipe.digest(found)) == hashlib.sha256().digest_size * 2


def test_digest_tells_recipes_apart(tmp_path: Path) -> None:
    path = write(tmp_path, BASE)
    assert recipe.digest(recipe.load(path)) != recipe.digest(recipe.load(path, ["seed=1"]))


def test_set_and_inputs(tmp_path: Path) -> None:
    inputs = "inputs:\n  prompt: {set: sample.prompts.0, help: what to draw}\n  n: {set: sample.count}\n"
    path = write(tmp_path, BASE + inputs)
    found = recipe.load(path, ["log.every=3", "sample.prompts.1=a: b", "sample.prompts.2=5"], {"prompt": "7", "n": "9"})
    assert found.sample.prompts == ["7", "a: b", "5"]
    assert (found.sample.count, found.log.every) == (9, 3)
    assert recipe.load(path, ["sample.prompts=[x, y]"]).sample.prompts == ["x", "y"]
    assert recipe.load(path, ["sample={every: 5}"]).sample.every == 5


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ("steps", "key.path=value"),
        ("extends=x", "not a key that can be set"),
        ("a..b=1", "not a key that can be set"),
        ("__class__.x=1", "unknown key"),
        ("log.evry=3", 'did you mean "every"'),
        ("log.every=fast", "log.every (set on the command line): must be a whole number, but is fast"),
        ("steps.x=1", "single value"),
        ("sample.prompts.7=x", "position 0..0"),
        ("sample.prompts.-1=x", "not a key that can be set"),
        ("steps=[1", "not valid YAML"),
        ("steps=!!python/name:os.system", "tag"),
        ("seed=-1", "seed"),
        ("steps=0", "steps"),
        ("batch=true", "batch"),
    ],
)
def test_bad_sets_say_what_to_do(tmp_path: Path, sets: str, words: str) -> None:
    assert words in refused(write(tmp_path, BASE), sets)


def test_extends_one_level(tmp_path: Path) -> None:
    write(tmp_path, BASE + "log: {every: 7}\nsample: {prompts: [a, b], count: 2}\n", "base.yaml")
    path = write(tmp_path, "extends: base.yaml\nsteps: 20\nsample: {prompts: [c]}\n")
    found = recipe.load(path)
    assert (found.name, found.steps, found.log.every) == ("r", 20, 7)
    assert (found.sample.prompts, found.sample.count) == (["c"], 2)
    write(tmp_path, "extends: r.yaml\n", "third.yaml")
    assert "extends: of its own" in refused(str(tmp_path / "third.yaml"))


def test_a_changed_kind_replaces_the_base_piece() -> None:
    base = {"teacher": {"kind": "a", "x": 1}, "log": {"every": 1}}
    assert recipe._merge(base, {"teacher": {"kind": "b", "y": 2}})["teacher"] == {"kind": "b", "y": 2}
    assert recipe._merge(base, {"teacher": {"x": 3}})["teacher"] == {"kind": "a", "x": 3}


def test_errors_name_the_first_line_and_count_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path, BASE + "log:\n  evry: 3\nbatc: 3\n")
    message = refused(path)
    assert message.startswith(f'{path}:6: log.evry: unknown key (did you mean "every"?); the keys here are every')
    assert message.endswith("(and 1 more)")


def test_names_suggest_the_nearest() -> None:
    assert "`limbeck list` shows them" in refused("no/such-recipe")


def test_training_needs_stages(tmp_path: Path) -> None:
    assert "needs stages" in refused(write(tmp_path, BASE.replace("job: sample", "job: train")))


def test_an_input_may_set_several_keys(tmp_path: Path) -> None:
    path = write(tmp_path, BASE + "inputs:\n  size: {set: [batch, sample.count]}\n")
    found = recipe.load(path, [], {"size": "3"})
    assert (found.batch, found.sample.count) == (3, 3)
    assert "inputs.size.set" in refused(write(tmp_path, BASE + "inputs: {size: {set: []}}\n"))


def test_inputs_keep_clear_of_flags(tmp_path: Path) -> None:
    assert "rename it" in refused(write(tmp_path, BASE + "inputs: {seed: {set: seed}}\n"))


def test_scheduled_values() -> None:
    pairs = [(0, 1.0), (100, 0.0), (200, 4.0)]
    assert [at(pairs, step) for step in (0, 50, 100, 150, 200, 10**9)] == [1.0, 0.5, 0.0, 2.0, 4.0, 4.0]
    assert at([(10, 2.0)], 0) == at([(10, 2.0)], 99) == at(2, 5) == 2.0


def test_two_pairs_at_one_step_are_a_jump() -> None:
    pairs = [(0, 1.0), (2, 3.0), (2, 8.0), (4, 8.0)]
    assert [at(pairs, step) for step in range(5)] == [1.0, 2.0, 8.0, 8.0, 8.0]


LR = "stages.0.losses.0.optim.lr"


@pytest.mark.parametrize(("steps", "own"), [(1600, None), (800, None), (100, 400)])
def test_shares_stretch_with_the_steps_of_their_stage(steps: int, own: int | None, tmp_path: Path) -> None:
    sets = [f"steps={steps}", f"{LR}=[[25%, 1.0], [75%, 0.5]]", "stages.0.losses.0.weight=[[50%, 1.0], [50%, 3.0]]"]
    found = recipe.load("toy/ring4", sets + [f"stages.0.steps={own}"] * bool(own))
    long, build = own or steps, Build(found)
    player = build.objective("match").players["student"]
    assert [player.lr(share * long // 4) for share in range(5)] == [1.0, 1.0, 0.75, 0.5, 0.5]
    assert build.config("stages.0.losses.0.weight") == [(long // 2, 1.0), (long // 2, 3.0)]
    assert build.config("stages.0").name == "match"
    again = recipe.load(write(tmp_path, recipe.dump(found)))  # as a run folder keeps it: shares
    assert again == found and "50%" in recipe.dump(again)
    assert recipe.load(write(tmp_path, recipe.dump(found)), ["seed=1"]).stages[0].losses[0].optim.lr[0][0] == "25%"


def test_shares_outside_stages_are_of_the_recipe() -> None:
    found = Build(recipe.load("threed/latent-nerf", ["steps=600", "stages.0.steps=50"]))
    assert found.config("student").rgb == 400
    assert found.config("data").size == [(400, 16.0), (400, 32.0)]
    assert in_steps({"a": (found.recipe.student.rgb, "50%")}, 30) == {"a": (20, "50%")}  # a prompt stays what it is


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ("[[0%, 1.0], [50, 0.1]]", "not both"),
        ("[[0, 1.0], [50%, 0.1]]", "not both"),
        ("[[50%, 1.0], [5%, 0.1]]", "rising steps"),
        ("[[0%, 1.0], [100.5%, 0.1]]", "from 0% to 100%"),
        ("[[0%, 1.0], [half, 0.1]]", "from 0% to 100%"),
        ("[]", "rising steps"),
    ],
)
def test_schedules_that_cannot_be_are_refused(pairs: str, words: str) -> None:
    assert words in refused("toy/ring4", f"{LR}={pairs}")


def test_a_step_alone_may_be_a_share() -> None:
    assert "from 0% to 100%" in refused("threed/latent-nerf", "student.rgb=101%")
    assert Build(recipe.load("threed/latent-nerf", ["student.rgb=7"])).config("student").rgb == 7


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_is_valid_short_and_documented(name: str) -> None:
    found = recipe.load(name)
    text = recipe.registry().recipe(name).read_text()
    assert len(text.splitlines()) <= 40
    assert not re.search(r"\[\[\d+,", text), "a schedule in steps does not stretch with --steps; say shares: 50%"
    assert found.about and found.name == name
    assert found.expect is not None
    assert recipe.load(name) == found
