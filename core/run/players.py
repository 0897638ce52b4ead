"""Who is trained: players (parameters, optimiser, EMA, cadence), phases, and objectives made of them."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from limbeck.core.run.config import OptimConfig
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput, did_you_mean
from limbeck.core.run.muon import Muon
from limbeck.core.scheduled import Scheduled, at


class Player:
    """A named set of parameters with its optimiser, learning-rate law, cadence and EMA."""

    def __init__(
        self, name: str, params: Mapping[str, nn.Parameter] | nn.Module, config: OptimConfig, total_steps: int
    ) -> None:
        """A module gives its parameters that require grad now; `total_steps` is the length of the decay."""
        self.name, self.config, self.total_steps = name, config, total_steps
        self.module: nn.Module | None = None
        self.shards: list[Any] = []  # the FSDP modules inside, once sharded
        if isinstance(params, nn.Module):
            self.module = params
            params = {n: p for n, p in params.named_parameters() if p.requires_grad}
        self.bind(params)

    def bind(self, params: Mapping[str, nn.Parameter]) -> None:
        """Take these parameters (again, when sharding has replaced them): fresh optimiser, fresh EMA."""
        if not params:
            raise BadInput(f'player "{self.name}" has no parameters to train; unfreeze some or drop the player')
        self.params: dict[str, nn.Parameter] = dict(params)
        self.tensors = list(self.params.values())
        self.optim = _optimiser(self.config, self._groups())
        self.ema: dict[str, Tensor] | None = None
        if self.config.ema is not None:
            self.ema = {n: p.detach().to(_at_least_float32(p.dtype), copy=True) for n, p in self.params.items()}
        self._average = list(self.ema.values()) if self.ema else []

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters with one learning rate each: those without a name in `rates`, then a group a name."""
        chosen = {n: max((k for k in self.config.rates if k in n), key=len, default="") for n in self.params}
        for key in sorted(set(self.config.rates) - set(chosen.values())):
            raise BadInput(f'optim.rates: player "{self.name}" has no {key}{did_you_mean(key, self.params)}')
        keys = [key for key in ("", *self.config.rates) if key in chosen.values()]
        groups = [[p for n, p in self.params.items() if chosen[n] == key] for key in keys]
        return [{"params": g, "factor": self.config.rates.get(k, 1.0)} for k, g in zip(keys, groups, strict=True)]

    def due(self, step: int) -> bool:
        """Whether the player trains at this step."""
        return step % self.config.every == 0

    def lr(self, step: int) -> float:
        """The learning rate at `step`: schedule times warm-up times decay."""
        c = self.config
        rise = min(1.0, (step + 1) / c.warmup) if c.warmup else 1.0
        left = min(1.0, step / max(1, self.total_steps))
        fall = {"constant": 1.0, "linear": 1 - left, "cosine": 0.5 * (1 + math.cos(math.pi * left))}[c.decay]
        return at(c.lr, step) * rise * fall

    def step(self, step: int) -> None:
        """One optimiser update from the gradients at hand, then the EMA; clears the gradients."""
        lr, weight_decay = self.lr(step), at(self.config.weight_decay, step)
        for group in self.optim.param_groups:
            group.update(lr=lr * group["factor"], weight_decay=weight_decay)
        self.optim.step()
        self.optim.zero_grad(set_to_none=True)
        self.reshard()
        if self.config.ema is not None:
            n = step // self.config.every
            decay = min(at(self.config.ema, step), (1 + n) / (10 + n))
            with torch.no_grad():
                new = [p.to(e.dtype) for p, e in zip(self.tensors, self._average, strict=True)]
                torch._foreach_lerp_(self._average, new, 1 - decay)

    def reshard(self) -> None:
        """Drop whole copies of sharded weights: the next forward gathers what is current."""
        for module in self.shards:
            module.reshard()

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """The parameters are the EMA inside (where there is one), and exactly what they were afterwards."""
        if not self.ema:
            yield
            return
        kept = [p.detach().clone() for p in self.tensors]
        try:
            _copy(self.tensors, self._average)
            self.reshard()
            yield
        finally:
            _copy(self.tensors, kept)
            self.reshard()

    def state(self) -> dict[str, Tensor]:
        """`param/<p>`, `ema/<p>` and `optim/<p>/<slot>`, as references (no copies)."""
        out: dict[str, Tensor] = {f"param/{n}": p.detach() for n, p in self.params.items()}
        out |= {f"ema/{n}": e for n, e in (self.ema or {}).items()}
        for name, p in self.params.items():
            slots = self.optim.state.get(p, {})
            out |= {f"optim/{name}/{slot}": v for slot, v in slots.items() if isinstance(v, Tensor)}
        return out

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Bring back what `state()` gave; names and shapes must agree exactly."""
        self.load_weights({n: state[f"param/{n}"] for n in self.params if f"param/{n}" in state})
        if self.ema:
            _refuse_unless_same(self.name, self.ema, {n: state[f"ema/{n}"] for n in self.ema if f"ema/{n}" in state})
            _copy(self._average, [place(state[f"ema/{n}"], e) for n, e in self.ema.items()])
        self.optim.state.clear()
        for name, p in self.params.items():
            prefix = f"optim/{name}/"
            slots = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
            if slots:
                fused = bool(self.optim.param_groups[0].get("fused"))
                self.optim.state[p] = {slot: _slot(slot, value, p, fused) for slot, value in slots.items()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set the parameters alone."""
        _refuse_unless_same(self.name, self.params, weights)
        _copy(self.tensors, [place(weights[n], p) for n, p in self.params.items()])
        self.reshard()


