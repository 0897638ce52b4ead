"""`limbeck view` of clips that stand side by side: what the folder tells, and how the page plays them."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import chromium
import pytest
import torch

from limbeck.core import film
from limbeck.core.run import view

pytest.importorskip("av")
PROMPTS = ["<b>dog</b> face", "penguin"]
SIZE, FRAMES = 32, 8


def clip(colour: tuple[float, float, float], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    film.write(torch.tensor(colour)[None, :, None, None].expand(FRAMES, 3, SIZE, SIZE), path, 6.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with clips of two prompts: a red teacher, a student that is blue before and green after its training."""
    made = {"teacher": (1.0, -1, -1), "step-00000000": (-1.0, -1, 1), "step-00000020": (-1.0, 1, -1)}
    for name, colour in made.items():
        files = {f"{i:03d}-x.mp4": {"prompt": prompt} for i, prompt in enumerate(PROMPTS)}
        for file in files:
            clip(colour, tmp_path / "samples" / name / file)
        told = {"title": f"by {name}", "files": files}
        (tmp_path / "samples" / name / "clips.json").write_text(json.dumps(told))
    (tmp_path / "recipe.yaml").write_text("name: toy/clips\n")
    (tmp_path / "eval.json").write_text(json.dumps({"m": [{"generator": "teacher", "steps": 30, "flicker": 0.96}]}))
    return tmp_path


def test_clips_of_one_name_stand_side_by_side(folder: Path) -> None:
    sides = [file for file in view.inventory(folder)["files"] if file["kind"] == "side"]
    assert [(file["path"].split("/")[1], file["step"]) for file in sides[::2]] == [
        ("step-00000000", 0), ("step-00000020", 20), ("teacher", None),
    ]  # fmt: skip
    assert [file["facts"] for file in sides[:2]] == [
        [["title", "by step-00000000"], ["prompt", prompt]] for prompt in PROMPTS
    ]


@pytest.mark.parametrize("files", [{"000-x.mp4": 3, "": {}}, ["000-x.mp4"], "000-x.mp4", 7, None])
def test_whatever_a_file_of_facts_says(folder: Path, files: Any) -> None:
    """Clips without a prompt are clips like others."""
    (folder / "samples/teacher/clips.json").write_text(json.dumps({"title": "x", "files": files}))
    kinds = {file["path"]: file["kind"] for file in view.inventory(folder)["files"]}
    assert kinds["samples/teacher/000-x.mp4"] == "clip" and kinds["samples/step-00000020/000-x.mp4"] == "side"


@pytest.mark.skipif(chromium.found() is None, reason="no Chromium here; name one in $CHROMIUM")
def test_the_page_plays_them_and_a_slider_leads_through_the_steps(folder: Path, tmp_path: Path) -> None:
    """Muted, looping, together; each under its title and prompt; the numbers beside them; nothing from elsewhere."""
    all_of = "[...document.querySelectorAll('#siderow {}')]"
    texts, videos = f"{all_of}.map(e => e.textContent)", all_of.format("video")
    colours = f"""{videos}.map(video => {{
      const pen = Object.assign(document.createElement('canvas'), {{width: 1, height: 1}}).getContext('2d');
      pen.drawImage(video, 0, 0, 1, 1);
      const pixel = [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
      return 'RGB'[pixel.indexOf(Math.max(...pixel))] }}).join('')"""
    playing = f"""{videos}.length == 4 && {videos}.every(v =>
      v.muted && v.loop && !v.paused && v.currentTime > 0 && v.videoWidth == {SIZE})"""
    apart = f"(times => Math.max(...times) - Math.min(...times))({videos}.map(v => v.currentTime))"
    label = "document.querySelector('#sidelabel').textContent"
    slide = "(s => { s.value = 0; s.dispatchEvent(new Event('input')) })(document.querySelector('#sidestep'))"
    with view.Server(folder) as server, chromium.Browser(str(chromium.found()), tmp_path / "profile") as page:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        page.open(server.address)
        page.wait(playing)
        assert page.value(texts.format("p")) == PROMPTS
        assert page.value(texts.format("figcaption")) == ["by teacher", "by step-00000020"] * 2
        assert page.value(colours) == "RGRG" and page.value(label) == "step 20"
        page.value(slide)
        page.wait(playing)
        assert page.value(texts.format("figcaption")) == ["by teacher", "by step-00000000"] * 2
        assert page.value(colours) == "RBRB" and page.value(label) == "step 0"
        page.value("document.querySelector('#siderow video').currentTime = 1; "
                   "document.querySelector('#sidetogether').click()")  # fmt: skip
        page.wait(f"{playing} && {apart} < 0.1")
        assert page.value("document.querySelector('#tables td').textContent") == "teacher"
        assert page.value("document.querySelector('#clips').hidden") and page.problems == []
        (Path(os.environ.get("SCREENSHOTS", tmp_path)) / "view-sides.png").write_bytes(page.picture())
        server.shutdown()
