"""What a scene is: parameters that show themselves to cameras and answer for points in space.

Legend: V cameras, C channels, H and W pixels, N points. Colours are in the teacher's range, [-1, 1] for pixels; points
lie in scene units inside the ball of radius `radius` around the origin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from limbeck.core.diffusion.codec import Codec
from limbeck.core.diffusion.denoiser import Encoded, Sample
from limbeck.domains.threed.cameras import Cameras

SHADINGS = ("albedo", "diffuse", "textureless")


@dataclass
class Views:
    """What cameras see: image [V,C,H,W] over the background, alpha and depth [V,1,H,W], normals [V,3,H,W] in the world.

    Depth is the distance along the axis of view, weighted by opacity (0 where nothing is). `aux` holds what only some
    scenes know: `latent`, what the teacher judges instead of the image; `screen`, offsets [V,N,2] of splats in pixels
    whose gradient says where detail is missing; or `weights` and `places` [R,S] of the samples of rays.
    """

    image: Tensor
    alpha: Tensor
    depth: Tensor
    normals: Tensor | None = None
    aux: dict[str, Tensor] = field(default_factory=dict)


class Scene(Protocol):
    """A module with these; `radius` bounds what it shows."""

    channels: int
    radius: float

    def render(self, cameras: Cameras, background: Tensor, jitter: Tensor | None = None) -> Views:
        """Pictures over background [V,C], with their graph; `jitter` [V] in [0, 1) moves the samples along rays."""

    def field(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Density [N] >= 0 and colour [N,C] at points [N,3]: what surfaces are taken from."""

    def parameters(self) -> Sequence[nn.Parameter]:
        """What is trained."""


@runtime_checkable
class Growing(Protocol):
    """A scene that knows how far its making is."""

    def at(self, step: int) -> None:
        """Tells it the step."""


@runtime_checkable
class Lit(Protocol):
    """A scene that a lamp may light: its `render` takes `shading` and `light` [V,3]."""

    lit: bool


@runtime_checkable
class Meshed(Protocol):
    """A scene that is a mesh already: its files hold that, and no `field` is asked."""

    def asset(self, options: Any) -> Any:
        """The `asset.Made` of these `Files`."""


def lamp(scene: Scene, cond: Encoded) -> dict[str, Any]:
    """What a lamp adds to the arguments of `render`; scenes that cannot be lit are shown as they are."""
    if "light" not in cond or not isinstance(scene, Lit):
        return {}
    return {"shading": SHADINGS[int(cond["shading"][0])], "light": cond["light"]}


class SceneStudent(nn.Module):
    """The slot `student`: one scene, or several particles of which a step trains one, seen through the teacher's codec.

    `sample` renders the cameras of the condition and encodes the pictures with their gradient; noise is not used. The
    rows step, particle and shading are read as numbers and so are on the CPU.
    """

    def __init__(self, scenes: Sequence[nn.Module], codec: Codec, encodes: bool = True) -> None:
        super().__init__()
        self.scenes, self.codec, self.encodes = nn.ModuleList(scenes), codec, encodes

    def particle(self, cond: Encoded) -> Scene:
        """The scene that this step trains: picked by `particle` [B] in [0, 1) of the condition, the first without."""
        share = float(cond["particle"][0]) if "particle" in cond else 0.0
        return self.scenes[int(share * len(self.scenes))]  # type: ignore[return-value]

    def made(self, prompts: list[str]) -> list[tuple[str, Scene]]:
        """What the run has made of its prompts: each scene with its prompt. Here all scenes are of the first."""
        return [(prompts[0], scene) for scene in self.scenes]  # type: ignore[misc]

    def sample(self, noise: Tensor, cond: Encoded, renoise: list[Tensor] | None = None) -> Sample:
        """x [B,*S] in the teacher's space; aux has image, alpha, depth, normals and what the scene adds."""
        scene = self.particle(cond)
        if isinstance(scene, Growing) and "step" in cond:
            scene.at(int(cond["step"][0]))
        views = scene.render(Cameras.of(cond["camera"]), cond["background"], cond.get("jitter"), **lamp(scene, cond))
        x = views.image
        if "latent" in views.aux:  # of the teacher already
            x = views.aux["latent"]
        elif self.encodes:
            x = self.codec.encode(x)
        aux = {"image": views.image, "alpha": views.alpha, "depth": views.depth, **views.aux}
        return Sample(x, cond, aux | ({} if views.normals is None else {"normals": views.normals}))


@torch.no_grad()
def seen(scene: Scene, cameras: Cameras, background: float = 1.0, chunk: int = 8) -> Views:
    """Views on the CPU without graph, a few cameras at a time, over a plain background; cameras may be anywhere."""
    parts, cameras = [], cameras.to(like(scene))
    for start in range(0, len(cameras), chunk):
        some = cameras.pick(slice(start, start + chunk))
        parts.append(scene.render(some, some.fov.new_full((len(some), scene.channels), background)))
    image, alpha, depth = (
        torch.cat([getattr(part, name).cpu() for part in parts]) for name in ("image", "alpha", "depth")
    )
    normals = [part.normals.cpu() for part in parts if part.normals is not None]
    return Views(image, alpha, depth, torch.cat(normals) if normals else None)


def like(scene: Scene) -> Tensor:
    """A tensor on the scene's device and in its precision."""
    return next((p.detach() for p in scene.parameters() if p.is_floating_point()), torch.zeros(1))
