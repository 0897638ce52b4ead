"""Per-row caching: the same walks bit for bit from fewer rows, and nothing kept that should not be."""

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.diffusion.discrete import FirstHitting, MaskProcess, TokenNetwork
from limbeck.core.diffusion.guidance import guided_by
from limbeck.core.diffusion.sampling import Kernel, Step, mask, times, trajectory
from limbeck.core.steering.value import lookahead, select

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
    return out * (1 + cond["shift"][:, None, None]) if cond else out


def walk(
    timed: bool, kernel: Kernel, steps: int = 40, resample: bool = False, scale: float = 1.0
) -> tuple[Tensor, int]:
    net, gen = Net(), torch.Generator().manual_seed(1)
    denoiser = guided_by(TokenNetwork(net, PROCESS, call, timed=timed), {"shift": torch.zeros(1)}, scale)
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
        assert torch.equal(begun.begin(torch.ones(1)).predict(x, t, cond).raw, 2 * before)
        again = TokenNetwork(net, PROCESS, call, timed=False).begin(torch.ones(1)).predict(x, t, cond).raw
        assert torch.equal(again, 2 * before)  # a new walk asks anew
        assert len(begun.predict(x[:1], t[:1], {"shift": torch.zeros(1)}).raw) == 1  # another batch: asked anew
        begun.predict(x, t, cond)
    with torch.enable_grad():
        assert begun.predict(x, t, cond).raw.requires_grad  # a gradient is never cut off


@pytest.mark.parametrize("resample", [False, True])
def test_under_guidance_both_branches_are_kept(resample: bool) -> None:
    (x, rows), (want, all_rows) = (walk(timed, mask(), resample=resample, scale=2.0) for timed in (False, True))
    plain = walk(False, mask(), resample=resample)[0]
    assert torch.equal(x, want) and not torch.equal(x, plain)
    assert all_rows == 640 and rows <= 2 * 8 * 7


def test_rows_of_another_condition_or_written_into_are_asked_anew() -> None:
    denoiser = TokenNetwork(Net(), PROCESS, call, timed=False)
    begun, x, t = denoiser.begin(torch.ones(1)), torch.full((3, 6), 4), torch.ones(3)
    with torch.no_grad():
        begun.predict(x, t, {"shift": torch.zeros(3)})
        for shift in (torch.tensor([0.0, 1.0, 0.0]), torch.ones(1)):
            assert torch.equal(begun.predict(x, t, {"shift": shift}).raw, denoiser.predict(x, t, {"shift": shift}).raw)
        x[1, 2] = 0
        assert torch.equal(begun.predict(x, t, {"shift": shift}).raw, denoiser.predict(x, t, {"shift": shift}).raw)
        assert torch.equal(begun.predict(x, t, {}).raw, denoiser.predict(x, t, {}).raw)


@pytest.mark.parametrize(
    "index", [[3, 0, 0, 2], [1, 3], [0, 1, 2, 3, 3, 3], []], ids=["as many", "fewer", "more", "none"]
)
def test_any_rows_may_be_picked(index: list[int]) -> None:
    """Also when there are not as many as before: what is asked afterwards is right, and free where nothing changed."""
    net, order = Net(), torch.tensor(index, dtype=torch.long)
    denoiser, x = TokenNetwork(net, PROCESS, call, timed=False), torch.arange(24).view(4, 6) % 5
    cond, begun = {"shift": torch.arange(4.0)}, denoiser.begin(torch.ones(1))
    with torch.no_grad():
        begun.predict(x, torch.ones(4), cond)
        net.rows, here = 0, {"shift": cond["shift"][order]}
        raw = begun.pick(order).predict(x[order], torch.ones(len(index)), here).raw
        assert net.rows == 0 if len(index) == 4 else net.rows <= len(index)
        assert torch.equal(raw, denoiser.predict(x[order], torch.ones(len(index)), here).raw)


def test_selection_looks_ahead_with_a_cache_of_its_own() -> None:
    """Three candidates of each row; the walk's cache and that of the lookahead do not meet."""

    def selected(timed: bool) -> tuple[Tensor, int]:
        net, gen = Net(), torch.Generator().manual_seed(2)
        denoiser, grid = TokenNetwork(net, PROCESS, call, timed=timed), times(40, PROCESS)
        value = lookahead(denoiser.begin(grid), lambda x: x.double().sum(1), 1.0)
        x, cond = torch.full((8, 6), 4), {"shift": torch.arange(8.0)}
        return select(denoiser, mask(), x, grid, value, 3, 1.0, cond, gen), net.rows

    (x, rows), (want, all_rows) = selected(False), selected(True)
    assert torch.equal(x, want) and all_rows == 8 * (40 + 3 * 39) and rows < 0.6 * all_rows
