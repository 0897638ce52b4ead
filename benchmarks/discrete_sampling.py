"""Rows of the net a sequence, and sequences a second: a cache for each row against MDLM's for the whole batch."""

import time

import torch
from torch import Tensor

from limbeck.core.diffusion.cached import RowCache
from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Prediction
from limbeck.core.diffusion.discrete import MaskProcess, TokenNetwork
from limbeck.core.diffusion.sampling import mask, times, trajectory
from limbeck.domains.sequence import models

LENGTH, PROCESS = 200, MaskProcess(4)


class BatchCache(RowCache):
    """MDLM's: what the net said is kept only while no row of the batch changes."""

    def predict(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Prediction:
        if self.kept is None or not torch.equal(self.kept[0], x_t):
            self.kept = (x_t, self.inner.predict(x_t, t, cond).raw)
        return self.inner.wrap(self.kept[1], x_t, t)


def measure(net: torch.nn.Module, kind: type[RowCache], batch: int, steps: int) -> tuple[float, float, Tensor]:
    """Rows a sequence, sequences a second, and the samples [B,L]."""
    rows = 0

    def call(inner: torch.nn.Module, x: Tensor, when: Tensor, cond: Encoded) -> Tensor:
        nonlocal rows
        rows += len(x)
        return inner(x)

    denoiser: Denoiser = kind(TokenNetwork(net, PROCESS, call))
    x, gen, start = torch.full((batch, LENGTH), 4), torch.Generator().manual_seed(0), time.perf_counter()
    with torch.no_grad():
        for step in trajectory(denoiser, mask(), x, times(steps, PROCESS), gen=gen):
            x = step.x_next
    return rows / batch, batch / (time.perf_counter() - start), x


def main() -> None:
    """A line for each batch size and number of steps."""
    torch.set_num_threads(2)
    net, _ = models.load("fly-upstream")
    print("| steps | batch | rows a sequence: whole batch | each row | fewer | sequences/s | | faster | same |")
    print("|---|---|---|---|---|---|---|---|---|")
    for steps in (128, 1000):
        for batch in (1, 4, 16, 64):
            whole, each = (measure(net, kind, batch, steps) for kind in (BatchCache, RowCache))
            same = float((whole[2] == each[2]).float().mean())
            print(
                f"| {steps} | {batch} | {whole[0]:.0f} | {each[0]:.0f} | {whole[0] / each[0]:.1f}x | {whole[1]:.2f} | "
                f"{each[1]:.2f} | {each[1] / whole[1]:.1f}x | {same:.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
