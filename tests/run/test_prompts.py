"""`--prompts` and `--seeds`: files, the rows that become of them, stops, failures, processes, contact sheets."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from limbeck import cli
from limbeck.core.run import batch, checkpoint, contact, distributed, job, outside, table
from limbeck.core.run import recipe as recipes
from limbeck.core.run.errors import BadInput, LimbeckError
from limbeck.core.run.trainer import Trainer

HOSTILE = ["a: b", "[x", "null", "'q\" \\ t", "123", "- é 😀 #x", "a red chair"]


@pytest.fixture
def named(recipe_file: Path) -> Path:
    """The tiny recipe with an input `prompt`, and one `width`."""
    inputs = "inputs: {prompt: {set: sample.prompts.0}, width: {set: student.width}}\n"
    recipe_file.write_text(recipe_file.read_text().replace("steps: 20", "steps: 6") + inputs)
    return recipe_file


@pytest.fixture
def two(tmp_path: Path) -> Path:
    path = tmp_path / "two.txt"
    path.write_text("a red chair\na blue house\n")
    return path


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(["run", *map(str, words), "--device", "cpu"])
    return int(end.value.code or 0)


def test_lines_are_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red chair\r\n\n  ein Häuschen \na red chair\n漢字".encode())
    assert batch.read_prompts(path) == ["a red chair", "ein Häuschen", "漢字"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), (b"", "has no prompt"), (b"\n \n", "has no prompt"),
     (b"fine\n\xff\n", r"UTF-8 \(byte 5"), (b"fine\n" + b"x" * 1001, ":2: must be one prompt of at most 1000"),
     (b"a\x00b", ":1: must be one prompt"), (b"a\x1b[2Jb", ":1: must"), (b"x\n" * 2**17, "larger than 128 KiB")],
)  # fmt: skip
def test_files_that_are_no_prompts(
    content: bytes | None, words: str, tmp_path: Path, named: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=words):
        batch.read_prompts(path)
    assert run(named, "--prompts", path) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_row_has_its_prompt_to_the_letter(named: Path, tmp_path: Path) -> None:
    whole = batch.table(str(named), ["batch=4"], {"width": "3"}, HOSTILE, 1)
    kept = tmp_path / "kept.yaml"
    kept.write_text(recipes.dump(whole))
    assert recipes.load(str(kept)) == whole
    rows = [table.recipe_of(whole, row) for row in whole.rows]
    assert [row.sample.prompts for row in rows] == [[prompt] for prompt in HOSTILE]
    assert {(row.student.width, row.batch, row.seed, row.name) for row in rows} == {(3, 4, 0, "tiny")}
    assert len({row.label for row in whole.rows}) == len(HOSTILE) and whole.rows[-1].label == "006-a-red-chair"


def test_seeds_count_up_from_the_recipes(named: Path) -> None:
    whole = batch.table(str(named), ["seed=5"], {}, ["a", "b"], 2)
    assert [(row.label, table.recipe_of(whole, row).seed) for row in whole.rows] == [
        ("000-a-seed-5", 5), ("000-a-seed-6", 6), ("001-b-seed-5", 5), ("001-b-seed-6", 6)]  # fmt: skip
    alone = batch.table(str(named), [], {"prompt": "null"}, [], 2)
    assert [row.label for row in alone.rows] == ["seed-0", "seed-1"]
    assert table.recipe_of(alone, alone.rows[1]).sample.prompts == ["null"]


def test_what_cannot_be_many_runs(named: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="exclude each other"):
        batch.table(str(named), [], {"prompt": "a"}, ["b"], 1)
    with pytest.raises(BadInput, match="no input --prompt"):
        batch.table("toy/ring4", [], {}, ["b"], 1)
    with pytest.raises(BadInput, match="is a table of recipes"):
        batch.table("image/table", [], {}, [], 2)
    with pytest.raises(BadInput, match="1002 runs are more than one job takes"):
        batch.table(str(named), [], {}, ["a", "b"], 501)
    with pytest.raises(BadInput, match="such long prompts"):
        batch.table(str(named), [], {}, [f"{i} " + "x" * 900 for i in range(100)], 1)


def test_a_batch_is_run_once(named: Path, two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = (named, "--prompts", two, "--seeds", 2, "--out", tmp_path, "--name", "b")
    assert run(*order, "--dry-run") == 0
    assert "each of 4 runs:" in (said := capsys.readouterr().out) and said.count("estimate:") == 1
    assert run(*order) == 0
    folder = tmp_path / "b"
    rows = json.loads((folder / "eval.json").read_text())["tinyrun.mean"]
    titles = [f"a {what} · seed {seed}" for what in ("red chair", "blue house") for seed in (0, 1)]
    assert [row["recipe"] for row in rows] == titles
    with Image.open(folder / "samples" / "contact-1.png") as sheet:
        assert sheet.width == 2 * (contact.WIDTH + contact.GAP) + contact.GAP  # a line a prompt, a column a seed
    assert [path.name for path in (folder / "samples").iterdir()] == ["contact-1.png"]
    page = (folder / "report.html").read_text()
    assert "contact-1" in page and "limbeck eval" not in page
    before = {path: path.stat().st_mtime_ns for path in (folder / "rows").rglob("*")}
    assert run(*order) == 0
    assert {path: path.stat().st_mtime_ns for path in (folder / "rows").rglob("*")} == before
    two.write_text("something else\n")
    capsys.readouterr()
    assert run(*order) == 2 and "is not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["export", str(folder), "--format", "txt"])
    assert f"name one of them, such as {folder}/rows/000-a-red-chair-seed-0" in capsys.readouterr().err


def test_an_interrupted_batch_goes_on(named: Path, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = (named, "--prompts", two, "--set", "checkpoint.every=2", "--out", tmp_path)
    plain, inner = Trainer.one_step, Path("rows/001-a-blue-house")

    def one_step(self: Trainer) -> None:
        plain(self)
        if self.step == 5 and (tmp_path / "cut" / inner).exists():  # the estimate before it stops at 4
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "one_step", one_step)
    assert run(*order, "--name", "cut") == 143
    assert checkpoint.latest(tmp_path / "cut" / inner / "checkpoints").manifest.step == 5
    monkeypatch.setattr(Trainer, "one_step", plain)
    assert run(*order, "--name", "cut") == 0 and run(*order, "--name", "whole") == 0
    one, two_ = (checkpoint.latest(tmp_path / name / inner / "checkpoints").tensors for name in ("cut", "whole"))
    assert all(torch.equal(one[key], two_[key]) for key in one)
    assert (tmp_path / "cut" / "eval.json").read_text() == (tmp_path / "whole" / "eval.json").read_text()


def test_a_row_that_fails_does_not_keep_the_others(named: Path, two: Path, tmp_path: Path) -> None:
    whole = batch.table(str(named), [], {}, ["bad", "good"], 1)
    ran: list[str] = []

    def carry(recipe: recipes.Recipe, folder: Path, resume: bool) -> int:
        ran.append(folder.name)
        if recipe.sample.prompts == ["bad"]:
            raise BadInput("an empty scene")
        folder.mkdir(parents=True)
        return 0

    for tries in (1, 2):
        with pytest.raises(LimbeckError, match="^1 of 2 rows failed; 000-bad: an empty scene$"):
            table.carry_out(whole, tmp_path, carry, lambda line: None)
        assert ran == ["000-bad", "001-good", "000-bad"][: tries + 1]


def test_rows_apart_are_resumed_by_processes(
    named: Path, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The processes' commands are carried out here, one after the other."""
    asked: list[list[str]] = []

    def supervise(count, command, ended, at_once, quiet):
        assert (count, at_once, quiet) == (2, 3, True)
        for number in range(count):
            asked.append(command(number, number))
            with pytest.raises(SystemExit) as end:
                cli.main(asked[-1][3:-1])
            ended(number, end.value.code or 0)
        return 0

    monkeypatch.setattr(distributed, "supervise", supervise)
    monkeypatch.setattr(outside, "flags_for", lambda rewards: ["--told"])
    order = (named, "--prompts", two, "--out", tmp_path, "--processes", "3")
    assert run(*order, "--name", "apart") == 0
    place = str(tmp_path / "apart/rows/000-a-red-chair")
    assert asked[0] == [sys.executable, "-m", "limbeck", "resume", place, "--device", "cpu", "--told"]
    monkeypatch.setattr(distributed, "supervise", lambda count, *_, **how: 143 if count else 0)
    assert run(*order, "--name", "stopped") == 143
    monkeypatch.undo()
    assert run(named, "--prompts", two, "--out", tmp_path, "--name", "plain") == 0
    for row in ("000-a-red-chair", "001-a-blue-house"):
        folders = (tmp_path / name / "rows" / row / "checkpoints" for name in ("apart", "plain"))
        one, other = (checkpoint.latest(folder).tensors for folder in folders)
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert (tmp_path / "apart/rows" / row / "environment.json").exists()
    assert (tmp_path / "apart/eval.json").read_text() == (tmp_path / "plain/eval.json").read_text()
    assert "000-a-red-chair: done after" in (tmp_path / "apart/log.txt").read_text()


