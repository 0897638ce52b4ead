"""The slot `teacher` of embedded objects: a small net of views, fresh or trained; its files and what it knows alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck.core import text
from limbeck.core.diffusion.codec import Identity
from limbeck.core.diffusion.config import ProcessConfig, Vp
from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Model, Output, net_dtype
from limbeck.core.diffusion.process import process
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput, clean, did_you_mean
from limbeck.core.run.rng import generator
from limbeck.domains.threed import config as settings
from limbeck.domains.threed import known as metrics
from limbeck.domains.threed.known import Known
from limbeck.domains.threed.net import ViewNet
from limbeck.domains.threed.objects import objects, vectors

ASSETS = Path(__file__).parent / "assets"
MARK, WEIGHTS = "limbeck.json", "model.safetensors"
Meta = dict[str, Any]  # size, widths, hidden, process


class Views(Denoiser):
    """A net of views, v-prediction; it knows the embedded objects.

    It looks at `text` and `camera` of a condition; background, jitter and particle are not for it.
    """

    def __init__(self, net: ViewNet, config: ProcessConfig) -> None:
        super().__init__(process(config), "v")
        self.net = net

    def forward(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Output:
        """v [B,3,H,W]; without `camera` [B,15], or where its row is zero, the camera counts as not told."""
        x = x_t.to(net_dtype(self.net, x_t))
        out: Tensor = self.net(x, t, cond["text"], cond.get("camera"))
        return out

    @property
    def prompts(self) -> tuple[str, ...]:
        """The names of the objects."""
        return objects().names

    def known(self, prompt: str) -> Known | None:
        """The object's pictures at the held-out cameras."""
        return objects().known(prompt)


class Texts:
    """Prompts as conditions: `text` [B,384]. The empty prompt is the null condition."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        text.sentences()  # made now, so that a run without the encoder's package stops before it starts

    def __call__(self, prompts: list[str]) -> Encoded:
        """Sentence embeddings; a prompt that no object has gets a warning, once."""
        for prompt in prompts:
            warn_unknown(prompt)
        return {"text": vectors(prompts).to(self.device)}


@cache
def warn_unknown(prompt: str) -> None:
    """A prompt outside the teacher's small world gets a warning that names the nearest ones inside."""
    if prompt.strip() and objects().find(prompt) is None:
        text.warn_unknown(prompt, objects().nearest(prompt))


def network(meta: Meta) -> ViewNet:
    """A fresh net as the meta data describes it; it keeps the description."""
    net = ViewNet(meta["size"], tuple(meta["widths"]), meta["hidden"])
    net.meta = {key: meta[key] for key in ("size", "widths", "hidden", "process")}
    return net


def model(net: ViewNet, device: torch.device, name: str) -> Model:
    """A net with everything around it."""
    denoiser = Views(net.to(device), Vp(**net.meta["process"]))
    return Model(denoiser, (3, net.size, net.size), Identity(), Texts(device), name)


def fresh(config: settings.FreshViews, build: Build) -> Model:
    """Factory of the teacher `threed.fresh`: random weights, to be trained."""
    meta = {**config.model_dump(mode="json", exclude={"kind"}), "size": objects().size}
    return model(network(meta), build.device, "fresh")


def embedded(config: settings.ViewsTeacher, build: Build) -> Model:
    """Factory of the teacher `threed.views`."""
    net = load(config.model).requires_grad_(False)
    return model(net, build.device, config.model)


def names() -> list[str]:
    """The teachers that come with limbeck."""
    return sorted(path.parent.name for path in ASSETS.glob(f"*/{MARK}"))


def load(name: str) -> ViewNet:
    """The net of an embedded name or a folder, in float32 and evaluation mode."""
    folder = ASSETS / name if name in names() else Path(name).expanduser()
    if not (folder / MARK).is_file():
        hint = did_you_mean(name, names()) or f"; embedded teachers: {', '.join(names()) or 'none'}"
        raise BadInput(f"teacher.model: there is no {clean(name, 80)}{hint}")
    net = network(json.loads((folder / MARK).read_text(encoding="utf-8")))
    net.load_state_dict({key: value.float() for key, value in load_file(folder / WEIGHTS).items()})
    return net.eval()


def export(build: Build, path: Path) -> list[Path]:
    """Exporter `threed.views`: what the run trained, as a folder that `teacher.model` takes (bf16)."""
    denoiser: Denoiser = build.piece("teacher").denoiser
    if not isinstance(denoiser, Views):
        raise BadInput("the exporter threed.views writes nets of views; this run has another teacher")
    net: Any = denoiser.net
    path.mkdir(parents=True, exist_ok=True)
    half = {key: value.detach().to(torch.bfloat16).contiguous() for key, value in net.state_dict().items()}
    save_file(half, path / WEIGHTS)
    trained = {"recipe": build.recipe.name, "steps": build.step, "batch": build.recipe.batch}
    (path / MARK).write_text(json.dumps({**net.meta, "trained": trained}, indent=1) + "\n", encoding="utf-8")
    return [path / WEIGHTS, path / MARK]


@torch.no_grad()
def said(model: Model, truth: Known, prompt: str, t: float, seed: int) -> Tensor:
    """The one-step prediction x0 [V,3,H,W] at the held-out cameras, of the true pictures made noisy to time t."""
    device, count = next(model.denoiser.parameters()).device, len(truth.cameras)
    noise = torch.randn(truth.image.shape, generator=generator(seed, "threed.said", 0)).to(device)
    times = torch.full((count,), t, device=device)
    x_t = model.denoiser.process.add_noise(truth.image.to(device), noise, times)
    cond = {"text": model.encode([prompt])["text"].expand(count, -1), "camera": truth.cameras.rows().to(device)}
    return model.denoiser.predict(x_t, times, cond).x0.clamp(-1, 1).cpu()


def quality(config: settings.ViewsQuality, build: Build) -> Callable[[], list[dict[str, float | str]]]:
    """Factory of the metric `threed.teacher`: PSNR at cameras never trained on, beside that of a white picture."""
    return lambda: list(rows(build.piece("teacher"), config.t, build.seed))


def rows(model: Model, t: float, seed: int) -> Iterator[dict[str, float | str]]:
    """The mean over all objects, then a row an object."""
    found: list[dict[str, float | str]] = []
    for name in objects().names:
        truth = objects().known(name)
        assert truth is not None
        answer = said(model, truth, name, t, seed)
        white = metrics.psnr(torch.ones_like(truth.image), truth.image)
        found.append({"object": name, "PSNR": metrics.psnr(answer, truth.image), "a white picture": white})
    mean = {key: sum(float(row[key]) for row in found) / len(found) for key in ("PSNR", "a white picture")}
    yield {"object": f"mean of {len(found)}", **mean}
    yield from found
