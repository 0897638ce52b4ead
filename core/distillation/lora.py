"""LoRA as a patch: low-rank updates hooked onto a frozen denoiser, so that one copy is teacher and critic at once."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Output


class LoRA(nn.Module):
    """W x + (alpha/rank) B A x on every linear and 2-D convolution of `net`; B = 0 at the start.

    `targets` keeps only the layers whose name is, or ends in a dot and, one of these, where `*` is anything; A and B
    are float32 at least.
    Outside `on()` the hooks return None, that is, the frozen layer's own output object: bit-exactly the base.
    """

    def __init__(self, net: nn.Module, rank: int, alpha: float | None = None, targets: Sequence[str] = ()) -> None:
        super().__init__()
        self.scale, self.active = (alpha or rank) / rank, False
        self.down, self.up = nn.ModuleDict(), nn.ModuleDict()
        for name, layer in net.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and _wanted(name, targets):
                key = name.replace(".", "/")  # a ModuleDict's keys have no dots
                self.down[key], self.up[key] = _pair(layer, rank)
                layer.register_forward_hook(self._hook(key), with_kwargs=True)
        if not self.down:
            raise ValueError("LoRA found no linear or 2-D convolution in this net; use critic.kind: full")

    def _hook(self, key: str) -> Callable[[nn.Module, Any, Any, Tensor], Tensor | None]:
        def add(layer: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], out: Tensor) -> Tensor | None:
            if not self.active:
                return None
            down, up, x = self.down[key], self.up[key], args[0] if args else named["input"]
            extra: Tensor = self.scale * up(down(x.to(next(down.parameters()).dtype)))
            return out + extra.to(out.dtype)

        return add

    @contextmanager
    def on(self) -> Iterator[None]:
        """The net is base + LoRA inside."""
        before, self.active = self.active, True
        ON.append(self)
        try:
            yield
        finally:
            ON.pop()
            self.active = before


ON: list[LoRA] = []  # the patches that are on, the last one the innermost


def recomputed(module: nn.Module, *args: Any) -> Any:
    """A module's output, its inside computed again in the backward pass under the patches that are on now.

    For `enable_gradient_checkpointing` of diffusers' nets; with torch's own they would all be off by then.
    """
    on = tuple(ON)

    @contextmanager
    def again() -> Iterator[None]:
        with ExitStack() as stack:
            for patch in on:
                stack.enter_context(patch.on())
            yield

    return checkpoint(
        module, *args, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: (nullcontext(), again())
    )


def _wanted(name: str, targets: Sequence[str]) -> bool:
    return not targets or any(fnmatchcase(f".{name}", f"*.{target}") for target in targets)


def _pair(layer: nn.Linear | nn.Conv2d, rank: int) -> tuple[nn.Module, nn.Module]:
    """A (Gaussian, 1/rank) and B (zero) for one layer, on its device."""
    down: nn.Linear | nn.Conv2d
    up: nn.Linear | nn.Conv2d
    if isinstance(layer, nn.Linear):
        down, up = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)
    else:
        shape: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        down = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, bias=False, **shape)  # type: ignore[arg-type]
        up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
    nn.init.normal_(down.weight, std=1 / rank)
    nn.init.zeros_(up.weight)
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)  # small updates are lost in half precision
    return down.to(layer.weight.device, dtype), up.to(layer.weight.device, dtype)


class Patched(Denoiser):
    """The base denoiser with its LoRA switched on. The base is not a child: its parameters stay the teacher's."""

    def __init__(self, base: Denoiser, lora: LoRA) -> None:
        super().__init__(base.process, base.kind)
        self.lora, self._base = lora, (base,)

    def forward(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Output:
        """The base's own forward (raw, or raw and features) with the patch on."""
        with self.lora.on():
            return self._base[0](x_t, t, cond, features)


def merged(denoiser: Denoiser) -> Denoiser:
    """A copy of a patched denoiser's base with W + (alpha/rank) B A written into its weights; others as they are."""
    if not isinstance(denoiser, Patched):
        return denoiser
    return written(denoiser.lora, copy.deepcopy(denoiser._base[0]))


Net = TypeVar("Net", bound=nn.Module)


def written(lora: LoRA, net: Net) -> Net:
    """The net itself, W + (alpha/rank) B A in its weights; a copy of the one that the LoRA was made for."""
    with torch.no_grad():
        for key, down in lora.down.items():
            weight = net.get_submodule(key.replace("/", ".")).get_parameter("weight")
            low, high = (layer.get_parameter("weight").flatten(1) for layer in (down, lora.up[key]))
            weight.add_((lora.scale * (high @ low)).view_as(weight))
    return net