def test_places_have_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    one = job.Job.__new__(job.Job)
    one.named, one.team = None, type("Team", (), {"device": torch.device("cuda")})()
    assert [one._device(place) for place in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    one.named, one.team.device = "cuda:1", torch.device("cuda:1")
    assert one._device(0) == "cuda:1"


def shell(script: str) -> list[str]:
    return ["sh", "-c", script]


def test_so_many_at_once(tmp_path: Path) -> None:
    """Places are told apart and used again; each says when it begins and ends."""
    log, codes, places = tmp_path / "log", {}, {}

    def command(number: int, place: int) -> list[str]:
        places[number] = place
        return shell(f"echo + >> {log}; sleep 0.15; echo - >> {log}; exit {number}")

    assert distributed.supervise(5, command, codes.__setitem__, at_once=2) == 0
    assert codes == {number: number for number in range(5)} and set(places.values()) == {0, 1}
    running, most = 0, 0
    for line in log.read_text().split():
        running += 1 if line == "+" else -1
        most = max(most, running)
    assert most == 2


def test_a_signal_goes_on_to_all_and_starts_no_other(tmp_path: Path) -> None:
    codes: dict[int, int] = {}

    def command(number: int, place: int) -> list[str]:
        if number == 1:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
        return shell(
            f"trap 'sleep 0.{3 * number}; exit 9' TERM; touch {tmp_path}/{number}; while :; do sleep 0.05; done"
        )

    before = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    began = time.monotonic()
    try:
        assert distributed.supervise(5, command, codes.__setitem__, at_once=2) == 143
    finally:
        signal.signal(signal.SIGALRM, before)
    assert codes == {0: 9, 1: 9} and time.monotonic() - began < 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_processes_hear_of_the_programs_that_their_recipe_asks_for() -> None:
    outside.take(["judge=sh -c 'exit 0'", "other=sh"], ["lab=http://127.0.0.1:9"])
    try:
        asked = {"train": [{"kind": "program", "name": "judge"}], "held_out": [{"kind": "remote", "name": "lab"}]}
        assert outside.flags_for(asked) == [
            "--reward-program", "judge=sh -c 'exit 0'", "--reward-address", "lab=http://127.0.0.1:9"]  # fmt: skip
        assert outside.flags_for(None) == []
    finally:
        outside.take([], [])


def test_contact_sheets(tmp_path: Path) -> None:
    Image.new("RGB", (8, 4), "red").save(tmp_path / "small.png")
    Image.new("RGB", (800, 800), "blue").save(tmp_path / "large.png")
    long = "a prompt that is far too long to stand above its picture " * 9
    contact.write([("one", tmp_path / "small.png"), (long, tmp_path / "large.png")], tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        step = contact.WIDTH + contact.GAP
        assert sheet.size == (2 * step + contact.GAP, contact.LINE + contact.WIDTH + 2 * contact.GAP)
        top = contact.GAP + contact.LINE
        assert sheet.getpixel((contact.GAP, top + 199)) == (255, 0, 0)
        assert sheet.getpixel((contact.GAP, top + 201)) == (255, 255, 255)  # its own height
        assert sheet.getpixel((contact.GAP + step, top + 399)) == (0, 0, 255)
        assert sheet.crop((2 * step, 0, sheet.width, top)).getcolors() == [(contact.GAP * top, (255, 255, 255))]
    assert contact.columns_of(["a"] * 7) == 4 and contact.columns_of(["a\nseed 0", "a\nseed 1", "b\nseed 0"]) == 2
    assert contact.columns_of(["a", "b", "c", "d"]) == 3 and contact.columns_of(["a"]) == 1


@pytest.mark.parametrize("name", [n for n in recipes.names() if "negative" in recipes.source(n).data.get("inputs", {})])
def test_a_negative_prompt(name: str) -> None:
    assert recipes.load(name, inputs={"negative": "smoke"}).stages[0].losses[0].negative == "smoke"
