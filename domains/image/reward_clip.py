"""What the recipe `image/reward-clip` is made of: data of the second art style, the tower, its loss, its measure.

A fixed fifth of the captions is never trained on, under no name; nor is any picture of the first style (Fluent).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from limbeck.core.pictures import sheet, to_pictures
from limbeck.core.run.build import Batch, Build
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput
from limbeck.core.run.players import Player, Single
from limbeck.core.run.rng import generator
from limbeck.domains.image import config as settings
from limbeck.domains.image import towers
from limbeck.domains.image.data import FOLDER, FluentData, captions_file

STYLES = {"noto": FOLDER.parent / "noto", "fluent": FOLDER}
HELD_OUT = 320  # captions
FITTED = 256  # pictures that features are standardised by
SAME = {"man": "person", "woman": "person", "men": "people", "women": "people"}
Row = dict[str, float | str]


def family(name: str) -> str:
    """What a caption shares with its near twins: man, woman and person alike; all clock faces; all keycaps."""
    if re.search(r"o’clock|-thirty", name):
        return "clock face"
    words = re.findall(r"[^\s,-]+", name.lower().split(":")[0])
    return " ".join(SAME.get(word, word) for word in words)


@cache
def held_out() -> tuple[int, ...]:
    """The 320 captions that are never trained on: whole families by hash order, so that no near twin is seen."""
    families: dict[str, list[int]] = {}
    for i, row in enumerate(captions_file()["pictures"]):
        families.setdefault(family(row["name"]), []).append(i)
    chosen: list[int] = []
    for members in (families[f] for f in sorted(families, key=lambda f: hashlib.sha256(f.encode()).hexdigest())):
        chosen += members if len(chosen) + len(members) <= HELD_OUT else []
    return tuple(sorted(chosen))


def seen() -> tuple[int, ...]:
    """The other captions."""
    left = set(held_out())
    return tuple(i for i in range(len(captions_file()["pictures"])) if i not in left)


@cache
def style(name: str) -> FluentData:
    """The captioned pictures in one of both art styles."""
    return FluentData(32, STYLES[name])


def degraded(x: Tensor, share: float, gen: Generator) -> Tensor:
    """Pictures [B,3,H,W], that share of them blurred a little and that share (others) with noise up to .15."""
    u = torch.rand(4, len(x), 1, 1, 1, generator=gen)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = x.lerp(soft, u[0] * (u[1] < share))
    return x + 0.15 * u[2] * (u[3] < share) * torch.randn(x.shape, generator=gen)


class SeenPictures:
    """The slot `data`: pictures of the captions to train on, in the second art style, on random grounds."""

    def __init__(self, config: settings.Noto) -> None:
        self.share, self.set = config.degraded, style("noto")
        self.indices = torch.tensor(seen())
        self.names = [self.set.names[i] for i in seen()]
        self.keywords = [self.set.keywords[i] for i in seen()]

    def batch(self, n: int, gen: Generator, rows: slice) -> Batch:
        """x [b,3,32,32] about [-1,1] and names: rows of a batch of n."""
        which = self.indices[torch.randint(len(self.indices), (n,), generator=gen)]
        x, names, _ = self.set.batch(which, gen, "name")
        return Batch(degraded(x, self.share, gen)[rows], names[rows])

    def prompts(self, n: int, gen: Generator, rows: slice = slice(None)) -> list[str]:
        """Names alone."""
        return [self.names[i] for i in torch.randint(len(self.names), (n,), generator=gen).tolist()][rows]


def data(config: settings.Noto, build: Build) -> SeenPictures:
    """Factory of the data `image.noto`."""
    return SeenPictures(config)


def tower(config: settings.Tower, build: Build) -> towers.Tower:
    """Factory of the student `image.tower`: a fresh head on a frozen trunk, its fixed numbers from the run's seed."""
    pictures = build.piece("data")
    if not isinstance(pictures, SeenPictures):
        raise BadInput("an image.tower is trained on captioned pictures of the second style: data: {kind: image.noto}")
    made = towers.Tower(config.trunk)
    drawn = pictures.batch(FITTED, generator(build.seed, "tower.fit", 0), slice(None))
    assert drawn.x is not None
    made.fit(drawn.x, pictures.names)
    return made.to(build.device)


class Contrastive(Single):
    """Cross-entropy of each picture's own caption among all captions that are trained on.

    Radford et al. 2021, section 2.3, the half that classifies pictures. Deviations: the text side is frozen, so that
    all captions are at hand at each step; a caption's target leans towards its keywords. Dropout of the standardised
    features is what generalises to captions never seen: for a square loss it would be ridge regression.
    """

    def __init__(self, net: towers.Tower, pictures: SeenPictures, config: settings.Contrastive, player: Player) -> None:
        super().__init__(player)
        self.net, self.data, self.config = net, pictures, config
        self.index = {name: i for i, name in enumerate(pictures.names)}
        self.targets = leaning(net, pictures.names, pictures.keywords, config.keywords)

    def terms(self, ctx: Context) -> dict[str, Tensor]:
        drawn = self.data.batch(ctx.global_batch, ctx.draws.gen("data.batch"), ctx.draws.rows)
        assert drawn.x is not None
        with torch.no_grad():
            features = self.net.features(drawn.x.to(ctx.device))
        kept = ctx.draws.uniform("contrastive.dropout", (features.shape[1],)) >= self.config.dropout
        found = self.net.embed(features * kept / (1 - self.config.dropout))
        logits = self.config.scale * found @ self.targets.T
        own = torch.tensor([self.index[name] for name in drawn.prompts], device=ctx.device)
        first = (logits.argmax(-1) == own).float().mean()
        return {"contrastive": F.cross_entropy(logits, own), "_first": first.detach()}


