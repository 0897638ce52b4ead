"""States and latents kept on disk: made once, the same to the last bit, made again where a file is damaged."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_videos
import torch
from torch import Tensor, nn

from limbeck.core import film, stored_states
from limbeck.core.diffusion.codec import Autoencoder, Identity
from limbeck.core.diffusion.denoiser import Model, Network
from limbeck.core.diffusion.process import Flow
from limbeck.core.distillation.source import Source
from limbeck.core.pipelines.family import Options
from limbeck.core.pipelines.text import reader
from limbeck.core.run.build import Build
from limbeck.core.run.context import Context
from limbeck.core.run.recipe import of
from limbeck.core.run.rng import Draws, generator
from limbeck.core.stored_states import Stored, StoredText, fingerprint
from limbeck.domains.video import pipelines

pytest.importorskip("av")
Entry = dict[str, Tensor]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(stored_states.PLACE, str(tmp_path / "cache"))
    monkeypatch.setattr(stored_states, "FREE", 0)
    return tmp_path / "cache"


def entry() -> Entry:
    """Tensors of all sorts: strided, half, without axes, empty, not finite."""
    x = torch.randn(3, 4, 5, generator=generator(0, "cache", 0))
    return {
        "strided": x.transpose(0, 2), "half": x.bfloat16(), "mask": x > 0, "scalar": torch.tensor(2.5),
        "empty": x[:0], "odd": torch.tensor([float("nan"), float("-inf"), -0.0]), "ids": torch.arange(3),
    }  # fmt: skip


class Maker:
    """Counts how often it makes."""

    def __init__(self, name: str = "maker") -> None:
        self.count, self.store = 0, Stored("test", lambda: fingerprint(name))

    def __call__(self, key: str = "key") -> Entry:
        return self.store.of(key, self.make)

    def make(self) -> Entry:
        self.count += 1
        return entry()


def same(one: Entry, other: Entry) -> bool:
    return one.keys() == other.keys() and all(
        a.dtype == other[key].dtype and a.shape == other[key].shape and a.stride() == other[key].stride()
        and torch.equal(a.flatten().view(torch.uint8), other[key].flatten().view(torch.uint8))
        for key, a in one.items()
    )  # fmt: skip


def files(place: Path) -> list[Path]:
    return sorted(path for path in place.rglob("*") if path.is_file())


def test_a_later_run_reads_what_an_earlier_one_made(place: Path) -> None:
    first, later, other = Maker(), Maker(), Maker("another")
    fresh = first()
    assert same(fresh, later()) and later.count == 0 and first.count == 1
    assert torch.equal(fresh["half"], entry()["half"]) and fresh["strided"].is_contiguous()
    later("another key")
    other()
    assert (later.count, other.count) == (1, 1) and len(files(place)) == 3
    assert {path.suffix for path in files(place)} == {".safetensors"} and len(list(place.iterdir())) == 2


def test_what_was_asked_for_last_stays_in_memory(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = Maker()
    monkeypatch.setattr(stored_states, "NEAR", 2 * stored_states.size(entry()))
    for key in "abca":
        maker(key)
    assert maker.count == 3 and len(maker.store.near) == 2
    shutil.rmtree(place)
    maker("c")
    assert maker.count == 3
    maker("b")
    assert maker.count == 4, "only two are near"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def swapped(path: Path) -> None:
    """The file of another key."""
    Maker()("other")
    (other,) = set(path.parent.iterdir()) - {path}
    other.replace(path)


FAULTS: dict[str, Callable[[Path], object]] = {
    "cut": cut, "flipped": flipped, "swapped": swapped, "empty": lambda path: path.write_bytes(b""),
    "strange": lambda path: path.write_bytes(b"\xff" * 64), "large": lambda path: path.write_bytes(bytes(2**20)),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_damaged_is_made_again(
    fault: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stored_states, "MOST", 2**19)
    good = Maker()()
    (path,) = files(place)
    FAULTS[fault](path)
    again, after = Maker(), Maker()
    assert same(again(), good) and again.count == 1
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {path} is damaged (") and said.count("\n") == 1
    assert same(after(), good) and after.count == 0


def test_a_disk_that_refuses_costs_nothing_but_time(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stored_states, "FREE", 2**60)
    maker = Maker()
    assert same(maker("a"), maker("b")) and not files(place)
    assert capsys.readouterr().err.count("\n") == 1, "said once"
    place.rename(place.with_name("moved"))
    place.write_text("a file is in the way")
    assert same(Maker()(), maker("a")) and "LIMBECK_CACHE" in capsys.readouterr().err


def test_what_is_cut_short_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stored_states.os, "replace", stop)
        Maker()()
    assert not files(place)


class Net(nn.Module):
    """Half the sides, four channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.config, self.use_tiling = nn.Conv3d(3, 4, 2, (1, 2, 2), (1, 0, 0)), {"z_dim": 4}, False

    def encode(self, x: Tensor) -> "Net":
        self.latent = self.conv(x)[:, :, : x.shape[2]]
        return self

    @property
    def latent_dist(self) -> "Net":
        return self

    def mode(self) -> Tensor:
        return self.latent


