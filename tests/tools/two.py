"""Two nets that train against each other, for tests of the loop."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from limbeck.core.run.config import OptimConfig
from limbeck.core.run.context import Context
from limbeck.core.run.distributed import Team
from limbeck.core.run.players import Phase, Player
from limbeck.core.run.trainer import Cadence, Trainer


class Two:
    """A generator judged by a critic; `watch` sees what requires grad while a loss is computed."""

    def __init__(self, every: int = 1) -> None:
        torch.manual_seed(0)
        self.g, self.c = nn.Linear(2, 2), nn.Linear(2, 1)
        self.players = {
            "g": Player("g", self.g, OptimConfig(every=every, ema=0.9), 10),
            "c": Player("c", self.c, OptimConfig(), 10),
        }
        self.seen: list[tuple[int, str, bool, bool]] = []

    def watch(self, ctx: Context, phase: str) -> None:
        self.seen.append((ctx.step, phase, self.g.weight.requires_grad, self.c.weight.requires_grad))

    def phases(self, ctx: Context) -> Iterator[Phase]:
        z = ctx.draws.normal("z", (2,))

        def g() -> dict[str, Tensor]:
            self.watch(ctx, "g")
            return {"fool": -self.c(ctx.once("x", lambda: self.g(z))).mean()}

        def c() -> dict[str, Tensor]:
            self.watch(ctx, "c")
            return {"judge": self.c(ctx.once("x", lambda: self.g(z)).detach()).square().mean(), "_note": z.mean()}

        yield Phase(("g",), g)
        yield Phase(("c",), c)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        pass


def trainer(objective, steps: int = 4, cadence: Cadence | None = None) -> Trainer:
    return Trainer(objective, Team("cpu"), 0, "main", steps, 4, cadence or Cadence())
