"""A reward that is the user's program, or a server elsewhere: only by the command line, bounded, and one clear line."""

import json
import re
import shlex
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck import cli
from limbeck.core.rewards import config, program
from limbeck.core.rewards.base import Reward
from limbeck.core.rewards.files import Files, Numbers, files
from limbeck.core.rewards.remote import Server
from limbeck.core.run import checkpoint, job, outside
from limbeck.core.run import recipe as recipes
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput, LimbeckError

X = torch.tensor([[0.1, -2.0], [3.5, 4.0], [1 / 3, 1e-30]])
COND = {"prompt": ["a", "zwei\nZeilen", "ü"], "label": torch.tensor([1, 2, 3])}
READ = "import sys, json, pathlib; folder = pathlib.Path(sys.argv[1]); "


def script(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "judge.py"
    path.write_text(text)
    return [sys.executable, str(path)]


def asked(command: list[str], **more: float) -> list[float]:
    return program.judged(command, X, COND, Numbers(), config.Program(name="mine", **more))


def test_the_program_sees_samples_and_prompts_and_its_numbers_come_back(tmp_path: Path) -> None:
    text = READ + (
        "rows = [[float(v) for v in line.split(',')] for line in (folder / 'samples.csv').read_text().split()]\n"
        "said = [json.loads(line) for line in (folder / 'prompts.jsonl').open()]\n"
        f"open({str(tmp_path / 'where')!r}, 'w').write(str(folder))\n"
        "for row, cond in zip(rows, said): print(sum(row) + len(cond['prompt']) + cond['label'])\n"
    )
    found = asked(script(tmp_path, text))
    assert found == pytest.approx([0.1 - 2 + 1 + 1, 7.5 + 11 + 2, 1 / 3 + 1 + 3])
    assert not Path((tmp_path / "where").read_text()).exists()


def test_numbers_have_the_digits_that_bring_them_back(tmp_path: Path) -> None:
    Numbers().write(X, tmp_path)
    rows = [[float(v) for v in line.split(",")] for line in (tmp_path / "samples.csv").read_text().split()]
    assert torch.equal(torch.tensor(rows), X)
    assert torch.equal(Numbers().read(json.dumps(X.tolist()), tmp_path), X)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("print(1)\nprint(2)", "gave 2 lines for 3 samples"),
        ("print(1)\nprint('nan')\nprint(2)", "gave nan on line 2; rewards must be finite"),
        ("print(1)\nprint('-inf')\nprint(2)", "gave -inf on line 2"),
        ("print(1)\nprint('two')\nprint(3)", "gave two on line 2; print a number"),
        ("import sys\nprint(1)\nsys.exit('no such\\nmodel')", "ended with status 1: model"),
        ("pass", "gave 0 lines"),
        ("while True: print('x' * 1000)", "said more than 4288 bytes"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "ended with status -11: it said nothing"),
    ],
)
def test_a_fault_of_the_program_is_one_clear_line(body: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(LimbeckError, match=f"the reward program mine .*{words}") as fault:
        asked(script(tmp_path, body))
    assert fault.value.code == 1


def test_a_late_program_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    child = f"import time, pathlib\ntime.sleep(3)\npathlib.Path({str(tmp_path / 'alive')!r}).touch()"
    body = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(60)"
    began = time.monotonic()
    with pytest.raises(LimbeckError, match="took longer than 1 s"):
        asked(script(tmp_path, body), timeout=1.0)
    assert time.monotonic() - began < 10
    time.sleep(3)
    assert not (tmp_path / "alive").exists()


def test_much_on_standard_error_does_no_harm(tmp_path: Path) -> None:
    body = "import sys\nfor _ in range(3000): print('noise' * 40, file=sys.stderr)\nprint(1, 2, 3, sep='\\n')"
    assert asked(script(tmp_path, body)) == [1.0, 2.0, 3.0]


def test_no_shell_sees_the_command(tmp_path: Path) -> None:
    outside.take([f"mine={sys.executable} -c 'import sys; print(len(sys.argv))' '; touch {tmp_path}/owned' $HOME"], [])
    command = outside.programs()["mine"]
    assert command[3:] == [f"; touch {tmp_path}/owned", "$HOME"]
    assert program.numbers(program.answer([*command, "x"], 10, 1000, "mine"), 1, "mine") == [4.0]
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("programs", "addresses", "words"),
    [
        (["mine"], [], "write it as --reward-program NAME=COMMAND"),
        (["=x"], [], "write it as"),
        (["mine= "], [], "write it as"),
        (["mine='x"], [], "check its quotes"),
        (["mine=/no/such/judge"], [], "no program /no/such/judge that can be run"),
        (["mine=true", "mine=false"], [], "given twice"),
        ([], ["lab=10.0.0.7:80"], "must be http://HOST:PORT"),
        ([], ["lab=https://host:80"], "must be http"),
        ([], ["lab=http://host"], "must be http"),
        ([], ["lab=http://user:pw@host:80"], "must be http"),
        ([], ["lab=http://host:99999"], "must be http"),
        ([], ["lab=http://host:80/path"], "must be http"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    programs: list[str], addresses: list[str], words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        outside.take(programs, addresses)


def test_commands_are_hidden_where_a_command_line_is_kept() -> None:
    words = ["run", "x", "--reward-program", "mine=judge --key k", "--reward-address=lab=http://h:1", "--seed", "1"]
    kept = ["run", "x", "--reward-program", "mine=…", "--reward-address=lab=…", "--seed", "1"]
    assert outside.hidden(words) == kept


RECIPE = """
extends: toy/words
name: judged
rewards:
  train: [{kind: program, name: mine}]
  held_out: [{kind: toy.letters}]
eval: []
steps: 4
batch: 8
checkpoint: {every: 2}
log: {every: 1}
"""
JUDGE = READ + "[print(sum(map(int, line.split(',')))) for line in (folder / 'samples.csv').open()]"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "judged.yaml"
    path.write_text(RECIPE)
    return path


def limbeck(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def test_a_run_and_its_resume_need_the_command_and_keep_nothing_of_it(
    recipe: Path, tmp_path: Path, python: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command = shlex.join(script(tmp_path, JUDGE))
    place = ("--out", tmp_path, "--name", "a", "--device", "cpu")
    assert limbeck("run", recipe, *place) == 2
    assert "add --reward-program mine=COMMAND" in capsys.readouterr().err
    assert limbeck("run", recipe, *place, "--reward-program", f"mein={command}") == 2
    assert not (tmp_path / "a").exists()
    python.run(["-m", "limbeck", "run", recipe, *place, "--reward-program", f"mine={command}"], check=True)
    for path in (tmp_path / "a").rglob("*"):
        assert path.is_dir() or b"judge.py" not in path.read_bytes(), path
    kept = json.loads((tmp_path / "a" / "environment.json").read_text())["command"]
    assert "--reward-program" in kept and "mine=…" in kept
    capsys.readouterr()
    assert limbeck("resume", tmp_path / "a", "--device", "cpu") == 2
    assert "also at resume: add --reward-program mine=COMMAND" in capsys.readouterr().err
    assert limbeck("resume", tmp_path / "a", "--device", "cpu", "--reward-program", f"mine={command}") == 0
    tensors = checkpoint.latest(tmp_path / "a" / "checkpoints").tensors
    assert any(key.startswith("player/student/") for key in tensors)


def test_a_failing_program_ends_the_run_with_one_line(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = shlex.join(script(tmp_path, "print('nan')"))
    assert limbeck("run", recipe, "--out", tmp_path, "--name", "b", "--reward-program", f"mine={command}") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "the reward program mine gave 1 lines for 8 samples" in err
    assert "the reward program mine" in (tmp_path / "b" / "error.txt").read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--reward-program", "mein=true"], "add --reward-program mine=COMMAND"),
        (["--reward-program", "mine=true", "--reward-program", "mini=true"], 'no reward of the recipe.*"mine"'),
        (["--reward-program", "mine=true", "--reward-address", "mine=http://h:1"], "no reward of the recipe"),
    ],
)
def test_names_must_be_those_of_the_recipe(
    flags: list[str], words: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert limbeck("run", recipe, "--out", tmp_path, "--name", "c", *flags) == 2
    err = capsys.readouterr().err
    assert re.search(words, err), err
    assert not (tmp_path / "c").exists()


def test_a_recipe_cannot_name_a_command_or_an_address(recipe: Path) -> None:
    for line in ("{kind: program, name: mine, command: judge}", "{kind: remote, address: 'http://h:1'}",
                 "{kind: remote, name: lab, host: h}", "{kind: program, name: 'a b=c'}"):  # fmt: skip
        with pytest.raises(BadInput, match="unknown key|must be a name"):
            recipes.load(str(recipe), [f"rewards.train=[{line}]"])


def test_a_server_elsewhere_is_reached_by_its_name(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []
    reward = Reward(lambda x, cond, *, t, gen: (seen.append(len(x)), x.double().sum(1))[1], "sums", "tokens")
    with Server(reward, port=0) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        sets = ("--set", "rewards.train=[{kind: remote, name: lab}]", "--out", tmp_path, "--device", "cpu")
        assert limbeck("run", recipe, *sets, "--name", "d") == 2
        assert "add --reward-address lab=http://HOST:PORT" in capsys.readouterr().err
        assert limbeck("run", recipe, *sets, "--name", "d", "--reward-address", f"lab={server.address}/") == 0
        assert sum(seen) >= 4 * 8
        assert server.address not in (tmp_path / "d" / "recipe.yaml").read_text()
        server.shutdown()
    outside.take([], [])
    assert job.open_run(tmp_path / "d", "cpu").step == 4  # samples and exports need no server


def test_pictures_come_as_png_files_in_the_order_of_the_rows(tmp_path: Path) -> None:
    data = {"name": "r", "job": "sample", "steps": 1, "batch": 1, "space": {"kind": "image.pictures"}}
    form = files(Build(recipes.of(data)))
    grey = torch.tensor([-1.0, 0.2, 1.0]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    text = READ + (
        "from PIL import Image\nfor path in sorted(folder.glob('*.png')): print(Image.open(path).getpixel((0, 0))[1])\n"
    )
    found = program.judged(script(tmp_path, text), grey, COND, form, config.Program(name="mine"))
    assert found == [0.0, 153.0, 255.0]
    assert torch.allclose(form.read("00001.png", _kept(form, grey, tmp_path)), grey[1], atol=0.01)


def _kept(form: Files, x: torch.Tensor, folder: Path) -> Path:
    form.write(x, folder)
    return folder