def net() -> Net:
    made = Net()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator(1, "net", 0)))
    return made


def test_a_fingerprint_knows_all_that_reaches_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fingerprint(Autoencoder(net(), 0.5, [0.0, 0.1, 0.2, 0.3]))
    assert plain == fingerprint(Autoencoder(net(), 0.5, [0.0, 0.1, 0.2, 0.3]))
    moved, tiled, other, half = net(), net(), net(), net().bfloat16()
    moved.conv.bias.data[3].nextafter_(torch.tensor(9.0))
    tiled.use_tiling, other.config = True, {"z_dim": 5}
    shift = [0.0, 0.1, 0.2, 0.3]
    found = {fingerprint(Autoencoder(one, 0.5, shift)) for one in (moved, tiled, other, half)}
    found |= {fingerprint(Autoencoder(net(), 0.6, shift)), fingerprint(Autoencoder(net(), 0.5)), fingerprint(net())}
    assert len(found | {plain}) == 8
    assert fingerprint(["ab", "c"]) != fingerprint(["a", "bc"]) and fingerprint(1) != fingerprint("1")
    threads = stored_states.surroundings()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert stored_states.surroundings() != threads
    with torch.autocast("cpu", torch.bfloat16):
        assert stored_states.surroundings()[-1] == "torch.bfloat16"


def test_prompts_are_read_once_and_alone() -> None:
    asked: list[str] = []

    def encode(prompts: list[str]) -> Entry:
        asked.extend(prompts)
        return {"states": torch.tensor([[float(len(p))] * 2 for p in prompts]), "mask": torch.ones(len(prompts)) > 0}

    first, later = (StoredText(encode, lambda: fingerprint("text"), "cpu") for _ in range(2))
    found = first(["fish", "", "fish"])
    assert found["states"].tolist() == [[4.0, 4.0], [0.0, 0.0], [4.0, 4.0]] and found["mask"].shape == (3,)
    assert torch.equal(later(["", "fish", "ox"])["states"][:2], found["states"][[1, 0]]) and asked == ["fish", "", "ox"]


