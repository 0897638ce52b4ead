"""A denoiser with its sampler of many steps, as a student: what rewards tune."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Model, Prediction, Sample, repeat_cond
from limbeck.core.diffusion.discrete import TokenProcess
from limbeck.core.diffusion.draws import Given
from limbeck.core.diffusion.guidance import guided_by, with_scale
from limbeck.core.diffusion.sampling import FirstHitting, trajectory, usual
from limbeck.core.diffusion.time import shifted


class ManyStep(nn.Module):
    """The model's usual walk (DDIM without noise; MDLM's for tokens) on its own grid, or on a shifted one; only
    `denoiser` is trained.

    The same class around the teacher's denoiser is what the student was before training.
    """

    def __init__(
        self, model: Model, denoiser: Denoiser, steps: int, guidance: float, shift: float | None = None
    ) -> None:
        super().__init__()
        self.denoiser, self.steps, self.guidance, self.shift = denoiser, steps, guidance, shift
        self._model = [model]  # not a submodule: its weights are not the student's

    @property
    def draws(self) -> int:
        """Noises that one sample takes: for tokens those of every step too."""
        if not isinstance(self.denoiser.process, TokenProcess):
            return 1
        each = 2 if isinstance(usual(self.model), FirstHitting) else 1
        return 1 + each * (len(self.grid()) - 1)

    @property
    def model(self) -> Model:
        """The model whose grid and null condition are used."""
        return self._model[0]

    def grid(self) -> Tensor:
        """The falling times of its walk, float32 [steps + 1]."""
        if self.shift is None:
            return self.model.grid(self.steps)
        return shifted(self.steps, self.denoiser.process, self.shift)

    def but(self, steps: int | None = None, guidance: float | None = None) -> ManyStep:
        """The same denoiser in other steps or at another scale."""
        scale = self.guidance if guidance is None else guidance
        return ManyStep(self.model, self.denoiser, steps or self.steps, scale, self.shift)

    def before(self) -> ManyStep:
        """The teacher under the same sampler."""
        return ManyStep(self.model, self.model.denoiser, self.steps, self.guidance, self.shift)

    def denoise(self, x_t: Tensor, t: Tensor, cond: Encoded) -> Prediction:
        """The student read as a denoiser, without guidance."""
        return self.denoiser.predict(x_t, t, cond)

    def sample(self, noise: Tensor, cond: Encoded, renoise: list[Tensor] | None = None) -> Sample:
        """x [B,*S] from standard normal noise, without gradient (objectives walk by themselves)."""
        walker = guided_by(self.denoiser, self.model.encode([self.model.uncond]), self.guidance)
        times, cond = self.grid(), repeat_cond(cond, len(noise))
        x = self.model.begin(noise, times[0].expand(len(noise)).to(noise.device), cond)
        gen = Given(renoise) if renoise else None
        with torch.no_grad():
            for step in trajectory(walker, usual(self.model), x, times, with_scale(cond, self.guidance), gen):
                x = step.x_next
        return Sample(x, cond)
