"""The public names, for plugins and scripts; nothing else is promised to stay.

A name is imported from its home when it is first used, so that importing this module (as the config classes of a
plugin do) needs no torch. `API` rises when a name is removed or changes its meaning.
"""

from importlib import import_module
from typing import Any

API = 1
HOMES = {
    "limbeck.core.run.errors": ("BadInput", "LimbeckError"),
    "limbeck.core.run.checks": ("Check",),
    "limbeck.core.run.config": ("OptimConfig",),
    "limbeck.core.run.recipe": ("Strict", "Recipe", "Stage"),
    "limbeck.core.run.build": ("Batch", "Build"),
    "limbeck.core.run.context": ("Context",),
    "limbeck.core.run.players": ("Objective", "Phase", "Player"),
    "limbeck.core.run.rng": ("Draws", "generator"),
    "limbeck.core.scheduled": ("Scheduled", "at"),
    "limbeck.core.diffusion.config": ("ProcessConfig", "TimeLaw"),
    "limbeck.core.diffusion.codec": ("Autoencoder", "Identity"),
    "limbeck.core.diffusion.denoiser": (
        "Denoiser", "Encoded", "FewStep", "Model", "Network", "Preconditioned", "Prediction", "Sample", "predict",
    ),
    "limbeck.core.diffusion.guidance": ("guide",),
    "limbeck.core.diffusion.mixture": ("DataSet", "GaussianMixture", "TokenTable"),
    "limbeck.core.diffusion.process": ("EDM", "VP", "Flow", "Process", "process"),
    "limbeck.core.diffusion.sampling": ("sample", "times", "trajectory"),
    "limbeck.core.distillation.operators": ("Operator", "operator", "surrogate"),
}  # fmt: skip
WHERE = {name: home for home, names in HOMES.items() for name in names}
__all__ = ["API", *sorted(WHERE)]


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"limbeck.api has no {name}")
    return getattr(import_module(WHERE[name]), name)


def __dir__() -> list[str]:
    return __all__
