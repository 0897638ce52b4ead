"""`limbeck view`: what it shows of a folder, that it hands out nothing else and changes nothing; its page."""

import hashlib
import http.client
import io
import json
import os
import re
import shutil
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import chromium
import pytest
from PIL import Image

from limbeck import cli
from limbeck.core.run import view

EVIL = "<img src=x onerror=alert(1)>\"'&"
FIELDS = ["x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity", "scale_0", "scale_1", "scale_2",
          "rot_0", "rot_1", "rot_2", "rot_3"]  # fmt: skip
VENDOR = Path(view.__file__).parent / "vendor"


def png(colour: str, size: int = 8) -> bytes:
    box = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(box, "PNG")
    return box.getvalue()


def glb() -> bytes:
    """A red square that stands at z = 0 and faces +z, textured."""
    places = struct.pack("<12f", -1, 0, 0, 1, 0, 0, 1, 2, 0, -1, 2, 0)
    uv, corners, texture = struct.pack("<8f", 0, 1, 1, 1, 1, 0, 0, 0), struct.pack("<6H", 0, 1, 2, 0, 2, 3), png("red")
    texture += b"\0" * (-len(texture) % 4)
    parts, at, views = [places, uv, corners, texture], 0, []
    for part in parts:
        views.append({"buffer": 0, "byteOffset": at, "byteLength": len(part)})
        at += len(part)
    kinds = [(5126, 4, "VEC3"), (5126, 4, "VEC2"), (5123, 6, "SCALAR")]
    accessors = [{"bufferView": i, "componentType": c, "count": n, "type": t} for i, (c, n, t) in enumerate(kinds)]
    accessors[0] |= {"min": [-1, 0, 0], "max": [1, 2, 0]}
    primitive = {"attributes": {"POSITION": 0, "TEXCOORD_0": 1}, "indices": 2, "material": 0}
    scene = {
        "asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [primitive]}], "accessors": accessors, "bufferViews": views,
        "materials": [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}, "metallicFactor": 0}}],
        "textures": [{"source": 0}], "images": [{"bufferView": 3, "mimeType": "image/png"}],
        "buffers": [{"byteLength": at}],
    }  # fmt: skip
    text = json.dumps(scene).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", at, b"BIN\0") + b"".join(parts)
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