def test_a_pipeline_reads_each_prompt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.random.fork_rng():
        pipe = tiny_videos.cogvideox()
    pipe.text_encoder.eval()
    family, options = pipelines.KNOWN[type(pipe).__name__], Options((16, 32), 6.0)
    prompts, read = ["a red fish", "", "a fish"], lambda: reader(pipe, family, options)
    with torch.no_grad():
        plain = family.encode(pipe, prompts, options)
    found, asked = read()(prompts), []
    assert found.keys() == plain.keys() and all(torch.allclose(found[key], plain[key], atol=1e-5) for key in plain)
    encode = pipe.encode_prompt
    monkeypatch.setattr(pipe, "encode_prompt", lambda texts, *a, **k: asked.append(texts) or encode(texts, *a, **k))
    later = read()(prompts[::-1])
    assert all(torch.equal(later[key], found[key].flip(0)) for key in plain) and not asked
    with torch.no_grad():
        next(pipe.text_encoder.parameters())[0, 0] += 1
    read()(prompts)
    assert asked == [[prompt] for prompt in prompts], "other weights have states of their own"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two films of 20 frames of noise."""
    path = tmp_path / "clips"
    path.mkdir()
    for i in range(2):
        pixels = torch.randint(256, (20, 3, 16, 16), generator=generator(0, "films", i), dtype=torch.uint8)
        film.write(pixels, path / f"{i}.gif", 10)
        (path / f"{i}.txt").write_text(f"film {i}")
    return path


def source(folder: Path, codec: Autoencoder | Identity, cuts: int | None = 3) -> Source:
    """The data of a run whose teacher has this codec."""
    data = {"kind": "video.folder", "path": str(folder), "size": [16, 16], "frames": 4, "fps": 10, "cuts": cuts}
    build = Build(of({"name": "x", "steps": 1, "batch": 8, "data": data, "stages": [
        {"name": "a", "losses": [{"kind": "denoising"}]}]}))  # fmt: skip
    shape = (3, 4, 16, 16) if isinstance(codec, Identity) else (4, 4, 8, 8)
    text = lambda prompts: {"states": torch.zeros(len(prompts), 1)}  # noqa: E731
    build._pieces["teacher"] = Model(Network(nn.Linear(1, 1), Flow(), "flow"), shape, codec, text, "x")
    return Source(build.piece("teacher"), nn.Identity(), build.piece("data"), text([""]))


def real(found: Source, step: int = 0) -> Tensor:
    return found.real(Context(step, "a", Draws(0, step, 8), 1, 0, torch.device("cpu")))[0]


def test_cuts_are_encoded_once_for_all_runs(
    folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []
    plain = Net.encode
    monkeypatch.setattr(Net, "encode", lambda self, x: calls.append(len(x)) or plain(self, x))
    cold = source(folder, Autoencoder(net(), 0.5))
    found = [real(cold, step) for step in range(4)]
    assert calls == [1] * 6 and len(files(place)) == 6, "two films at three places, each alone"
    warm = source(folder, Autoencoder(net(), 0.5))
    assert all(torch.equal(real(warm, step), found[step]) for step in range(4)) and len(calls) == 6
    drawn = Draws(0, 2, 8).gen("data.batch")
    pixels = source(folder, Identity()).data.batch(8, drawn, slice(None)).x
    alone = torch.cat([Autoencoder(net(), 0.5).encode(x[None]) for x in pixels.contiguous()])
    assert torch.allclose(found[2], alone, atol=1e-6), "latents of the very frames that are drawn"
    first = files(place)[0]
    flipped(first)
    damaged = source(folder, Autoencoder(net(), 0.5))
    assert (
        all(torch.equal(real(damaged, step), found[step]) for step in range(4)) and "damaged" in capsys.readouterr().err
    )


def test_other_weights_and_other_films_have_latents_of_their_own(folder: Path) -> None:
    before = real(source(folder, Autoencoder(net(), 0.5)))
    assert torch.allclose(real(source(folder, Autoencoder(net(), 1.0))), 2 * before)
    shutil.copy(folder / "0.gif", folder / "1.gif")
    after = real(source(folder, Autoencoder(net(), 0.5)))
    assert not torch.equal(after, before) and torch.equal(after[0], before[0]) != torch.equal(after[0], before[1])


def test_pixels_stay_pixels(folder: Path, place: Path) -> None:
    assert real(source(folder, Identity())).shape == (8, 3, 4, 16, 16)
    assert real(source(folder, Autoencoder(net()), cuts=None)).shape == (8, 4, 4, 8, 8) and not files(place)