@dataclass
class Phase:
    """One backward of a step.

    `loss` gives named scalar terms, means over this process's rows; their sum is backwarded, a key that starts with
    "_" is only logged. `after_backward` runs before clipping and the update (it may read the gradients).
    """

    players: tuple[str, ...]
    loss: Callable[[], dict[str, Tensor]]
    after_backward: Callable[[], None] | None = None


class Objective(Protocol):
    """Who is trained, when, on what; what it keeps between steps goes through state() and load()."""

    players: dict[str, Player]

    def phases(self, ctx: Context) -> Iterator[Phase]:
        """The phases of one step; the code after a yield runs once that phase's update is done."""

    def state(self) -> dict[str, Tensor]:
        """Tensors to keep in the checkpoint."""

    def load(self, state: dict[str, Tensor]) -> None:
        """Bring them back."""


class Single:
    """An objective of one player and one phase that keeps nothing else between steps: a subclass gives `terms`."""

    def __init__(self, player: Player) -> None:
        self.player, self.players = player, {player.name: player}

    def terms(self, ctx: Context) -> dict[str, Tensor]:
        """The phase's terms, as in `Phase.loss`."""
        raise NotImplementedError

    def phases(self, ctx: Context) -> Iterator[Phase]:
        """The one phase."""
        yield Phase((self.player.name,), lambda: self.terms(ctx))

    def state(self) -> dict[str, Tensor]:
        """Nothing beside the player."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Nothing to bring back."""


def compose(objectives: list[Objective], weights: list[Scheduled]) -> Objective:
    """Several weighted losses as one objective; one loss of weight 1 is returned as it is."""
    plain = len(objectives) == 1 and weights[0] == 1.0
    return objectives[0] if plain else Composed(objectives, weights)


