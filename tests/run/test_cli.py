"""The command line: verbs and flags (frozen here), the cost of starting, exit statuses, one-line errors."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from limbeck import cli
from limbeck.core.run import recipe

OUTSIDE = ("--reward-program", "--reward-address")
FLAGS = {
    "run": {
        "RECIPE",
        "--set",
        "--out",
        "--name",
        "--prompts",
        "--seed",
        "--seeds",
        "--device",
        "--dry-run",
        "--processes",
        *OUTSIDE,
    },
    "list": {"--pieces"},
    "show": {"RECIPE", "--set"},
    "runs": {"--out"},
    "compare": {"RUN"},
    "resume": {"RUN", "--device", "--processes", *OUTSIDE},
    "sample": {"RUN", "--prompt", "--which", "--steps", "--guidance", "--seed", "--out", "--device"},
    "eval": {"RUN", "--device", *OUTSIDE},
    "export": {"RUN", "--format", "--out", "--device"},
    "view": {"RUN", "--port"},
    "verify": {"[METHOD]...", "--json"},
    "reward-server": {"NAME", "--set", "--host", "--port", "--device"},
    "assets build": {"NAME"},
    "doctor": set(),
    "plugins": set(),
    "new-plugin": {"NAME", "--out"},
}
TINY = ["--set", "steps=4", "--set", "batch=8", "--set", "checkpoint.every=2", "--set", "sample.every=4",
        "--set", "log.every=1", "--set", "eval.0.count=50", "--set", "space.count=20", "--device", "cpu"]  # fmt: skip


def limbeck(*arguments: str) -> int:
    """The exit status of a verb run in this process."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def said(capsys: pytest.CaptureFixture[str], status: int, *arguments: str) -> str:
    """The one line on stderr of a verb that must end in `status`."""
    assert limbeck(*arguments) == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("limbeck: ") and err.count("\n") == 1, (out, err)
    return err


def child(code: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, cwd=cwd
    )


def test_verbs_and_flags_are_frozen() -> None:
    found: dict[str, set[str]] = {}
    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        for verb, leaf in {f"{name} {k}": v for k, v in inner.items()}.items() if inner else [(name, command)]:
            parameters = [p for p in leaf.params if p.name != "help"]
            found[verb] = {p.opts[0] if p.param_type_name == "option" else str(p.metavar) for p in parameters}
    assert found == FLAGS


def test_reserved_input_names_are_the_flags_of_run() -> None:
    assert {flag.removeprefix("--") for flag in FLAGS["run"] if flag.startswith("--")} | {"help"} == recipe.FLAGS


def test_help_is_quick() -> None:
    """CPU seconds of the quickest of five (the wall clock of an idle core)."""
    seconds = []
    for _ in range(5):
        pid = os.posix_spawn(
            sys.executable, [sys.executable, "-m", "limbeck", "--help"], os.environ,
            file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
        )  # fmt: skip
        _, status, usage = os.wait4(pid, 0)
        assert status == 0
        seconds.append(usage.ru_utime + usage.ru_stime)
    assert min(seconds) < 0.4, seconds


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ([], 0), (["--help"], 0), (["--version"], 0), (["run", "--help"], 0), (["run", "toy/ring4", "--help"], 0),
        (["list"], 0), (["list", "--pieces"], 0), (["plugins"], 0), (["runs"], 0), (["show", "toy/ring4"], 0),
        (["run", "toy/ring4", "--set", "stages.0.losses.0.guidance=x"], 2), (["run", "toy/ring4", "--metod", "x"], 2),
        (["run", "toy/ring5"], 2), (["sample", "nowhere"], 2), (["new-plugin", "a b"], 2), (["verify", "nothing"], 2),
        (["rnu"], 2),
    ],
)  # fmt: skip
def test_no_torch_where_none_is_needed(arguments: list[str], status: int, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom limbeck.cli import main\ntry: main(sys.argv[1:])\n"
        "finally: assert not {'torch', 'numpy', 'diffusers', 'transformers'} & set(sys.modules), 'heavy import'"
    )
    done = child(code, *arguments, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rnu"], "Did you mean 'run'"),
        (["sample"], "Missing argument"),
        (["show", "toy/ring5"], 'did you mean "toy/ring4"'),
        (["run", "toy/ring4", "--metod", "sim"], 'did you mean "--method"'),
        (["run", "toy/ring4", "--sed", "3"], 'did you mean "--seed"'),
        (["run", "toy/ring4", "stray"], "has no input stray"),
        (["run", "toy/ring4", "--bogus", "3"], "has no input --bogus; `limbeck run"),
        (["run", "toy/ring4", "--set", "a.b=3"], "a (set on the command line): unknown key"),
        (["new-plugin", "fine", "--out", "/proc/1"], "choose another --out"),
        (["run", "toy/ring4", "--method"], "needs a value"),
        (["run", "toy/ring4", "--method", "simm"], 'did you mean "sim"'),
        (["run", "toy/ring4", "--set", "steps"], "--set key.path=value"),
        (["run", "toy/ring4", "--set", "batch=-1"], "batch (set on the command line)"),
        (["run", "toy/ring4", "--processes", "0"], "--processes"),
        (["sample", "nowhere"], "not a run folder"),
        (["resume", "nowhere"], "not a run folder"),
        (["view", "nowhere"], "not a run folder"),
        (["compare", "nowhere", "nowhere"], "not a run folder"),
        (["assets", "build", "fluemt"], "there is no asset"),
        (["verify", "no-such-method"], "there is no check"),
        (["export", "nowhere"], "Missing option"),
    ],
)
def test_errors_are_one_line_that_helps(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in said(capsys, 2, *arguments)


def test_a_used_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("")
    message = said(capsys, 2, "run", "toy/ring4", "--out", tmp_path, "--name", "a")
    assert "not empty" in message and "limbeck resume" in message


def test_help_of_a_recipe_shows_its_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    assert limbeck("run", "toy/ring4", "--help") == 0
    out = capsys.readouterr().out
    assert "--method" in out and "--dry-run" in out and "dmd2" in out


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from limbeck import verbs

    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verbs, "list_recipes", stop)
    assert limbeck("list") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from limbeck import verbs

    def lacks() -> None:
        raise ModuleNotFoundError("No module named 'cv2'", name="cv2")

    monkeypatch.setattr(verbs, "list_recipes", lacks)
    assert 'pip install "limbeck[video]"' in said(capsys, 2, "list")


