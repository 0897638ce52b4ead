"""Per-row caching: the same walks bit for bit from fewer rows, and nothing kept that should not be."""

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.diffusion.discrete import FirstHitting, MaskProcess, TokenNetwork
from limbeck.core.diffusion.sampling import Kernel, Step, mask, times, trajectory

PROCESS = MaskProcess(4)


class Net(nn.Module):
    """Logits of each row from that row alone, in float64; counts the rows that it is asked about."""

    def __init__(self) -> None:
        super().__init__()
        gen = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(5, 6, 4, generator=gen, dtype=torch.float64))
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        if x.is_floating_point():
            return torch.einsum("blv,vlk->blk", x.double(), self.table)
        return (self.table[x, torch.arange(6)] + self.table[x, torch.arange(6)].sum(1, keepdim=True)).double()


def call(net: nn.Module, x: Tensor, time: Tensor, cond: dict[str, Tensor]) -> Tensor:
    out: Tensor = net(x)
    return out + cond["shift"][:, None, None] if cond else out


def walk(timed: bool, kernel: Kernel, steps: int = 40, resample: bool = False) -> tuple[Tensor, int]:
    net = Net()
    denoiser, gen = TokenNetwork(net, PROCESS, call, timed=timed), torch.Generator().manual_seed(1)
    x, cond = torch.full((8, 6), 4), {"shift": torch.arange(8.0)}

    def on_step(step: Step) -> Tensor | None:
        return torch.tensor([0, 0, 2, 3, 4, 5, 7, 7]) if resample and step.i % 5 == 0 else None

    with torch.no_grad():
        for step in trajectory(denoiser, kernel, x, times(steps, PROCESS), cond, gen, on_step=on_step):
            x = step.x_next
    return x, net.rows


@pytest.mark.parametrize("kernel", [mask(), FirstHitting()], ids=["mask", "first_hitting"])
@pytest.mark.parametrize("resample", [False, True])
def test_walks_are_the_same_from_fewer_rows(kernel: Kernel, resample: bool) -> None:
    (x, rows), (want, all_rows) = walk(False, kernel, resample=resample), walk(True, kernel, resample=resample)
    assert torch.equal(x, want) and all_rows == 320 and rows <= 8 * 7  # a row changes at most six times


def test_a_cache_of_the_whole_batch_asks_more() -> None:
    _, rows = walk(False, mask())
    expected = 8 * 40 * (1 - (1 - 1 / 40) ** 6)  # rows that change in a step of 40, and the first step
    assert rows == pytest.approx(expected + 8, rel=0.35) and rows < 8 * 40 * (1 - (1 - 1 / 40) ** 48) / 2


def test_nothing_is_kept_from_one_walk_to_the_next_or_between_batches() -> None:
    net = Net()
    begun, cond = TokenNetwork(net, PROCESS, call, timed=False).begin(torch.ones(1)), {"shift": torch.zeros(2)}
    x, t = torch.full((2, 6), 4), torch.ones(2)
    with torch.no_grad():
        before = begun.predict(x, t, cond).raw
        net.table.mul_(2)
        assert torch.equal(begun.predict(x, t, cond).raw, before)  # kept
        again = TokenNetwork(net, PROCESS, call, timed=False).begin(torch.ones(1)).predict(x, t, cond).raw
        assert torch.equal(again, 2 * before)  # a new walk asks anew
        assert len(begun.predict(x[:1], t[:1], {"shift": torch.zeros(1)}).raw) == 1  # another batch: asked anew
    with torch.enable_grad():
        assert begun.predict(x, t, cond).raw.requires_grad  # a gradient is never cut off
