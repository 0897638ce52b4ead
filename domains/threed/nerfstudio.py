"""A scene of nerfstudio's parts: its fields, its samplers, its renderers (Tancik et al. 2023).

They are imported where a scene is built. What is ours: rays that stop at the scene's ball, a cone of density to start
from, and samples that move with the step's own jitter. Legend: V cameras, R rays, S samples along a ray, N points.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from limbeck.core.diffusion.denoiser import Model
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.domains.threed import config as settings
from limbeck.domains.threed import fields
from limbeck.domains.threed.cameras import Cameras
from limbeck.domains.threed.scene import SceneStudent, Views
from limbeck.domains.threed.volume import SAMPLES, Rays


class Gathers(TorchFunctionMode):
    """Rows of tables come by index_select inside: the gradient of `table[index]` differs from run to run on threads."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What the function gives."""
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.long:
            table, index = args
            return table.index_select(0, index.reshape(-1)).view(*index.shape, *table.shape[1:])
        return func(*args, **(kwargs or {}))


class Studio(nn.Module):
    """A Scene (see scene.py); colours may depend on the direction that they are seen from."""

    channels = fields.RGB

    def __init__(self, config: settings.Nerfstudio) -> None:
        super().__init__()
        self.config, self.radius = config, config.radius
        self.body = body(config)
        from nerfstudio.model_components import ray_samplers as samplers
        from nerfstudio.model_components import renderers

        self.even = samplers.UniformSampler(train_stratified=False)
        self.refined = samplers.PDFSampler(train_stratified=False)
        self.colours, self.opacity = renderers.RGBRenderer("black"), renderers.AccumulationRenderer()
        self.depths, self.slopes = renderers.DepthRenderer("expected"), renderers.NormalsRenderer()

    def field(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Density [N] and colour [N,3] at points [N,3], seen from outside."""
        from nerfstudio.cameras.rays import Frustums, RaySamples

        zero = torch.zeros_like(points[:, :1])
        inwards = nn.functional.normalize(-points, dim=1)
        where = Frustums(origins=points, directions=inwards, starts=zero, ends=zero, pixel_area=zero + 1)
        samples = RaySamples(frustums=where, camera_indices=zero.long())
        density, features = self.look(samples)
        return density[:, 0], self.colour(samples, features)

    def look(self, samples: Any) -> tuple[Tensor, Tensor]:
        """Density [...,1] of samples, and the field's features of them."""
        with Gathers():
            density, features = self.body.get_density(samples)
        away = samples.frustums.get_positions().square().sum(-1, keepdim=True).clamp_min(1e-12).sqrt()
        return density * torch.exp(self.config.height * (1 - away / self.config.reach)), features

    def colour(self, samples: Any, features: Tensor) -> Tensor:
        """Colours [...,3] of samples in [-1, 1]."""
        from nerfstudio.field_components.field_heads import FieldHeadNames

        found: Tensor = self.body.get_outputs(samples, features)[FieldHeadNames.RGB]
        return 2 * found - 1

    def render(self, cameras: Cameras, background: Tensor, jitter: Tensor | None = None) -> Views:
        """Pictures over background [V,3]. With a graph aux has weights, places and widths [R,S], without it normals."""
        rays = Rays.of(cameras, self.radius, jitter, None)
        if torch.is_grad_enabled():
            sums, aux = self.march(rays)
        else:
            most = self.config.samples + self.config.proposal
            sums, aux = torch.cat([self.march(some)[0] for some in rays.split(max(1, SAMPLES // most))], 1), {}
        colour, alpha, depth, normals = torch.tensor_split(
            sums.view(-1, len(cameras), cameras.height, cameras.width).transpose(0, 1), [3, 4, 5], 1
        )
        image = 2 * colour - alpha + (1 - alpha) * background[:, :, None, None]
        return Views(image, alpha, depth, normals if normals.shape[1] else None, aux)

    def march(self, rays: Rays) -> tuple[Tensor, dict[str, Tensor]]:
        """Sums [K,R] of colour in [0, 1], alpha, depth and, without a graph, normals; and what regularisers read."""
        graph = torch.is_grad_enabled()
        samples = self.samples(rays)
        shift = (rays.offset - 0.5)[:, None, None] * samples.deltas * rays.ray[:, None]
        with torch.enable_grad():
            samples.frustums.set_offsets(shift.requires_grad_(not graph))
            density, features = self.look(samples)
            slope = None if graph else torch.autograd.grad(density.sum(), shift, retain_graph=True)[0]
        weight = samples.get_weights(density)
        alpha = self.opacity(weight)
        colour = self.colours((self.colour(samples, features) + 1) / 2, weight)
        depth = self.depths(weight, samples) * alpha * rays.ahead[:, None]
        found = [colour, alpha, depth]
        if slope is not None:
            outwards = nn.functional.normalize(-slope, dim=-1, eps=1e-6)
            found.append(self.slopes(outwards, weight, normalize=False))
        place = (samples.frustums.starts + samples.frustums.ends)[..., 0] / 2
        width = samples.deltas[..., 0]
        aux = {"weights": weight[..., 0], "places": place + (rays.offset - 0.5)[:, None] * width, "widths": width}
        return torch.cat(found, 1).T, aux

    def samples(self, rays: Rays) -> Any:
        """Samples of rays: even ones, and between them those that the density there proposes."""
        from nerfstudio.cameras.rays import RayBundle

        one = torch.ones_like(rays.near[:, None])
        near, far = rays.near[:, None], rays.far[:, None]
        bundle = RayBundle(rays.origin, rays.ray, one, camera_indices=one.long() - 1, nears=near, fars=far)
        with torch.no_grad():
            even = self.even(bundle, num_samples=self.config.proposal)
            weight = even.get_weights(self.look(even)[0])
            return self.refined(bundle, even, weight, num_samples=self.config.samples)


def body(config: settings.Nerfstudio) -> Any:
    """The field of these settings, in plain torch, its nets drawn from torch's generator."""
    try:
        from nerfstudio.fields.generfacto_field import GenerfactoField
        from nerfstudio.fields.nerfacto_field import NerfactoField
    except ImportError as error:
        raise BadInput(
            f"threed.nerfstudio needs nerfstudio ({error.name} is missing): pip install --no-deps -r "
            "requirements/nerfstudio.txt, best in an environment of its own (make test-nerfstudio makes one)"
        ) from None
    box = torch.tensor([[-1.0], [1.0]]).expand(2, 3) * config.radius
    hash_grid = {"num_levels": config.levels, "max_res": config.finest, "log2_hashmap_size": config.entries}
    nets = {"hidden_dim": config.hidden, "hidden_dim_color": config.hidden, "implementation": "torch"}
    if config.field == "nerfacto":
        return NerfactoField(box, num_images=1, appearance_embedding_dim=0, **hash_grid, **nets)
    made = GenerfactoField(box, **hash_grid, **nets)
    del made.mlp_background_color  # what is behind the scene is the step's
    return made


def build(config: settings.Nerfstudio, build: Build) -> SceneStudent:
    """Factory of the student `threed.nerfstudio`."""
    model: Model = build.piece("teacher")
    return SceneStudent([Studio(config) for _ in range(config.particles)], model.codec).to(build.device)