def test_a_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m limbeck list --pieces | head -n 0"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny real run."""
    out = tmp_path_factory.mktemp("runs")
    assert limbeck("run", "toy/ring4", "--method", "swiftbrush", "--out", out, "--name", "a", "--seed", "3", *TINY) == 0
    return out


def test_run_leaves_everything(made: Path) -> None:
    folder = made / "a"
    for name in ("recipe.yaml", "environment.json", "metrics.jsonl", "log.txt", "eval.json", "report.html"):
        assert (folder / name).stat().st_size > 0
    assert list((folder / "samples").glob("step-*.png")) and list((folder / "checkpoints").iterdir())
    found = recipe.load(str(folder / "recipe.yaml"))
    assert (found.seed, found.steps, found.stages[0].losses[0].kind) == (3, 4, "swiftbrush")


def test_dry_run_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert limbeck("run", "toy/ring4", "--dry-run", "--out", tmp_path / "runs", *TINY) == 0
    assert "memory" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_the_verbs_of_a_run(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made / "a"
    assert limbeck("runs", "--out", made) == 0
    assert str(folder) in capsys.readouterr().out
    assert limbeck("sample", folder, "--prompt", "", "--seed", "1", "--device", "cpu", "--out", made / "s") == 0
    assert Path(capsys.readouterr().out.strip()).is_file()
    assert limbeck("eval", folder, "--device", "cpu") == 0
    assert "energy distance" in capsys.readouterr().out
    assert limbeck("export", folder, "--format", "safetensors", "--device", "cpu") == 0
    assert Path(capsys.readouterr().out.strip()).is_file()


def test_resume_and_compare(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert limbeck("resume", made / "a", "--device", "cpu") == 0
    assert (
        limbeck("run", made / "a" / "recipe.yaml", "--out", made, "--name", "b", "--set", "batch=4", "--device", "cpu")
        == 0
    )
    capsys.readouterr()
    assert limbeck("compare", made / "a", made / "b") == 0
    out = capsys.readouterr().out
    assert "batch" in out and "loss/critic" in out and "energy distance" in out


def test_bad_choices_about_a_run(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "student or teacher" in said(capsys, 2, "sample", made / "a", "--prompt", "", "--which", "teacer")
    assert "must be one of safetensors" in said(
        capsys, 2, "export", made / "a", "--format", "safetensor", "--device", "cpu"
    )
    assert "must be one of" in said(capsys, 2, "export", made / "a", "--format", "../../x/y", "--device", "cpu")
    assert not (made / "x").exists()
    assert "sample prompts" in said(capsys, 2, "sample", made / "a", "--device", "cpu")
    for number in ("nan", "inf"):
        assert "finite" in said(capsys, 2, "sample", made / "a", "--prompt", "", "--guidance", number)


@pytest.mark.parametrize("verb", [["sample", "--prompt", ""], ["export", "--format", "safetensors"]])
def test_a_place_that_cannot_be_written_is_one_line(
    verb: list[str], made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file stands where the folder should be."""
    (made / "file").write_text("")
    words = said(capsys, 1, verb[0], made / "a", *verb[1:], "--out", made / "file" / "x" / "y", "--device", "cpu")
    assert str(made / "file") in words and "check the path" in words


def test_an_opened_run_knows_its_step(made: Path) -> None:
    """Exports tell how long the weights were trained, also of a run that was stopped early."""
    from limbeck.core.run import job

    shutil.copytree(made / "a", made / "stopped")
    shutil.rmtree(made / "stopped" / "checkpoints" / "match-00000004")
    assert job.open_run(made / "a", "cpu").step == 4
    assert job.open_run(made / "stopped", "cpu").step == 2


def test_verify_prints_a_line_a_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert limbeck("verify", "diffusion.jumps", "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows and all(row["passed"] and row["measured"] <= row["bound"] and row["seconds"] >= 0 for row in rows)
    assert limbeck("verify", "diffusion.jumps") == 0
    assert "pass" in capsys.readouterr().out


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    status = limbeck("doctor")
    out = capsys.readouterr().out
    assert status == (1 if "BAD" in out else 0)
    assert "python" in out and "torch" in out and "extra video" in out and "disk" in out


def test_a_device_is_tried_before_it_is_used() -> None:
    """A name or an index that is not there is refused on machines with a GPU as well."""
    from limbeck.core.run.distributed import _works

    assert _works("cpu") and not _works("gpu") and not _works("cuda:99")
