"""A corpus of hostile and broken recipe files: nothing runs or hangs, each ends in one clear line and status 2."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.core.run import recipe, yamlio
from limbeck.core.run.errors import BadInput

OK = "job: sample\nsteps: 10\nbatch: 4\n"
RUN = "import pathlib; pathlib.Path('CANARY').write_text('x')"


def nested(depth: int) -> str:
    return OK + "sample: " + "[" * depth + "]" * depth + "\n"


def bomb(levels: int, width: int) -> str:
    rows = ["l0: &l0 [a, a, a]"]
    for i in range(1, levels):
        rows.append(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * width)}]")
    return OK + "\n".join(rows) + "\n"


TEXTS: dict[str, str] = {
    "python object": OK + f"teacher: !!python/object/apply:os.system ['touch CANARY']\n# {RUN}\n",
    "python name": OK + "teacher: !!python/name:canary_module.run\n",
    "python module": OK + "teacher: !!python/module:canary_module\n",
    "python object new": OK + "about: !!python/object/new:canary_module.Run {}\n",
    "python tuple": OK + "sample: {prompts: !!python/tuple [a]}\n",
    "python eval in text key": OK + "\"__import__('canary_module')\": 1\n",
    "local tag": OK + "about: !canary x\n",
    "verbatim tag": OK + "about: !<tag:yaml.org,2002:python/name:canary_module.run> x\n",
    "tag directive": "%TAG ! tag:yaml.org,2002:python/\n---\nabout: !name:canary_module.run x\n",
    "bang alone": OK + "about: ! x\n",
    "binary tag": OK + "about: !!binary aGVsbG8=\n",
    "set tag": OK + "about: !!set {a, b}\n",
    "tag on top": "!!python/object/apply:os.system ['touch CANARY']\n",
    "alias bomb": bomb(9, 9),
    "alias bomb deep": bomb(30, 2),
    "many aliases": OK + "about: &a x\nsample: {prompts: [" + ", ".join(["*a"] * 500) + "]}\n",
    "alias to itself": OK + "sample: &a {prompts: [*a]}\n",
    "alias undefined": OK + "about: *nothing\n",
    "anchor twice in itself": OK + "sample: &a [&a [*a]]\n",
    "merge key": OK + "log: &a {every: 3}\nsample: {<<: *a}\n",
    "merge list": OK + "log: {<<: [{every: 3}]}\n",
    "duplicate key": OK + "steps: 20\n",
    "duplicate nested": OK + "log: {every: 3, every: 4}\n",
    "duplicate quoted": OK + '"steps": 20\n',
    "unknown key": OK + "stepps: 3\n",
    "unknown nested": OK + "checkpoint: {evry: 3}\n",
    "dunder key": OK + "__class__: {}\n",
    "wrong type steps": OK.replace("10", "ten"),
    "float steps": OK.replace("10", "10.5"),
    "bool steps": OK.replace("10", "true"),
    "list steps": OK.replace("10", "[10]"),
    "negative steps": OK.replace("10", "-10"),
    "huge int": OK.replace("10", "9" * 5000),
    "int past 64 bits": OK.replace("10", "9223372036854775808000"),
    "inf": OK + "expect: {minutes: .inf, memory_gb: 1}\n",
    "nan": OK + "expect: {minutes: .nan, memory_gb: 1}\n",
    "overflowing float": OK + "expect: {minutes: 1e999, memory_gb: 1}\n",
    "timestamp": OK.replace("10", "2020-01-01"),
    "sexagesimal": OK.replace("10", "1:30"),
    "octal": OK.replace("10", "0o17"),
    "yes for a bool": OK + "distributed: {shard: yes}\n",
    "extends up and out": OK + "extends: ../../../etc/passwd.yaml\n",
    "extends absolute": OK + "extends: /etc/passwd.yaml\n",
    "extends home": OK + "extends: ~/secret.yaml\n",
    "extends url": OK + "extends: https://example.org/r.yaml\n",
    "extends itself": OK + "extends: r.yaml\n",
    "extends a list": OK + "extends: [a, b]\n",
    "extends a number": OK + "extends: 3\n",
    "extends nothing": OK + "extends: ''\n",
    "extends a name that is not there": OK + "extends: image/nothing\n",
    "extends NUL escape": OK + 'extends: "a\\0b.yaml"\n',
    "extends very long": OK + "extends: " + "a" * 5000 + ".yaml\n",
    "input sets a path": OK + "inputs: {x: {set: ../../etc}}\n",
    "input sets dunder": OK + "inputs: {x: {set: .__class__.}}\n",
    "input unknown key": OK + "inputs: {x: {set: steps, run: rm}}\n",
    "name with a path": OK + "name: ../../tmp/x\n",
    "name absolute": OK + "name: /tmp/x\n",
    "name empty": OK + "name: ''\n",
    "piece without kind": OK + "teacher: {model: x}\n",
    "piece is text": OK + "teacher: os.system\n",
    "piece as import path": OK + "teacher: {kind: 'canary_module:run'}\n",
    "piece target smuggled": OK + "teacher: {kind: x, target: 'canary_module:run'}\n",
    "kind is a list": OK + "teacher: {kind: [x]}\n",
    "stages a mapping": OK + "stages: {a: 1}\n",
    "stage without losses": OK + "stages: [{name: a, losses: []}]\n",
    "job unknown": OK.replace("sample", "shell"),
    "command smuggled": OK + "command: touch CANARY\n",
    "deep nesting": nested(100),
    "very deep nesting": nested(20_000),
    "deep block nesting": OK + "\n".join(" " * i + "a:" for i in range(300)) + "\n",
    "list at top": "- a\n- b\n",
    "text at top": "hello\n",
    "number at top": "3\n",
    "null at top": "null\n",
    "empty": "",
    "only comments": "# nothing\n\n",
    "empty mapping": "{}\n",
    "two documents": OK + "---\n" + OK,
    "document end": OK + "...\nmore: 1\n",
    "non-string key int": OK + "3: x\n",
    "non-string key null": OK + "~: x\n",
    "non-string key bool": OK + "true: x\n",
    "non-string key list": OK + "? [a, b]\n: x\n",
    "non-string key map": OK + "? {a: b}\n: x\n",
    "non-string key float": OK + "1e3: x\n",
    "unclosed quote": OK + 'about: "x\n',
    "unclosed flow": OK + "log: {every: 3\n",
    "bad indent": OK + "log:\n  every: 3\n every: 4\n",
    "tabs": OK + "log:\n\tevery: 3\n",
    "colon soup": OK + ": : :\n",
    "percent": OK + "about: %x\n",
    "at sign": OK + "@x: 1\n",
    "bidi override": OK + "about: 'abc\u202edef'\n",
    "homoglyph key": OK + "s\u0435ed: 1\n",
    "zero-width key": OK + "se\u200bed: 1\n",
    "control character": OK + "about: a\x07b\n",
    "escape sequence key": OK + '"\\x1b[31mred": 1\n',
    "newlines in a key": OK + '"a\\nb": 1\n',
    "template": OK + "steps_: {{ config.__class__ }}\n",
    "environment variable": OK.replace("10", "${HOME}"),
    "long line": OK + "x" * 200_000 + "\n",
    "many keys": OK + "".join(f"k{i}: 1\n" for i in range(9_000)),
    "many prompts": OK + "sample: {prompts: [" + "a, " * 12_000 + "a]}\n",
}
RAW: dict[str, bytes] = {
    "NUL bytes": OK.encode() + b"about: a\0b\n",
    "all NUL": b"\0" * 4096,
    "invalid UTF-8": OK.encode() + b"about: \xff\xfe\n",
    "truncated UTF-8": OK.encode() + b"about: \xe2\x82",
    "surrogate": OK.encode() + b"about: \xed\xa0\x80\n",
    "UTF-16": OK.encode("utf-16"),
    "UTF-32": OK.encode("utf-32"),
    "a zip": b"PK\x03\x04" + bytes(range(256)) * 8,
    "a pickle": b"\x80\x04\x95\x1e\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
    "random bytes": bytes((i * 7919 + 13) % 256 for i in range(5000)),
    "50 MB": OK.encode() + b"# " + b"x" * 50 * 2**20,
    "50 MB of keys": b"".join(b"key%d: 1\n" % i for i in range(100_000)) * 42,
}


def _loop(path: Path) -> None:
    path.symlink_to(path.with_name("other.yaml"))
    path.with_name("other.yaml").symlink_to(path)


PLACES: dict[str, Callable[[Path], object]] = {
    "folder": lambda path: path.mkdir(),
    "fifo": lambda path: os.mkfifo(path),
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "null device": lambda path: path.symlink_to("/dev/null"),
    "symlink loop": _loop,
    "dangling symlink": lambda path: path.symlink_to("nowhere.yaml"),
    "absent": lambda path: None,
}
CASES: dict[str, Callable[[Path], object]] = {
    **{name: (lambda path, text=text: path.write_text(text, errors="surrogatepass")) for name, text in TEXTS.items()},
    **{name: (lambda path, raw=raw: path.write_bytes(raw)) for name, raw in RAW.items()},
    **PLACES,
}
ODD_NAMES = [
    "",
    " ",
    "a\0b.yaml",
    "x" * 5000 + ".yaml",
    "../" * 50 + "etc/passwd",
    "image/../../secret",
    "%s%n",
    "\u202e",
    "-",
]
REMEDY = (
    "write", "name ", "must be", "must match", "remove", "delete", "save", "fix", "use ", "check", "shows them",
    "rename", "the keys here", "copy it", "add ", "smaller", "move data", "flatten", "must have",
)  # fmt: skip


def test_the_corpus_is_large() -> None:
    assert len(CASES) >= 60


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", CASES)
def test_refused_with_one_clear_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "canary_module.py").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "r.yaml"
    CASES[name](path)
    start = time.process_time()
    with pytest.raises(BadInput) as caught:
        recipe.load(str(path))
    assert time.process_time() - start < 2.0
    _judge(str(caught.value), str(path))
    assert caught.value.code == 2
    assert "canary_module" not in sys.modules
    assert not (tmp_path / "CANARY").exists()


def _judge(message: str, path: str) -> None:
    assert len(message) < 700 and "\n" not in message and message.isprintable(), message
    assert path in message, f"no file: {message}"
    assert any(word in message for word in REMEDY), f"no remedy: {message}"
    assert "pydantic" not in message and "Traceback" not in message


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_are_refused(name: str) -> None:
    with pytest.raises(BadInput) as caught:
        recipe.load(name)
    assert str(caught.value).isprintable()


def test_a_fault_in_the_text_names_its_line(tmp_path: Path) -> None:
    for name, line in {
        "python name": 4,
        "duplicate key": 4,
        "merge key": 5,
        "unclosed quote": 4,
        "bidi override": 4,
    }.items():
        CASES[name](tmp_path / "r.yaml")
        with pytest.raises(BadInput, match=f"r.yaml:{line}:"):
            recipe.load(str(tmp_path / "r.yaml"))


def test_symlink_out_of_the_folder_is_no_base(tmp_path: Path) -> None:
    inside, secret = tmp_path / "in", tmp_path / "secret.yaml"
    inside.mkdir()
    secret.write_text(OK)
    (inside / "base.yaml").symlink_to(secret)
    (inside / "r.yaml").write_text("extends: base.yaml\n")
    with pytest.raises(BadInput, match="outside"):
        recipe.load(str(inside / "r.yaml"))


def test_limits_are_not_reached_by_good_recipes() -> None:
    prompts = ", ".join(f"a prompt number {i}" for i in range(2000))
    text = OK + f"sample: {{prompts: [{prompts}]}}\nlog: &a {{every: 3}}\n"
    assert len(yamlio.parse(text, "x").data["sample"]["prompts"]) == 2000


def test_the_command_prints_no_traceback(tmp_path: Path) -> None:
    """A few of the corpus through the real command: status 2, one line on stderr, nothing on stdout, no torch."""
    code = (
        "import sys; from limbeck.cli import main\ntry: main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    )
    for name in ("python object", "alias bomb", "invalid UTF-8", "fifo", "50 MB", "unknown key"):
        path = tmp_path / f"{name.replace(' ', '-')}.yaml"
        CASES[name](path)
        for verb in ("run", "show"):
            done = subprocess.run(
                [sys.executable, "-c", code, verb, str(path)], capture_output=True, text=True, timeout=60
            )
            assert (done.returncode, done.stdout) == (2, ""), done.stderr
            assert done.stderr.startswith("limbeck: ") and done.stderr.count("\n") == 1, done.stderr
