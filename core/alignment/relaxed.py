"""DRAKES (Wang et al. 2024, arXiv 2410.13643): walks on tokens whose last draws are soft and pass a reward's gradient.

Legend: B samples, L length, V letters; rows [B,L,V+1] have the mask's chance last.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from limbeck.core.alignment import config as settings
from limbeck.core.alignment.tuning import Tuning
from limbeck.core.diffusion.denoiser import Denoiser, Encoded
from limbeck.core.diffusion.discrete import TokenKernel, TokenProcess, argmax_rows
from limbeck.core.diffusion.draws import Generator
from limbeck.core.diffusion.sampling import Kernel, Step, trajectory, usual
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput


def walk(
    ctx: Context,
    config: settings.Drakes,
    denoiser: Denoiser,
    kernel: Kernel,
    x: Tensor,
    times: Tensor,
    cond: Encoded,
    gen: Generator,
    last: int,
) -> Iterator[Step]:
    """Hard draws from x, ids [B,L], along times [K+1], then `last` soft ones, which keep their graph: rows [B,L,V+1].

    A hard state carries no gradient; its prediction has one where the KL is summed over all steps. Deviations from the
    authors: hard draws are exact in float64, and no second pass over the states gives the KL.
    """
    turn, soft = len(times) - 1 - last, kernel.relax(ctx.at(config.tau))
    priced = turn if config.kl_steps == "all" else 0
    for step in trajectory(denoiser, kernel, x, times[: turn + 1], cond, gen, priced, config.remat):
        x = step.x_next
        yield step
    yield from trajectory(denoiser, soft, x, times[turn:], cond, gen, last, config.remat)


def letters(x: Tensor) -> Tensor:
    """Straight-through words [B,L,V] of the rows at the end: one-hot forward, the rows' gradient backward.

    A soft state of mask mass m ends with m(1 - m) of it left (0 for hard ones); that part chooses no letter and has no
    gradient of its own.
    """
    return argmax_rows(x, x.shape[-1] - 1)


def needed_tokens(tuning: Tuning) -> None:
    """BadInput unless the model's walks draw tokens by a step that has a soft form."""
    model = tuning.source.model
    if not isinstance(model.denoiser.process, TokenProcess):
        raise BadInput("drakes tunes a model of tokens and the teacher is continuous; use draft")
    if not isinstance(usual(model), TokenKernel):
        raise BadInput("drakes needs draws that have a soft form and the model's own sampler has none; use ddpo")
