"""A denoiser with its sampler of many steps, as a student: what rewards tune."""

from __future__ import annotations

from torch import Tensor, nn

from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Model, Prediction, Sample
from limbeck.core.diffusion.guidance import guided_by, with_scale
from limbeck.core.diffusion.sampling import ddim
from limbeck.core.diffusion.sampling import sample as walk


class ManyStep(nn.Module):
    """Deterministic DDIM on the model's own grid, at a guidance scale; only `denoiser` is trained.

    The same class around the teacher's denoiser is what the student was before training.
    """

    draws = 1  # noises that one sample takes

    def __init__(self, model: Model, denoiser: Denoiser, steps: int, guidance: float) -> None:
        super().__init__()
        self.denoiser, self.steps, self.guidance = denoiser, steps, guidance
        self._model = [model]  # not a submodule: its weights are not the student's

    @property
    def model(self) -> Model:
        """The model whose grid and null condition are used."""
        return self._model[0]

    def but(self, steps: int | None = None, guidance: float | None = None) -> ManyStep:
        """The same denoiser in other steps or at another scale."""
        scale = self.guidance if guidance is None else guidance
        return ManyStep(self.model, self.denoiser, steps or self.steps, scale)

    def before(self) -> ManyStep:
        """The teacher under the same sampler."""
        return ManyStep(self.model, self.model.denoiser, self.steps, self.guidance)

    def denoise(self, x_t: Tensor, t: Tensor, cond: Encoded) -> Prediction:
        """The student read as a denoiser, without guidance."""
        return self.denoiser.predict(x_t, t, cond)

    def sample(self, noise: Tensor, cond: Encoded, renoise: list[Tensor] | None = None) -> Sample:
        """x [B,*S] from standard normal noise, without gradient (objectives walk by themselves)."""
        walker = guided_by(self.denoiser, self.model.encode([self.model.uncond]), self.guidance)
        times = self.model.grid(self.steps)
        return Sample(walk(walker, noise, times, ddim(), cond=with_scale(cond, self.guidance)), cond)
