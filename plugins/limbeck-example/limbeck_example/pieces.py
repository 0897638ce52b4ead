from collections.abc import Callable

from torch import Tensor

from limbeck.api import Build, Prediction, operator
from limbeck_example.config import Radius


@operator("eps", "sigma2")
def soft_sds(teacher: Prediction, eps: Tensor) -> Tensor:
    """SDS's residual r as r / (1 + |r|), eps space."""
    return (teacher.eps - eps) / (1 + (teacher.eps - eps).abs())


def radius(config: Radius, build: Build) -> Callable[..., Tensor]:
    """Minus the squared distance of each sample's norm from the best one: [B, *S] -> [B]."""
    return lambda x, cond, *, t=None, gen=None: -((x.flatten(1).norm(dim=1) - config.best) ** 2)
