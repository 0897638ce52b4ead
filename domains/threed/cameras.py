"""Cameras: where they stand, what they see, and the law they are drawn from.

The world is right-handed, z up, and an object's front looks along +x. A camera looks along its own -z, with +x to the
right and +y up (OpenGL), so that the columns of its pose are [right, up, backward, position]. Angles are in degrees in
settings and radians inside; lengths are in scene units. Legend: V cameras, H and W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

UP = (0.0, 0.0, 1.0)
OVERHEAD = 60.0  # degrees of elevation from which a view is one from above
ROW = 15  # numbers that a camera takes as a row of a condition


@dataclass(frozen=True)
class Cameras:
    """V pinhole cameras of one picture size: poses [V,3,4] camera to world, vertical fields of view [V] in radians."""

    pose: Tensor
    fov: Tensor
    height: int
    width: int

    @classmethod
    def of(cls, rows: Tensor) -> Cameras:
        """Cameras of condition rows [V,15]: the pose row by row, the field of view, height and width in pixels."""
        height, width = (int(value) for value in rows[0, 13:].tolist())
        return cls(rows[:, :12].view(-1, 3, 4), rows[:, 12], height, width)

    def rows(self) -> Tensor:
        """Condition rows [V,15] float32."""
        size = self.fov.new_tensor([self.height, self.width]).expand(len(self.fov), 2)
        return torch.cat([self.pose.flatten(1), self.fov[:, None], size], 1)

    def __len__(self) -> int:
        return len(self.fov)

    def pick(self, index: Tensor | slice) -> Cameras:
        """Some of the cameras."""
        return replace(self, pose=self.pose[index], fov=self.fov[index])

    def sized(self, height: int, width: int) -> Cameras:
        """The same cameras with pictures of another size."""
        return replace(self, height=height, width=width)

    def to(self, like: Tensor) -> Cameras:
        """On the device and in the precision of a tensor."""
        return replace(self, pose=self.pose.to(like), fov=self.fov.to(like))

    @property
    def position(self) -> Tensor:
        """Where they stand [V,3]."""
        return self.pose[:, :, 3]

    @property
    def forward(self) -> Tensor:
        """Unit vectors of view [V,3]."""
        return -self.pose[:, :, 2]

    @property
    def focal(self) -> Tensor:
        """The focal length [V] in pixels, the same along both axes; the principal point is the picture's centre."""
        return 0.5 * self.height / torch.tan(self.fov / 2)

    def angles(self) -> tuple[Tensor, Tensor]:
        """Azimuth in (-pi, pi] (0: in front of the object) and elevation [V], as seen from the origin."""
        x, y, z = self.position.unbind(1)
        return torch.atan2(y, x), torch.atan2(z, torch.hypot(x, y))

    def rays(self) -> tuple[Tensor, Tensor]:
        """Origins and unit directions [V,H,W,3] of the rays through the pixels' centres, row 0 at the top."""
        rows, columns = (
            torch.arange(count, device=self.fov.device, dtype=self.fov.dtype) + 0.5
            for count in (self.height, self.width)
        )
        v, u = torch.meshgrid(rows, columns, indexing="ij")
        focal = self.focal[:, None, None]
        x, y = (u - self.width / 2) / focal, (self.height / 2 - v) / focal
        local = torch.stack([x, y, -torch.ones_like(x)], -1)
        world = torch.einsum("vij,vhwj->vhwi", self.pose[:, :, :3], local)
        return self.position[:, None, None].expand_as(world), world / world.norm(dim=-1, keepdim=True)

    def view(self) -> tuple[Tensor, Tensor]:
        """World to camera in OpenCV axes (x right, y down, z forward): R [V,3,3] and t [V,3]; p_cam = R p + t."""
        flip = self.pose.new_tensor([1.0, -1.0, -1.0])
        turn = (self.pose[:, :, :3] * flip).transpose(1, 2)
        return turn, -(turn @ self.position[..., None])[..., 0]


def look_at(position: Tensor, target: Tensor, up: Tensor) -> Tensor:
    """Poses [V,3,4] of cameras at position [V,3] that look at target [V,3], up [V,3] being up in the picture."""
    back = torch.nn.functional.normalize(position - target, dim=1)
    right = torch.nn.functional.normalize(torch.linalg.cross(up, back), dim=1)
    return torch.stack([right, torch.linalg.cross(back, right), back, position], 2)


def orbit(azimuth: Tensor, elevation: Tensor, distance: Tensor, fov: Tensor, height: int, width: int) -> Cameras:
    """Cameras around the origin, [V] each; angles in radians."""
    flat = elevation.cos()
    place = torch.stack([flat * azimuth.cos(), flat * azimuth.sin(), elevation.sin()], 1) * distance[:, None]
    up = place.new_tensor(UP).expand_as(place)
    return Cameras(look_at(place, torch.zeros_like(place), up), fov, height, width)


def ring(
    count: int, size: int, elevation: float = 15.0, distance: float = 3.0, fov: float = 40.0, offset: float = 0.0
) -> Cameras:
    """`count` cameras at even azimuths from `offset` on, degrees: a turntable (the last is not the first again)."""
    azimuth = torch.arange(count) * (2 * math.pi / count) + math.radians(offset)
    one = torch.ones(count)
    return orbit(azimuth, one * math.radians(elevation), one * distance, one * math.radians(fov), size, size)


def direction(azimuth: float, elevation: float, front: float = 45.0) -> str:
    """The view in words, degrees: DreamFusion's view-dependent prompts."""
    if elevation > OVERHEAD:
        return "overhead"
    turned = abs((azimuth + 180) % 360 - 180)
    return "front" if turned < front else "back" if turned > 180 - front else "side"


def lamp(position: Tensor, noise: Tensor, distance: Tensor) -> Tensor:
    """Where a point light stands [V,3]: around the camera's direction (DreamFusion).

    position [V,3] of cameras, standard normal noise [V,3], distance [V], uniform in (.8, 1.5).
    """
    return torch.nn.functional.normalize(position + noise, dim=1) * distance[:, None]
