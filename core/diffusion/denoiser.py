"""The denoiser seam: what a network says about x_t in whatever form, and several questions in one forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from limbeck.core.diffusion.codec import Codec
from limbeck.core.diffusion.process import EDM, VP, Process, convert
from limbeck.core.diffusion.time import times

if TYPE_CHECKING:
    from limbeck.core.diffusion.sampling import Kernel

Encoded = dict[str, Tensor]
Features = list[Tensor]
Output = Tensor | tuple[Tensor, Features]
Query = tuple[Tensor, Tensor, Encoded]
Call = Callable[[nn.Module, Tensor, Tensor, Encoded], Tensor]


def cat_cond(conds: Sequence[Encoded]) -> Encoded:
    """Join conditions along the batch; all must have the same keys and row shapes."""
    keys = set(conds[0])
    for cond in conds:
        if set(cond) != keys:
            raise ValueError(f"conditions have keys {sorted(keys)} and {sorted(cond)}; give each key its null value")
    return {key: torch.cat([cond[key] for cond in conds]) for key in conds[0]}


def repeat_cond(cond: Encoded, n: int) -> Encoded:
    """A condition of one row as n rows; a condition of n rows as it is."""
    return {key: value.expand(n, *value.shape[1:]) if len(value) == 1 else value for key, value in cond.items()}


def index_cond(cond: Encoded, index: Tensor | slice) -> Encoded:
    """The rows of a condition that `index` picks."""
    return {key: value[index] for key, value in cond.items()}


def rows(t: Tensor, n: int) -> Tensor:
    """t with a batch axis: a scalar becomes [n]."""
    return t.expand(n) if t.ndim == 0 else t.expand(n, *t.shape[1:])


class Prediction:
    """A raw output with its reading: .x0 .eps .v .score .flow .velocity are [B,*S], lazy, cached, float32 at least."""

    def __init__(
        self, raw: Tensor, x_t: Tensor, t: Tensor, process: Process, kind: str, features: Features | None = None
    ) -> None:
        self.raw, self.x_t, self.t, self.process, self.kind, self.features = raw, x_t, t, process, kind, features
        self._cache: dict[str, Tensor] = {}

    def as_kind(self, kind: str) -> Tensor:
        """The prediction read as `kind`."""
        if kind not in self._cache:
            self._cache[kind] = convert(self.raw, self.x_t, self.t, self.process, self.kind, kind)
        return self._cache[kind]

    @property
    def x0(self) -> Tensor:
        """The clean sample."""
        return self.as_kind("x0")

    @property
    def eps(self) -> Tensor:
        """The noise."""
        return self.as_kind("eps")

    @property
    def v(self) -> Tensor:
        """alpha eps - sigma x0."""
        return self.as_kind("v")

    @property
    def score(self) -> Tensor:
        """grad log p_t(x_t) = -eps/sigma."""
        return self.as_kind("score")

    @property
    def flow(self) -> Tensor:
        """eps - x0."""
        return self.as_kind("flow")

    @property
    def velocity(self) -> Tensor:
        """dx_t/dt along the path."""
        return self.as_kind("velocity")

    def split(self, sizes: Sequence[int]) -> list[Prediction]:
        """Cut along the batch."""
        bounds = [0]
        for size in sizes:
            bounds.append(bounds[-1] + size)
        return [self.pick(slice(a, b)) for a, b in zip(bounds, bounds[1:], strict=False)]

    def pick(self, part: slice | Tensor) -> Prediction:
        """Rows of the batch, by a slice or an index."""
        features = None if self.features is None else [feature[part] for feature in self.features]
        return type(self)(self.raw[part], self.x_t[part], self.t[part], self.process, self.kind, features)

    def replace(self, x0: Tensor) -> Prediction:
        """The same question answered with another x0 (clipped, rescaled, projected)."""
        return Prediction(x0, self.x_t, self.t, self.process, "x0", self.features)

    def detach(self) -> Prediction:
        """Without graph, on the inputs as well."""
        features = None if self.features is None else [feature.detach() for feature in self.features]
        return type(self)(self.raw.detach(), self.x_t.detach(), self.t, self.process, self.kind, features)

    def double(self) -> Prediction:
        """Converted in float64 (the VP end of large models, where 1/alpha is 15)."""
        return type(self)(self.raw.double(), self.x_t.double(), self.t, self.process, self.kind, self.features)


class Denoiser(nn.Module):
    """A network whose output at (x_t [B,*S], t, cond) reads as `kind` under `process`."""

    process: Process
    kind: str

    def __init__(self, process: Process, kind: str) -> None:
        super().__init__()
        self.process, self.kind = process, kind

    def forward(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Output:
        """The raw output [B,*S], or (raw, features) when features are asked for."""
        raise NotImplementedError

    def wrap(self, raw: Tensor, x_t: Tensor, t: Tensor, features: Features | None = None) -> Prediction:
        """Read a raw output."""
        return Prediction(raw, x_t, t, self.process, self.kind, features)

    def predict(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Prediction:
        """One forward, read as a Prediction. Conditions of one row serve the whole batch."""
        t, cond = rows(t.to(x_t.device), len(x_t)), repeat_cond(cond, len(x_t))
        out = self(x_t, t, cond, True) if features else self(x_t, t, cond)
        raw, taps = out if isinstance(out, tuple) else (out, None)
        if features and taps is None:
            raise ValueError(f"{type(self).__name__} gives no features; name the layers to tap when it is built")
        return self.wrap(raw, x_t, t, taps)

    def begin(self, times: Tensor) -> Denoiser:
        """Open the state of one trajectory; stateless denoisers return themselves."""
        return self

    def pick(self, index: Tensor) -> Denoiser:
        """This denoiser for the rows `index` of its batch (resampling); those that keep nothing per row stay."""
        return self


def predict(denoiser: Denoiser, queries: Sequence[Query], features: bool = False) -> list[Prediction]:
    """Answer several (x_t, t, cond) in ONE forward; a cond of one row serves its whole query."""
    sizes = [len(x_t) for x_t, _, _ in queries]
    x_t = torch.cat([x for x, _, _ in queries])
    t = torch.cat([rows(t, n).to(x_t.device) for (_, t, _), n in zip(queries, sizes, strict=True)])
    cond = cat_cond([repeat_cond(c, n) for (_, _, c), n in zip(queries, sizes, strict=True)])
    return denoiser.predict(x_t, t, cond, features).split(sizes)


def index_time(t: Tensor, process: Process) -> Tensor:
    """The network time of discrete-index models: k = count t - 1, whole where t is the float32 of an index time."""
    if not isinstance(process, VP):
        raise ValueError('time_scale="index" is for VP processes; give the factor of t instead')
    k = t.double() * process.count - 1
    whole = k.round()
    return torch.where((k - whole).abs() < 1e-3, whole, k).float()


def plain_call(net: nn.Module, x: Tensor, time: Tensor, cond: Encoded) -> Tensor:
    """net(x, time, **cond), the signature of small nets."""
    return cast(Tensor, net(x, time, **cond))


@contextmanager
def tapped(net: nn.Module, names: Sequence[str]) -> Iterator[Features]:
    """Collect the outputs of the named submodules during a forward, in the order they run."""
    found: Features = []

    def keep(module: nn.Module, args: object, output: object) -> None:
        found.append(_tensor(output))

    hooks = [net.get_submodule(name).register_forward_hook(keep) for name in names]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _tensor(output: object) -> Tensor:
    while isinstance(output, tuple | list):
        output = output[0]
    if not isinstance(output, Tensor):
        raise ValueError(f"a tapped layer gives {type(output).__name__}, not a tensor; tap another layer")
    return output


class Network(Denoiser):
    """Any net behind `call(net, x, time, cond)`. time = time_scale * t, or the index k for time_scale="index".

    Inputs are cast to the net's dtype; `taps` names the submodules whose outputs are its features.
    """

    def __init__(
        self,
        net: nn.Module,
        process: Process,
        kind: str,
        call: Call = plain_call,
        time_scale: float | str = 1.0,
        taps: Sequence[str] = (),
    ) -> None:
        super().__init__(process, kind)
        if isinstance(time_scale, str) and time_scale != "index":
            raise ValueError(f'time_scale is {time_scale!r}; use a number or "index"')
        self.net, self.call, self.time_scale, self.taps = net, call, time_scale, tuple(taps)

    def forward(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Output:
        x = x_t.to(net_dtype(self.net, x_t))
        time = index_time(t, self.process) if isinstance(self.time_scale, str) else t * self.time_scale
        if not (features and self.taps):
            return self.call(self.net, x, time, cond)
        with tapped(self.net, self.taps) as found:
            raw = self.call(self.net, x, time, cond)
        return raw, [unfolded(feature, len(x_t)) for feature in found]


def unfolded(feature: Tensor, rows: int) -> Tensor:
    """A feature [B, C, …]; where a video net has folded its frames into the batch, [B*F, C, …] as [B, C, F, …]."""
    return feature if len(feature) == rows else feature.reshape(rows, -1, *feature.shape[1:]).transpose(1, 2)


def net_dtype(net: nn.Module, like: Tensor) -> torch.dtype:
    """The dtype of a net's weights (that of `like` for a net without)."""
    return next((p.dtype for p in net.parameters() if p.is_floating_point()), like.dtype)


