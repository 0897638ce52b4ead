"""Score operators: what teacher (and critic) predictions say about a sample, as a residual.

Legend: B batch, *S sample dims. Every operator is a pure function of predictions and returns `r[B, *S]` in its stated
space, signed so that descending `w * r` on the sample moves it towards the teacher. Branches are fetched by
`matching.Residual` in one batched forward per net; an operator never calls a net, draws noise or weighs by time.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import Prediction
from limbeck.core.diffusion.process import expand

BRANCHES = ("teacher", "cond", "uncond", "negative", "later", "critic", "x", "eps", "h")
EPS_X0 = 1e-5  # floor of the DMD normaliser: in 1-2 dimensions a single sample can be nearly exact


def rows(value: Tensor, like: Tensor) -> Tensor:
    """A number per sample [B] (or per frame or token, [B,1,F,1,1] or [B,L]), shaped to multiply `like` [B, *S]."""
    return expand(value.to(like.dtype), like)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product per sample: [B, *S] x [B, *S] -> [B]."""
    return (a * b).flatten(1).sum(1)


def min_norm(g1: Tensor, g2: Tensor) -> Tensor:
    """The shortest vector of the segment [g1, g2], per sample (MGDA for two objectives)."""
    gap = dot(g1 - g2, g1 - g2)
    a = (dot(g2 - g1, g2) / gap.clamp_min(torch.finfo(gap.dtype).tiny)).clamp(0, 1)  # g1 = g2 gives 0/tiny = 0
    return rows(a, g1) * g1 + rows(1 - a, g1) * g2


@dataclass(frozen=True)
class Operator:
    """A residual with its space, weight law and what it reads: the names of its arguments.

    Branches: teacher (guided), cond, uncond, negative, later (the teacher at t2 > t), critic, x, eps, h. A last
    argument `scale` is the operator's own free factor, with the paper's value as default.
    """

    residual: Callable[..., Tensor]
    space: Literal["eps", "x0"]
    weight: str
    reads: tuple[str, ...]
    scaled: bool

    def __call__(self, *branches: Prediction | Tensor, scale: float | None = None) -> Tensor:
        return self.residual(*branches) if scale is None else self.residual(*branches, scale=scale)

    def on(self, branches: Mapping[str, Prediction | Tensor], scale: float | None = None) -> Tensor:
        """The residual of the branches it reads, found by name."""
        return self(*(branches[name] for name in self.reads), scale=scale)


def operator(space: Literal["eps", "x0"], weight: str) -> Callable[[Callable[..., Tensor]], Operator]:
    """Make a function of branches an operator (plugins too): its argument names say what is fetched for it."""

    def make(residual: Callable[..., Tensor]) -> Operator:
        names = tuple(inspect.signature(residual).parameters)
        unknown = [name for name in names if name not in BRANCHES and name != "scale"]
        if unknown:
            raise ValueError(f"an operator cannot read {unknown[0]}; it may read {', '.join(BRANCHES)}")
        reads = tuple(name for name in names if name != "scale")
        return Operator(residual, space, weight, reads, "scale" in names)

    return make


@operator("eps", "sigma2")
def sds(teacher: Prediction, eps: Tensor) -> Tensor:
    """DreamFusion eq. 3, eps space: the guided prediction against the noise that was drawn."""
    return teacher.eps - eps


@operator("eps", "sigma2")
def csd(cond: Prediction, uncond: Prediction) -> Tensor:
    """CSD (Classifier Score Distillation), eps space: the classifier direction alone; SDS(g) - SDS(1) = (g - 1) CSD."""
    return cond.eps - uncond.eps


@operator("eps", "sigma2")
def nfsd(cond: Prediction, uncond: Prediction, negative: Prediction, scale: float = 7.5) -> Tensor:
    """NFSD (noise-free), eps space: eps_u (less eps of a bad-quality prompt where t >= .2) + s times the classifier."""
    noisy = rows(uncond.t >= 0.2, uncond.eps)
    return uncond.eps - noisy * negative.eps + scale * (cond.eps - uncond.eps)


