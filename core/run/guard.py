"""Before an update: the sum of a phase's terms, one fused finite check, clipping, and the fp16 loss scale."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.core.run.distributed import full
from limbeck.core.run.errors import BadInput, LimbeckError, NonFinite
from limbeck.core.run.players import Player
from limbeck.core.scheduled import at


@dataclass
class LossScale:
    """Dynamic scale of the loss for fp16: halved and the update skipped on overflow, doubled after 2000 good steps."""

    value: float = 2.0**16
    good: int = 0

    def update(self, finite: bool) -> None:
        """Account for one phase."""
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good == 2000:
            self.value, self.good = self.value * 2, 0


def check(
    players: Sequence[Player], terms: dict[str, Tensor], loss: Tensor, step: int, scale: LossScale | None
) -> list[float] | None:
    """Each player's gradient norm, from one transfer; NonFinite before anything is updated (fp16: None, skip)."""
    grads = [[p.grad for p in player.tensors if p.grad is not None] for player in players]
    if scale:
        for group in grads:
            torch._foreach_mul_(group, 1 / scale.value)
    norms = [full(torch.nn.utils.get_total_norm(group)) if group else loss.new_zeros(()) for group in grads]
    wide = torch.float64 if loss.dtype == torch.float64 else torch.float32
    values: list[float] = torch.stack([value.to(wide) for value in (loss, *norms)]).tolist()
    finite = all(map(_finite, values))
    if scale:
        scale.update(finite)
    if finite:
        return values[1:]
    skip = scale is not None and _finite(values[0]) and scale.value >= 2**-10
    where = ("", "") if skip else _find(players, terms, values)
    for player in players:
        player.optim.zero_grad(set_to_none=True)
    if skip:
        return None
    raise NonFinite(where[0], step, where[1])


def total(players: Sequence[str], terms: dict[str, Tensor]) -> Tensor:
    """The sum of a phase's terms (those that are not only logged)."""
    parts = [value for key, value in terms.items() if not key.startswith("_")]
    whole: Any = sum(parts[1:], parts[0]) if parts else None
    if whole is None or not whole.requires_grad:
        raise LimbeckError(f"the loss {sorted(terms)} does not depend on the parameters of {', '.join(players)}")
    if whole.dim():
        raise BadInput(f"the loss {sorted(terms)} of {', '.join(players)} must be scalar, not {list(whole.shape)}")
    return whole


def clip(player: Player, norm: float, step: int) -> None:
    """Scale the gradients down to the player's largest norm at this step."""
    if player.config.clip is not None and norm > (limit := at(player.config.clip, step)):
        torch._foreach_mul_([p.grad for p in player.tensors if p.grad is not None], limit / (norm + 1e-6))


def _find(players: Sequence[Player], terms: dict[str, Tensor], values: list[float]) -> tuple[str, str]:
    """The player and the tensor to blame; only searched once the fused check has failed."""
    for key, term in terms.items():
        if not key.startswith("_") and not bool(torch.isfinite(term.detach()).all()):
            return players[0].name, f'loss "{key}"'
    for player, norm in zip(players, values[1:], strict=True):
        for name, p in player.params.items():
            if p.grad is not None and not bool(torch.isfinite(_local(p.grad)).all()):
                return player.name, f"the gradient of {name}"
        if not _finite(norm):
            return player.name, "the gradient's norm"
    return players[0].name, "the loss (of another process)"


def _local(tensor: Tensor) -> Any:
    """This process's part of a sharded tensor: the search must not wait for others."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _finite(value: float) -> bool:
    return value - value == 0.0