def leaning(net: towers.Tower, names: list[str], keywords: list[list[str]], weight: float) -> Tensor:
    """Unit vectors [N,384]: each caption plus `weight` times the mean of its keywords."""
    if weight == 0:
        return net.captions(names)
    texts = list(dict.fromkeys(word for words in keywords for word in words))
    place, found = {text: i for i, text in enumerate(texts)}, net.captions(texts)
    means = [found[[place[w] for w in words]].mean(0) if words else torch.zeros_like(found[0]) for words in keywords]
    return F.normalize(net.captions(names) + weight * torch.stack(means), dim=-1)


def contrastive(config: settings.Contrastive, build: Build) -> Contrastive:
    """Factory of the objective `image.contrastive`."""
    net = build.piece("student")
    if not isinstance(net, towers.Tower):
        raise BadInput("image.contrastive trains a tower: student: {kind: image.tower}")
    return Contrastive(net, build.piece("data"), config, build.player("tower", net, config.optim))


@torch.no_grad()
def ranks(net: towers.Tower, name: str, indices: tuple[int, ...], count: int, gen: Generator) -> Tensor:
    """How many of these captions fit a picture better than its own does [count*N], for clean pictures of one style."""
    pictures, device = style(name), net.origin.device
    wanted = net.captions([pictures.names[i] for i in indices])
    out = []
    for _ in range(count):
        x = pictures.batch(torch.tensor(indices), gen, "name")[0]
        fit = torch.cat([net(part.to(device)) for part in torch.split(x, towers.CHUNK)]) @ wanted.T
        out.append((fit > fit.diagonal()[:, None]).sum(1).cpu())
    return torch.cat(out)


def retrieval(net: towers.Tower, config: settings.Retrieval) -> Iterator[Row]:
    """One row for each style with captions that were trained on and with those that were not."""
    for name in STYLES:
        for what, indices in (("seen", seen()), ("never seen", held_out())):
            found = ranks(net, name, indices, config.count, generator(config.seed, f"retrieval {name} {what}", 0))
            chance, ten = 10 / len(indices), float((found < 10).double().mean())
            row: Row = {"style": name if name == "noto" else f"{name} (never seen)", "captions": what}
            row |= {"choices": len(indices), "R@1": float((found < 1).double().mean()), "R@10": ten}
            yield row | {"chance R@10": chance, "times chance": ten / chance}


def metric(config: settings.Retrieval, build: Build) -> Callable[[], list[Row]]:
    """Factory of the metric `image.retrieval`."""
    return lambda: list(retrieval(build.piece("student"), config))


class Matches:
    """The slot `space`: pictures of the first style and where the tower ranks their own captions."""

    formats = ("tower",)

    def __init__(self, config: settings.Matches) -> None:
        self.config = config

    @torch.no_grad()
    def show(self, build: Build, step: int, folder: Path) -> list[Path]:
        """A sheet of pictures whose style and captions were never trained on, under the ranks of their own captions."""
        net, pictures, choices = build.piece("student"), style("fluent"), held_out()
        shown = range(0, len(choices), -(-len(choices) // self.config.count))
        x = pictures.batch(torch.tensor([choices[i] for i in shown]), generator(0, "matches", 0), "name")[0]
        fit = net(x.to(build.device)) @ net.captions([pictures.names[i] for i in choices]).T
        own = fit[range(len(x)), list(shown)]
        place = (fit > own[:, None]).sum(1).tolist()
        texts = [f"{p + 1}. {pictures.names[choices[i]]}" for p, i in zip(place, shown, strict=True)]
        path = folder / f"step-{step:08d}.png"
        title = f"place of the right caption among {len(choices)}, after {step} steps"
        sheet({title: to_pictures(x)}, texts, columns=8).save(path)
        return [path]

    def sample(
        self, build: Build, prompts: list[str], seed: int, folder: Path, which: str = "student",
        steps: int | None = None, guidance: float | None = None,
    ) -> list[Path]:  # fmt: skip
        """A tower draws nothing."""
        raise BadInput("a tower judges pictures and draws none; use it as a reward (kind: image.text)")

    def export(self, build: Build, path: Path, format: str) -> list[Path]:
        """`tower`: the head and the fixed numbers, what the reward image.text reads."""
        path.mkdir(parents=True, exist_ok=True)
        towers.save(build.piece("student"), path / towers.FILE)
        return [path / towers.FILE]


def space(config: settings.Matches, build: Build) -> Matches:
    """Factory of the space `image.matches`."""
    return Matches(config)