@operator("eps", "sigma2")
def vsd(teacher: Prediction, critic: Prediction) -> Tensor:
    """ProlificDreamer eq. 9 (and SwiftBrush, Diff-Instruct), eps space: teacher against the score of the outputs."""
    return teacher.eps - critic.eps


@operator("eps", "sigma2")
def asd(teacher: Prediction, later: Prediction) -> Tensor:
    """ASD (ScaleDreamer), eps space: the same noise at a LARGER t, conditional and without guidance, is the critic."""
    return teacher.eps - later.eps


@operator("eps", "alpha")
def bsd(cond: Prediction, uncond: Prediction, scale: float = 18.0) -> Tensor:
    """BSD (PlacidDreamer), eps space, weight alpha: min-norm of lambda (eps_c - eps_u) and eps_u (no -eps term)."""
    return min_norm(scale * (cond.eps - uncond.eps), uncond.eps)


@operator("eps", "one")
def auto_bsd(cond: Prediction, uncond: Prediction, eps: Tensor, scale: float = 1.25) -> Tensor:
    """PlacidDreamer's auto variant, eps space; its scale ||eps_u - eps|| sigma/50 per sample, not per batch."""
    noise = uncond.eps - eps
    _, sigma = uncond.process.coefficients(uncond.t, eps)
    return sigma / 50 * rows(dot(noise, noise).sqrt(), eps) * min_norm(cond.eps - uncond.eps, scale * noise)


@operator("x0", "one")
def dmd(x: Tensor, teacher: Prediction, critic: Prediction) -> Tensor:
    """DMD (used by DMD2), x0 space: critic minus teacher over the sample's own mean |x - teacher|."""
    size = (x - teacher.x0).abs().flatten(1).mean(1).clamp_min(EPS_X0)
    return (critic.x0 - teacher.x0) / rows(size, teacher.x0)


@operator("x0", "one")
def f_distill(x: Tensor, teacher: Prediction, critic: Prediction, h: Tensor) -> Tensor:
    """f-distill, x0 space: DMD's residual weighed per sample by h(r)/mean h(r), r = p_teacher/p_student."""
    r = dmd(x, teacher, critic)
    return rows(h, r) * r


OPERATORS: Mapping[str, Operator] = {
    "sds": sds, "csd": csd, "nfsd": nfsd, "vsd": vsd, "asd": asd, "bsd": bsd, "auto_bsd": auto_bsd, "dmd": dmd,
    "f_distill": f_distill,
}  # fmt: skip


@dataclass(frozen=True)
class Divergence:
    """An f-divergence D_f(p || q) = E_q f(p/q): `f` and the weight `h = f''(r) r^2` of its score form."""

    f: Callable[[Tensor], Tensor]
    h: Callable[[Tensor], Tensor]


DIVERGENCES: Mapping[str, Divergence] = {
    "rkl": Divergence(lambda r: -r.log(), torch.ones_like),
    "kl": Divergence(lambda r: r * r.log(), lambda r: r),
    "js": Divergence(lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(), lambda r: r / (1 + r)),
    "sf": Divergence(lambda r: (r + 1) * ((r + 1) / (2 * r)).log(), lambda r: 1 / (1 + r)),
    "sh": Divergence(lambda r: 1 - r.sqrt(), lambda r: r.sqrt() / 4),
    "jf": Divergence(lambda r: (r - 1) * r.log(), lambda r: 1 + r),
    "neyman": Divergence(lambda r: (1 - r) ** 2 / r, lambda r: 2 / r),
    "pearson": Divergence(lambda r: (r - 1) ** 2, lambda r: 2 * r**2),
}


def surrogate(x: Tensor, r: Tensor, w: Tensor | float = 1.0, b_global: int | None = None) -> Tensor:
    """A scalar whose gradient on x [B, *S] is exactly w*r/B (summed over the sample); its value is ||w r||^2 / 2B.

    Papers that take the mean over elements (SwiftBrush, DMD2) differ by numel: give w = 1/numel.
    """
    step = (rows(w, r) if isinstance(w, Tensor) else w) * r
    step = (step / (b_global or len(x))).detach().to(x.dtype)
    return ((x - x.detach()) * step).sum() + 0.5 * (b_global or len(x)) * step.square().sum()