class Composed:
    """The i-th phases of all parts run together; those that train the same players are summed into one backward."""

    def __init__(self, objectives: list[Objective], weights: list[Scheduled]) -> None:
        self.objectives, self.weights = objectives, weights
        self.players: dict[str, Player] = {}
        for name, player in itertools.chain.from_iterable(o.players.items() for o in objectives):
            if self.players.setdefault(name, player) is not player:
                raise BadInput(f'two losses each made their own player "{name}"; share it through build.player()')

    def phases(self, ctx: Context) -> Iterator[Phase]:
        """Round by round, merged by players, in the order of the losses."""
        running = [(i, o.phases(ctx)) for i, o in enumerate(self.objectives)]
        while running:
            now = [(i, phases, phase) for i, phases in running if (phase := next(phases, None)) is not None]
            running = [(i, phases) for i, phases, _ in now]
            groups: dict[tuple[str, ...], list[tuple[int, Phase]]] = {}
            for i, _, phase in now:
                groups.setdefault(phase.players, []).append((i, phase))
            for players, members in groups.items():
                yield Phase(players, lambda m=members: self._loss(m, ctx), lambda m=members: _after(m))  # type: ignore[misc]

    def _loss(self, members: list[tuple[int, Phase]], ctx: Context) -> dict[str, Tensor]:
        """Terms times their loss's weight, named apart where two losses use one name."""
        out: dict[str, Tensor] = {}
        for i, phase in members:
            weight = ctx.at(self.weights[i])
            for key, value in phase.loss().items():
                name = f"{key}.{i}" if key in out else key
                out[name] = value if key.startswith("_") else value * weight
        return out

    def state(self) -> dict[str, Tensor]:
        """`<index>/<key>` of every part."""
        return {f"{i}/{key}": value for i, o in enumerate(self.objectives) for key, value in o.state().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Each part gets its own keys."""
        for i, objective in enumerate(self.objectives):
            objective.load({k.partition("/")[2]: v for k, v in state.items() if k.partition("/")[0] == str(i)})


def _after(members: list[tuple[int, Phase]]) -> None:
    for _, phase in members:
        if phase.after_backward:
            phase.after_backward()


def _optimiser(config: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Fused where torch has a fused kernel (one call for all tensors), else foreach."""
    tensors = [tensor for group in groups for tensor in group["params"]]
    rest: dict[str, Any] = {"lr": at(config.lr, 0), "weight_decay": at(config.weight_decay, 0)}
    if config.kind == "muon":
        if _sharded(tensors):
            raise BadInput("optim.kind: muon needs whole matrices; use adamw with distributed.shard")
        return Muon(groups, betas=config.betas, eps=config.eps, **rest)
    fused = all(t.is_floating_point() and t.device.type in ("cpu", "cuda") for t in tensors) and not _sharded(tensors)
    rest["fused" if fused else "foreach"] = True
    if config.kind == "sgd":
        return torch.optim.SGD(groups, momentum=config.betas[0], **rest)
    law = torch.optim.AdamW if config.kind == "adamw" else torch.optim.Adam
    return law(groups, betas=config.betas, eps=config.eps, **rest)


def _sharded(tensors: list[nn.Parameter]) -> bool:
    return any(hasattr(t, "full_tensor") for t in tensors)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """An average of many small changes is lost in half precision."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _copy(to: list[Any], new: list[Tensor]) -> None:
    with torch.no_grad():
        for old, value in zip(to, new, strict=True):
            old.copy_(value)


def place(full: Tensor, like: Tensor) -> Tensor:
    """A full tensor on the device of `like`, laid out in memory as it is (sums depend on it), sharded as it is."""
    if not hasattr(like, "full_tensor"):
        full = full.to(like.device)
        return full if full.stride() == like.stride() else torch.empty_like(like, dtype=full.dtype).copy_(full)
    from torch.distributed.tensor import DTensor, distribute_tensor

    like = cast(DTensor, like)
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements)


def _slot(name: str, value: Tensor, p: Tensor, fused: bool) -> Tensor:
    """A fresh optimiser tensor: moments are placed like their parameter; torch wants an unfused counter on the CPU."""
    value = value.clone()
    if name == "step":
        return value.to(p.device) if fused else value.cpu()
    return place(value, p)


def _refuse_unless_same(player: str, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    wrong = [n for n, p in mine.items() if n not in theirs or theirs[n].shape != p.shape]
    if wrong:
        n = wrong[0]
        has = f"has shape {list(theirs[n].shape)}" if n in theirs else "is missing"
        raise BadInput(
            f'player "{player}": {n} {has} in the checkpoint, {list(mine[n].shape)} is needed '
            f"({len(wrong)} of {len(mine)} tensors differ); use the recipe that the run was made with"
        )