def splats() -> bytes:
    """A row of green splats from x = -1 to 1, a blue one above its right end (y up)."""
    head = "\n".join(["ply", "format binary_little_endian 1.0", "element vertex 12",
                      *(f"property float {name}" for name in FIELDS), "end_header", ""])  # fmt: skip
    shape = [6.0, -2.0, -2.0, -2.0, 1.0, 0.0, 0.0, 0.0]
    rows = [[i / 5 - 1, 0.0, 0.0, -1.7, 1.7, -1.7, *shape] for i in range(11)] + [[1, 1, 0, -1.7, -1.7, 1.7, *shape]]
    return head.encode() + b"".join(struct.pack("<14f", *row) for row in rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "run<b>"
    for name in ("samples", "exports/glb", "exports/clips", "exports/splat-ply", "checkpoints/a-00000010", ".hidden"):
        (run / name).mkdir(parents=True)
    (run / "recipe.yaml").write_text(f"name: toy/x\nabout: {json.dumps(EVIL)}\nsteps: 20\nbatch: 4\n")
    (run / "metrics.jsonl").write_text('{"stage": "a", "step": 20, "loss/student": 0.25, "time": 3}\n{"half')
    (run / "eval.json").write_text(json.dumps({"m": [{"what": EVIL, "PSNR": 25.5}]}))
    for step, colour in ((0, "white"), (20, "red")):
        (run / "samples" / f"step-{step:08d}.png").write_bytes(png(colour))
    (run / "exports/glb/asset.glb").write_bytes(glb())
    (run / "exports/glb/asset.json").write_text(json.dumps({"faces": 2, "size": {"x": 1.5}, "prompt": EVIL}))
    (run / "exports/splat-ply/asset.ply").write_bytes(splats())
    (run / "exports/mesh.ply").write_text("ply\nformat ascii 1.0\nend_header\n")
    Image.new("RGB", (8, 8), "blue").save(run / "exports/clips/asset-depth.gif")
    (run / "exports/clips/asset.json").write_text(json.dumps({"files": ["asset-depth.gif"], "fps": 24}))
    (run / "page.html").write_text("<script>alert(1)</script>")
    (run / "checkpoints/a-00000010/state.safetensors").write_bytes(b"weights")
    (run / ".hidden/secret.png").write_bytes(png("red"))
    (tmp_path / "outside.png").write_bytes(png("red"))
    (run / "samples/link.png").symlink_to(tmp_path / "outside.png")
    (run / "linked").symlink_to(tmp_path)
    return run


@pytest.fixture
def server(folder: Path) -> Iterator[view.Server]:
    with view.Server(folder) as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield running
        running.shutdown()


def ask(
    server: view.Server, path: str, method: str = "GET", host: str = "127.0.0.1", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the very path, as typed."""
    link = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    link.putrequest(method, path, skip_host=True)
    for name, value in {"Host": host, **headers}.items():
        link.putheader(name, value)
    link.endheaders()
    answer = link.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    link.close()
    return found


def test_what_a_folder_holds(folder: Path) -> None:
    found = view.inventory(folder)
    files = {file["path"]: file for file in found["files"]}
    kinds = {path: file["kind"] for path, file in files.items() if file["kind"] != "file"}
    assert kinds == {
        "exports/clips/asset-depth.gif": "clip", "exports/glb/asset.glb": "model",
        "exports/splat-ply/asset.ply": "splat", "samples/step-00000000.png": "step",
        "samples/step-00000020.png": "step",
    }  # fmt: skip
    assert files["exports/glb/asset.glb"]["facts"] == [["faces", "2"], ["size · x", "1.5"], ["prompt", EVIL]]
    assert files["exports/clips/asset-depth.gif"]["facts"] == [["fps", "24"]]  # listed in a JSON of another stem
    assert files["samples/step-00000020.png"]["step"] == 20 and files["exports/mesh.ply"]["kind"] == "file"
    assert ["loss/student", "0.25"] in found["numbers"] and ["step", "20"] in found["numbers"]
    assert found["tables"] == [{"name": "m", "columns": ["what", "PSNR"], "rows": [[EVIL, "25.5"]]}]
    assert (found["name"], found["about"], found["error"], found["more"]) == ("toy/x", EVIL, "", False)


def test_many_files_are_cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "MOST_FILES", 4)
    found = view.inventory(folder)
    assert len(found["files"]) == 4 and found["more"]


def test_a_run_that_goes_on_shows_what_is_new(server: view.Server, folder: Path) -> None:
    (folder / "samples" / "step-00000040.png").write_bytes(png("red"))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('\n{"stage": "a", "step": 40}\n')
    found = json.loads(ask(server, "/run.json")[2])
    assert 40 in [file["step"] for file in found["files"]] and ["step", "40"] in found["numbers"]
    assert "step 40" in ask(server, "/report.html")[2].decode()


def test_pages_and_files_are_served_and_nothing_is_changed(server: view.Server, folder: Path) -> None:
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
    status, headers, body = ask(server, "/")
    assert status == 200 and b"/view.js" in body and "default-src 'none'" in headers["Content-Security-Policy"]
    for name in ("/view.js", "/vendor/model-viewer.min.js", "/vendor/gsplat.js"):
        status, headers, body = ask(server, name)
        assert status == 200 and headers["Content-Type"] == "text/javascript" and len(body) > 1000
    assert ask(server, "/report.html")[2].startswith(b"<!doctype html>")
    status, headers, body = ask(server, "/files/exports/glb/asset.glb?v=1")
    assert (status, headers["Content-Type"], body) == (200, "model/gltf-binary", glb())
    assert headers["X-Content-Type-Options"] == "nosniff" and "sandbox" in headers["Content-Security-Policy"]
    status, headers, body = ask(server, "/files/exports/glb/asset.glb", "HEAD")
    assert (status, headers["Content-Length"], body) == (200, str(len(glb())), b"")
    assert {path: path.lstat().st_mtime_ns for path in folder.rglob("*")} == before


def test_what_no_viewer_shows_is_only_handed_out(server: view.Server) -> None:
    status, headers, _ = ask(server, "/files/page.html")
    assert (status, headers["Content-Type"]) == (200, "application/octet-stream")
    assert headers["Content-Disposition"] == "attachment"


@pytest.mark.parametrize(
    ("asked", "status", "part"),
    [("bytes=2-4", 206, slice(2, 5)), ("bytes=5-", 206, slice(5, None)), ("bytes=-3", 206, slice(-3, None)),
     ("bytes=0-99999999", 200, slice(None)), ("bytes=99999999-", 416, slice(0, 0)), ("bytes=4-2", 416, slice(0, 0)),
     ("bytes=-0", 416, slice(0, 0)), ("bytes=-", 200, slice(None)), ("lines=1-2", 200, slice(None))],
)  # fmt: skip
def test_parts_of_a_file(server: view.Server, asked: str, status: int, part: slice) -> None:
    found, headers, body = ask(server, "/files/samples/step-00000000.png", Range=asked)
    whole = png("white")
    assert (found, body) == (status, whole[part])
    if status == 206:
        first, last, of = map(int, re.findall(r"\d+", headers["Content-Range"]))
        assert whole[first : last + 1] == body and of == len(whole)


@pytest.mark.parametrize(
    "path",
    ["/files/../outside.png", "/files/%2e%2e/outside.png", "/files/samples/../../outside.png", "/files//etc/hostname",
     "/files/samples/link.png", "/files/linked/outside.png", "/files/.hidden/secret.png", "/files/", "/files/samples",
     "/files/samples/%00.png", "/files/samples/%ff.png", "/files/nothing", "/vendor/../view.py", "/view.py", "/..",
     "/files/samples/../samples/step-00000000.png", "/files/checkpoints/../../outside.png", "//etc/hostname"],
)  # fmt: skip
def test_nothing_else_is_handed_out(server: view.Server, path: str) -> None:
    status, _, body = ask(server, path)
    assert status in (400, 404) and len(body) < 100


def test_only_questions_from_this_machines_pages(server: view.Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert ask(server, "/", host="evil.example:80")[0] == 403
    assert ask(server, "/", host="")[0] == 403 and ask(server, "/", host="[")[0] == 400
    assert ask(server, "/", host=f"localhost:{server.server_port}")[0] == 200
    assert ask(server, "/run.json", "POST")[0] == 501 and ask(server, "/files/page.html", "DELETE")[0] == 501


def test_connections_are_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "MOST_LINKS", 2)
    with view.Server(folder) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        held = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(2)]
        for link in held:  # each answered once, and kept open
            link.sendall(b"GET /view.js HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert link.recv(12) == b"HTTP/1.1 200"
        with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
            ask(server, "/")
        for link in held:
            link.close()
        server.shutdown()


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of a verb that must end in 2."""
    with pytest.raises(SystemExit) as end:
        cli.main(["view", *words])
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n")) == (2, "", 1), err
    return err


def test_faults_are_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "not a run folder" in said(capsys, str(tmp_path / "nowhere"))
    (tmp_path / "fresh").mkdir()
    shutil.copy(folder / "recipe.yaml", tmp_path / "fresh")
    assert "nothing to show yet" in said(capsys, str(tmp_path / "fresh"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen on port {port}" in said(capsys, str(folder), "--port", port)


def test_the_verb_says_where_and_ends_quietly(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(self: view.Server) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(view.Server, "serve_forever", stop)
    with pytest.raises(SystemExit) as end:
        cli.main(["view", str(folder), "--port", "0"])
    out, err = capsys.readouterr()
    assert end.value.code == 130 and out.startswith("http://127.0.0.1:") and "Traceback" not in err


def test_the_page_is_complete_in_itself() -> None:
    text = "".join((VENDOR.parent / name).read_text("utf-8") for name in ("view.html", "view.js"))
    assert not re.search(r"https?:|url\(|@import|innerHTML|document\.write|eval\(", text)
    loaded = re.findall(r'(?:import\(|src=)"(/[^"]+)"', text)
    assert {"/", *loaded} == set(view.OWN)


def test_vendored_files_are_those_that_were_published() -> None:
    table = (VENDOR / "README.md").read_text("utf-8")
    scripts = sorted(VENDOR.glob("*.js"))
    for path in scripts:
        assert hashlib.sha256(path.read_bytes()).hexdigest() in table and path.name in table
        assert (VENDOR / f"{path.name.split('.')[0]}.LICENSE.txt").stat().st_size > 1000
    assert len(scripts) == 2 and sum(path.stat().st_size for path in VENDOR.iterdir()) < 2.5e6


PROGRAM = chromium.found()
MIDDLE = "box => [box.x + box.width / 2, box.y + box.height / 2].map(Math.round)"


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium here; name one in $CHROMIUM")
def test_the_page_in_chromium(server: view.Server, tmp_path: Path) -> None:
    """Models turn, steps are compared, texts are texts, nothing is asked for elsewhere."""
    keep = Path(os.environ.get("SCREENSHOTS", tmp_path))
    with chromium.Browser(str(PROGRAM), tmp_path / "profile") as page:
        page.open(server.address)
        assert page.wait("document.body?.dataset.shown") == "exports/glb/asset.glb"
        assert page.value("document.querySelectorAll('#textures img').length") == 1
        angle = "document.querySelector('model-viewer').getCameraOrbit().theta"
        before = page.value(angle)
        place = page.value(f"({MIDDLE})(document.querySelector('#turn').getBoundingClientRect())")
        page.drag(*place, 80)
        page.wait(f"Math.abs({angle} - {before}) > 0.1")
        (keep / "view-mesh.png").write_bytes(page.picture())
        assert len(colours(page, place)["red"]) > 1000
        page.value("document.getElementById('which').selectedIndex = 1; document.getElementById('which').onchange()")
        assert page.wait("document.body.dataset.shown") == "exports/splat-ply/asset.ply"
        page.wait("new Promise(done => setTimeout(() => done(true), 1500))")
        (keep / "view-splats.png").write_bytes(page.picture())
        found = colours(page, place)
        assert len(found["green"]) > 1000 and len(found["blue"]) > 100 and not found["red"]
        assert max(y for _, y in found["blue"]) < min(y for _, y in found["green"])  # the right way up,
        assert (
            min(x for x, _ in found["blue"]) > sorted(x for x, _ in found["green"])[len(found["green"]) // 2]
        )  # unmirrored
        steps = "[...document.querySelectorAll('#pair label')].map(label => label.textContent).join()"
        assert page.value(steps) == "step 0,step 20"
        slide = "(s => { s.value = 1; s.dispatchEvent(new Event('input')) })(document.querySelector('#pair input'))"
        page.value(slide)
        assert page.value(steps) == "step 20,step 20"
        assert EVIL in page.value("document.querySelector('#about').textContent")
        assert page.value("document.querySelectorAll('img[onerror], #name script').length") == 0
        assert page.problems == []


def colours(page: chromium.Browser, place: list[int]) -> dict[str, list[tuple[int, int]]]:
    """Where around a place of the window pixels are red, green and blue."""
    x, y = place
    with Image.open(io.BytesIO(page.picture())) as picture:
        part = picture.convert("RGB").crop((x - 250, y - 200, x + 250, y + 200))
    found: dict[str, list[tuple[int, int]]] = {"red": [], "green": [], "blue": []}
    for i, pixel in enumerate(part.getdata()):
        if max(pixel) > 2 * sorted(pixel)[1] + 40:
            found[("red", "green", "blue")[pixel.index(max(pixel))]].append((i % part.width, i // part.width))
    return found
