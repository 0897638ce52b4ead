"""The exact denoiser of the blurred reference sets, and the check that it is right."""

import torch

from limbeck.api import EDM, BadInput, Build, Check, Encoded, GaussianMixture, Identity, Model, generator
from limbeck_points.config import Teacher
from limbeck_points.data import POINTS, SHAPES, references


def encode(prompts: list[str]) -> Encoded:
    """Labels [B]; -1 for the empty prompt."""
    unknown = [prompt for prompt in prompts if prompt and prompt not in SHAPES]
    if unknown:
        raise BadInput(f'there is no shape "{unknown[0]}"; the prompts are {", ".join(SHAPES)}')
    return {"label": torch.tensor([SHAPES.index(prompt) if prompt else -1 for prompt in prompts])}


def mixture(config: Teacher) -> GaussianMixture:
    """The denoiser over sets [P, 2]."""
    sets, labels = references(config.count)
    return GaussianMixture(sets, config.bandwidth, EDM(), classes=labels)


def build(config: Teacher, build: Build) -> Model:
    """Factory of the teacher."""
    device = build.device
    place = lambda prompts: {key: value.to(device) for key, value in encode(prompts).items()}  # noqa: E731
    return Model(mixture(config).to(device), (POINTS, 2), Identity(), place, "points")


def check() -> list[Check]:
    """Behind a little noise the denoiser finds its reference set; behind much, the mean of the prompt's shape."""
    sets, labels = references(50)
    denoiser = mixture(Teacher(count=50, bandwidth=1e-6))
    t, noise = torch.full((len(sets),), 0.2), torch.randn(sets.shape, generator=generator(0, "points.check", 0))
    x_t = denoiser.process.add_noise(sets, noise, t)
    near = (denoiser.predict(x_t, t, {"label": labels}).x0 - sets).abs().max()
    far = denoiser.predict(80 * noise[:1], torch.ones(1), {"label": labels[:1]}).x0 - sets[labels == 0].mean(0)
    return [
        Check("the set behind little noise", float(near), 1e-4, "<="),
        Check("the mean behind much noise", float(far.abs().max()), 0.1, "<="),
    ]