class Preconditioned(Denoiser):
    """EDM preconditioning (eq. 7) around net(c_in x, c_noise [B], cond); the output reads as x0.

    Written for any (alpha, sigma): the input has variance (alpha d)^2 + sigma^2, d the data's standard deviation.
    c_noise = log(sigma/alpha)/4.
    """

    def __init__(self, net: nn.Module, process: Process, sigma_data: float = 0.5, taps: Sequence[str] = ()) -> None:
        super().__init__(process, "x0")
        self.net, self.sigma_data, self.taps = net, sigma_data, tuple(taps)

    def forward(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Output:
        alpha, sigma = self.process.coefficients(t, x_t)
        norm = torch.sqrt((alpha * self.sigma_data) ** 2 + sigma**2)
        noise = (self.process.ratio(t).clamp(max=1e4).log() / 4).to(alpha.dtype)
        dtype = net_dtype(self.net, x_t)
        with tapped(self.net, self.taps if features else ()) as found:
            out = self.net((x_t / norm).to(dtype), noise.to(dtype), cond)
        raw = (alpha * self.sigma_data**2 / norm**2) * x_t + (sigma * self.sigma_data / norm) * out
        return (raw, found) if features and self.taps else raw


@dataclass
class Sample:
    """What a student made: x [B,*S], for cond, with whatever else it knows (depth, masks, routes …)."""

    x: Tensor
    cond: Encoded
    aux: dict[str, Tensor] = field(default_factory=dict)


class Student(Protocol):
    """Anything with parameters that makes samples from noise."""

    def sample(self, noise: Tensor, cond: Encoded, renoise: list[Tensor] | None = None) -> Sample:
        """Samples for standard normal noise [B,*S]."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """What is trained."""


class FewStep(nn.Module):
    """A denoiser used as a generator at fixed times t_0 > t_1 > …: predict x0, renoise to the next time with new noise.

    One time is the one-step generator. The multi-step sampler is that of consistency models (alg. 1) and DMD2.
    """

    def __init__(self, denoiser: Denoiser, times: Sequence[float]) -> None:
        super().__init__()
        if not times or any(b >= a for a, b in zip(times, times[1:], strict=False)):
            raise ValueError(f"student times {tuple(times)} must fall, such as (1.0, 0.75, 0.5, 0.25)")
        self.denoiser, self.times = denoiser, tuple(times)

    @property
    def steps(self) -> int:
        """How many times the net is asked."""
        return len(self.times)

    @property
    def draws(self) -> int:
        """How many noises one sample takes: one a step."""
        return len(self.times)

    def time(self, k: int, like: Tensor) -> Tensor:
        """times[k] as [B]."""
        return torch.full((len(like),), self.times[k], device=like.device)

    def denoise(self, x_t: Tensor, t: Tensor, cond: Encoded) -> Prediction:
        """The student read as a denoiser."""
        return self.denoiser.predict(x_t, t, cond)

    def sample(self, noise: Tensor, cond: Encoded, renoise: list[Tensor] | None = None) -> Sample:
        """All steps, with gradient through each; `renoise` is one noise per step after the first."""
        x, t = self._walk(noise, cond, len(self.times) - 1, renoise)
        return Sample(self.denoise(x, t, cond).x0, cond)

    def rollout(
        self, noise: Tensor, cond: Encoded, k: int, renoise: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The input at times[k] and its time [B], without gradient: DMD2's backward simulation."""
        with torch.no_grad():
            return self._walk(noise, cond, k, renoise)

    def _walk(self, noise: Tensor, cond: Encoded, k: int, renoise: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        fresh = renoise or []
        if len(fresh) < k:
            raise ValueError(f"step {k} of this student needs {k} renoise tensors, {len(fresh)} given")
        process, t = self.denoiser.process, self.time(0, noise)
        x = process.start(noise, t)
        for i in range(k):
            x0, t = self.denoise(x, t, cond).x0, self.time(i + 1, noise)
            x = process.add_noise(x0, fresh[i], t)
        return x, t


@dataclass
class Model:
    """What the slot `teacher` builds: a denoiser with the space it works in and the text it understands."""

    denoiser: Denoiser
    shape: tuple[int, ...]
    codec: Codec
    encode: Callable[[list[str]], Encoded]
    name: str
    uncond: str = ""
    place: Callable[[Tensor, Encoded], Tensor] = lambda x, cond: x  # writes what the condition fixes into a first state
    kernel: Kernel | None = None  # the one that its walks must take; None: the usual one of its process
    together: int = 1  # neighbours of a batch that it denoises as one, at one t (the views of a scene)

    def group(self, asked: int) -> int:
        """How many neighbours share one t: whole groups of those that were asked for and that it sees together."""
        return math.lcm(asked, self.together)

    def noise(self, count: int, gen: torch.Generator) -> Tensor:
        """Standard normal noise [count,*S] on the generator's device, as the model's own pipeline draws it."""
        return torch.randn(count, *self.shape, generator=gen, device=gen.device)

    def begin(self, noise: Tensor, t: Tensor, cond: Encoded) -> Tensor:
        """The first state x_t [B,*S] of a walk, for standard normal noise [B,*S] and the encoded condition."""
        return self.place(self.denoiser.process.start(noise, t), cond)

    def grid(self, steps: int) -> Tensor:
        """The falling times t_0 > ... > t_steps of the model's own sampler, float32; uniform in t unless it says so."""
        return times(steps, self.denoiser.process)


def start_time(process: Process) -> float:
    """The usual t of a one-step generator: the noise end; sigma 2.5 for EDM (SiD, SIM; DMD2 uses t = 1)."""
    if isinstance(process, EDM):
        return math.pow(2.5 / process.sigma_max, 1 / process.rho)
    return process.t_max
