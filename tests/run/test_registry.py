"""The registry: pieces read as data, every target and config there, nothing imported to look."""

from pathlib import Path

import pytest

from limbeck.core.run import recipe
from limbeck.core.run.errors import BadInput, did_you_mean
from limbeck.core.run.registry import KINDS, Registry, registry, resolve

SPECS = [spec for spec in registry().all() if spec.source == "limbeck"]


def test_our_own_files_have_no_problem() -> None:
    assert [problem for problem in registry().problems if problem.source == "limbeck"] == []


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.kind} {spec.name}")
def test_every_target_and_config_is_there(spec) -> None:  # type: ignore[no-untyped-def]
    found = registry()
    assert spec.kind in KINDS and spec.about
    assert found.load(spec) is not None
    config = found.config(spec)
    assert config is None or config.model_config["extra"] == "forbid"


def test_kinds_are_in_alphabetical_order() -> None:
    for path in Path(__file__).parents[2].glob("*/pieces.yaml"):
        kinds = [line[:-1] for line in path.read_text().splitlines() if line.endswith(":") and line[0].isalpha()]
        assert kinds == sorted(kinds), path


def test_get_suggests_the_nearest() -> None:
    with pytest.raises(BadInput, match='no objective "dmd" .did you mean "dmd2"'):
        registry().get("objective", "dmd")
    with pytest.raises(BadInput, match='no objective "sds".*it is of kind operator'):
        registry().get("objective", "sds")
    assert did_you_mean("xyzzy", ["dmd2", "sim"]) == ""


def provider(folder: Path, text: str) -> Registry:
    (folder / "pieces.yaml").write_text(text)
    found = Registry()
    found.add("own", "own", folder)
    return found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("metric: [a]\n", "must be `kind:"),
        ("- a\n", "must be `kind:"),
        ("metrics:\n  a: {target: 'own:a'}\n", 'unknown kind (did you mean "metric"?)'),
        ("metric:\n  a: {about: x}\n", "keys must be target"),
        ("metric:\n  a: {target: 'own:a', extra: x}\n", "not extra"),
        ("metric:\n  a: {target: 'os:system'}\n", "inside own"),
        ("metric:\n  a: {target: 'own'}\n", "module:attribute"),
        ("metric:\n  a: {target: 'ownother:a'}\n", "inside own"),
        ("metric:\n  a: {target: 3}\n", "mapping of texts"),
        ("metric:\n  a: {target: 'own:a', config: 'subprocess:run'}\n", "inside own"),
    ],
)
def test_a_bad_entry_is_a_problem_and_no_piece(tmp_path: Path, text: str, words: str) -> None:
    found = provider(tmp_path, text)
    assert not found.specs
    assert words in found.problems[0].message


def test_the_good_entries_of_a_file_stay(tmp_path: Path) -> None:
    found = provider(
        tmp_path, "metric:\n  a: {target: 'own:a'}\n  b: {target: 'os:b'}\nreward:\n  c: {target: 'own.x:c'}\n"
    )
    assert {spec.name for spec in found.all()} == {"a", "c"} and len(found.problems) == 1


def test_resolve_names_the_plugin() -> None:
    with pytest.raises(BadInput, match='plugin "mine" cannot be imported .ModuleNotFoundError'):
        resolve("no_such_module_here:x", "mine")
    with pytest.raises(BadInput, match="AttributeError"):
        resolve("json:nothing", "mine")


def test_changing_a_kind_keeps_shared_fields() -> None:
    found = recipe.load("toy/ring4", ["stages.0.losses.0.kind=score", "stages.0.losses.0.operator=csd"])
    loss = found.stages[0].losses[0]
    assert (loss.kind, loss.operator, loss.weight) == ("score", "csd", 1.0)
    assert loss.optim.model_dump() == recipe.load("toy/ring4").stages[0].losses[0].optim.model_dump()
    assert not hasattr(loss, "adversary")


def test_a_loss_has_a_scheduled_weight() -> None:
    found = recipe.load("toy/ring4", ["stages.0.losses.0.weight=[[0, 1.0], [10, 0.0]]"])
    assert found.stages[0].losses[0].weight == [(0, 1.0), (10, 0.0)]
    with pytest.raises(BadInput, match="rising steps"):
        recipe.load("toy/ring4", ["stages.0.losses.0.weight=[[10, 1.0], [0, 0.0]]"])


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (
            "stages.0.losses.0.guidanc=1",
            'stages.0.losses.0.guidanc (set on the command line): unknown key (did you mean "guidance"?)',
        ),
        ("stages.0.losses.0.critic.optim.lrr=1", 'unknown key (did you mean "lr"?)'),
        ("stages.0.losses.0.optim.lr=fast", "must be a number"),
        ("teacher.kind=toy.ring5", 'did you mean "toy.ring4"'),
        ("teacher=null", "teacher"),
    ],
)
def test_faults_inside_pieces_name_their_path(item: str, words: str) -> None:
    if item == "teacher=null":
        assert recipe.load("toy/ring4", [item]).teacher is None
        return
    with pytest.raises(BadInput) as caught:
        recipe.load("toy/ring4", [item])
    assert words in str(caught.value), str(caught.value)
