"""The report: complete in itself, everything escaped, bounded in size, written from whatever a folder holds."""

import html.parser
import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from limbeck.core.run import plot, report

EVIL = "<script>alert(1)</script>\"'&"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "evil<i>"
    (run / "samples").mkdir(parents=True)
    quoted = json.dumps(EVIL)
    (run / "recipe.yaml").write_text(f"name: toy/x\nabout: {quoted}\npaper: {quoted}\nsteps: 20\nbatch: 4\n")
    (run / "environment.json").write_text(json.dumps({"python": EVIL, "versions": {EVIL: EVIL}, "device": EVIL}))
    rows = [{"stage": "a", "step": i, "loss/student": 1.0 / i, EVIL: i, "time": i} for i in range(1, 61)]
    rows += [{"stage": "b", "step": i, "loss/student": 0.1, "bad": float("nan"), "text": "x"} for i in range(1, 5)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"half')
    (run / "eval.json").write_text(json.dumps({EVIL: [{EVIL: EVIL, "n": 1.25}, {"n": 2, "only here": None}]}))
    (run / "error.txt").write_text(EVIL)
    for step in (10, 20):
        Image.new("RGB", (64, 64), "red").save(run / "samples" / f"step-{step:08d}.png")
    return run


class Parts(html.parser.HTMLParser):
    """Tags, their attributes and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_everything_is_there_and_escaped(folder: Path) -> None:
    page = report.write(folder).read_text()
    found = Parts(page)
    names = [tag for tag, _ in found.tags]
    assert "script" not in names and "i" not in names and "link" not in names and "iframe" not in names
    assert found.text.count(EVIL) >= 8
    for title in ("This run stopped", "Samples", "Evaluation", "Curves", "Repeat it", "Recipe", "Environment"):
        assert title in found.text
    assert names.count("img") == 2 and "svg" in names


def test_nothing_is_loaded_from_elsewhere(folder: Path) -> None:
    page = report.write(folder).read_text()
    for _, attributes in Parts(page).tags:
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("src", "href", "data", "srcset", "poster", "action"):
                assert str(value).startswith("data:")
    assert not re.search(r"url\(|@import|https?://", page.split("<body>")[0])
    assert "default-src 'none'" in page


def test_curves_join_stages_and_skip_what_is_no_number(folder: Path) -> None:
    found, starts = report.series(report.rows_of(folder))
    names = [one.name for one in found]
    assert names[0] == "loss/student" and "bad" not in names and "time" not in names and "text" not in names
    assert starts == [60.0] and found[0].xs[-1] == 64.0 and found[0].xs == sorted(found[0].xs)


def test_an_empty_folder_still_gives_a_page(tmp_path: Path) -> None:
    page = report.write(tmp_path).read_text()
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")


@pytest.mark.parametrize("name", ["recipe.yaml", "environment.json", "metrics.jsonl", "eval.json"])
@pytest.mark.parametrize("raw", [b"\xff\xfe", b"[1, 2", b"[[1]]\n", b"3\n", b"null\n", b'{"a": {"b": [1]}}\n'])
def test_damaged_files_do_not_stop_it(folder: Path, name: str, raw: bytes) -> None:
    (folder / name).write_bytes(raw)
    assert report.write(folder).stat().st_size > 1000


def test_broken_pictures_are_left_out(folder: Path) -> None:
    (folder / "samples" / "step-00000030.png").write_bytes(b"not a picture")
    assert "Samples" in report.write(folder).read_text()


def test_media_stay_within_the_budget(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(100, 112):
        noise = Image.frombytes("RGB", (400, 400), os.urandom(400 * 400 * 3))
        noise.save(folder / "samples" / f"step-{step:08d}.png")
    monkeypatch.setattr(report, "MAX_MEDIA", 2**19)
    page = report.write(folder).read_text()
    assert len(page) < 2**19 + 10**5
    assert 1 <= page.count("<img") <= report.MAX_SHEETS


@pytest.mark.parametrize(
    "ys", [[1.0], [0.0, 0.0], [-1e30, 1e30], [1e-30, 1.0], [5.0] * 100, [1e-9] * 3, list(range(1000))]
)
def test_any_numbers_can_be_drawn(ys: list[float]) -> None:
    text = plot.panel(plot.Series("x", [float(i) for i in range(len(ys))], [float(y) for y in ys]))
    assert "nan" not in text and "inf" not in text and len(text) < 40_000


def test_ticks_are_round_and_inside() -> None:
    for low, high in ((0.0, 1.0), (-3.2, 7.7), (1e-5, 2e-5), (0.0, 123456.0)):
        ticks = plot._ticks(low, high, 4)
        assert 2 <= len(ticks) <= 6 and all(low - 1e-12 <= tick <= high + 1e-12 for tick in ticks)
