"""Generator and critic on 2-D points: every moving part of the runner, nothing else."""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from limbeck.core.run.build import Batch, Build
from limbeck.core.run.context import Context
from limbeck.core.run.players import Phase
from tinyrun import config as c


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Net(nn.Module):
    def __init__(self, width: int, depth: int, out: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, width), nn.Linear(width, out)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def net(config: c.Net, build: Build) -> Net:
    return Net(config.width, config.depth, 2).to(torch.float64 if config.double else torch.float32)


class Points:
    def __init__(self, config: c.Points, build: Build) -> None:
        self.radius = config.radius

    def batch(self, n: int, gen: torch.Generator, rows: slice) -> Batch:
        angle = torch.rand(n, generator=gen)[rows] * 2 * math.pi
        return Batch(self.radius * torch.stack([angle.cos(), angle.sin()], -1), self.prompts(n, gen, rows))

    def prompts(self, n: int, gen: torch.Generator, rows: slice) -> list[str]:
        return ["a point"] * len(range(n)[rows])


class Pair:
    def __init__(self, config: c.Pair, build: Build) -> None:
        self.config, self.data, self.student = config, build.piece("data"), build.piece("student")
        like: c.Net = build.recipe.student
        self.critic = Net(like.width, like.depth, 1).to(next(self.student.parameters()).dtype)
        self.players = {
            "generator": build.player("generator", self.student, config.generator),
            "critic": build.player("critic", self.critic, config.critic),
        }
        self.seen = torch.zeros(2)

    def phases(self, ctx: Context) -> Iterator[Phase]:
        time.sleep(self.config.pause)
        dtype = next(self.student.parameters()).dtype
        z = ctx.draws.normal("z", (2,), dtype)
        real = self.data.batch(ctx.global_batch, ctx.draws.gen("data"), ctx.draws.rows).x.to(dtype)

        def fake() -> Tensor:
            return ctx.once("fake", lambda: self.student(z))

        def generator() -> dict[str, Tensor]:
            return {"fool": self.fault("generator", ctx, nn.functional.softplus(-self.critic(fake())).mean())}

        def critic() -> dict[str, Tensor]:
            score = self.critic(fake().detach())
            loss = nn.functional.softplus(score).mean() + nn.functional.softplus(-self.critic(real)).mean()
            return {"judge": self.fault("critic", ctx, loss), "_score": score.mean()}

        yield Phase(("generator",), generator)
        self.seen += torch.tensor([1.0, float(z.mean())])
        ctx.log("held_out", -abs(float(z.mean())))
        if ctx.step + 1 == self.config.finish:
            ctx.finish = "the tiny objective has had enough"
        yield Phase(("critic",), critic)

    def fault(self, player: str, ctx: Context, loss: Tensor) -> Tensor:
        """What the test plants: a NaN loss, a NaN in one gradient behind a finite loss, or too much memory."""
        config = self.config
        if config.fault == "none" or config.player != player or ctx.step != config.at:
            return loss
        if config.fault == "memory":
            torch.empty(2**50, dtype=torch.uint8)
        if config.fault == "loss":
            return loss * math.nan
        module = self.student if player == "generator" else self.critic
        return loss + _Poison.apply(module.last.bias)

    def state(self) -> dict[str, Tensor]:
        return {"seen": self.seen}

    def load(self, state: dict[str, Tensor]) -> None:
        self.seen = state["seen"].clone()


class _Poison(torch.autograd.Function):
    """Adds nothing to the loss and NaN to the gradient."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.detach().sum() * 0

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        return torch.full(ctx.shape, math.nan, dtype=gradient.dtype)


class Show:
    formats = ("txt",)

    def __init__(self, config: c.Space, build: Build) -> None:
        pass

    def show(self, build: Build, step: int, folder: Path) -> list[Path]:
        x = build.piece("student")(torch.zeros(1, 2, dtype=next(build.piece("student").parameters()).dtype))
        path = folder / f"step-{step:08d}.png"
        Image.new("L", (4, 4), int(x.sum().abs().clamp(0, 1) * 255)).save(path)
        return [path]

    def sample(
        self, build: Build, prompts: list[str], seed: int, folder: Path, which: str = "student",
        steps: int | None = None, guidance: float | None = None,
    ) -> list[Path]:  # fmt: skip
        return self.show(build, 0, folder)

    def export(self, build: Build, path: Path, format: str) -> list[Path]:
        path.write_text(str(build.piece("student").first.bias.tolist()))
        return [path]


def mean(config: c.Mean, build: Build):
    @torch.no_grad()
    def measure() -> list[dict[str, float | str]]:
        z = torch.zeros(4, 2, dtype=next(build.piece("student").parameters()).dtype)
        return [{"who": "student", "mean": float(build.piece("student")(z).mean())}]

    return measure
