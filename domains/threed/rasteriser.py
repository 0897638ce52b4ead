"""Pictures of 3D Gaussians in plain torch: tiles of 8 x 8 pixels, each with its splats in order of depth.

"3D Gaussian Splatting for Real-Time Radiance Field Rendering" (Kerbl et al. 2023), with the conventions of gsplat: EWA
projection with 0.3 px of blur, pixel centres at halves, alpha = min(.999, opacity exp(-sigma)) and nothing below 1/255.
Deviation: no early stop, so that a picture does not jump where light runs out.

Legend: V views, N splats, M = V N rows (a splat in a view), C channels, H and W pixels, T tiles, P pairs (a row in a
tile), K pairs of the fullest tile of a chunk. Lengths on the screen are in pixels. Gradients repeat bit for bit
with any number of threads: what pairs say of a row is summed in one order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.domains.threed.cameras import Cameras

TILE = 8  # pixels along a side
PIXELS = TILE * TILE
BLUR = 0.3  # square pixels added to a splat's covariance
CUT, MOST = 1 / 255, 0.999  # alphas below and above these are 0 and this
NEAR = 0.01  # scene units: what is nearer to a camera is not seen
WIDE = 1.3  # of the picture's half: beyond, the projection is linearised at this edge
SLACK, EDGE = 1.001, 0.01  # factor and pixels that a splat's box is larger than its ellipse, for rounding
CHUNK = 2**17  # elements of the tables of one chunk of tiles
SHAPE = 6  # columns of a row before its values: x, y, the conic's three and the opacity


@dataclass(frozen=True)
class Splats:
    """N splats: means [N,3], log scales [N,3], quaternions [N,4] (w x y z), opacity logits [N], colours [N,C]."""

    means: Tensor
    scales: Tensor
    quats: Tensor
    opacity: Tensor
    colours: Tensor

    def axes(self) -> Tensor:
        """The rotation times the scales [N,3,3]: columns are the ellipsoid's half axes."""
        return rotation(self.quats) * self.scales.exp()[:, None]


@dataclass(frozen=True)
class Picture:
    """What cameras see, not over anything: colour [V,C,H,W] times alpha, alpha and depth times alpha [V,1,H,W]."""

    colour: Tensor
    alpha: Tensor
    depth: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Picture:
        """Of composited values [V,C+2,H,W]: colours, depth and a one."""
        return cls(values[:, :-2], values[:, -1:], values[:, -2:-1])


@dataclass(frozen=True)
class Projected:
    """M rows on the screen: x and y [M,2], half a box's sides [M,2] (0: unseen), depth [M], and `table` [M,6+C+2]."""

    centre: Tensor
    reach: Tensor
    depth: Tensor
    table: Tensor


def rotation(quats: Tensor) -> Tensor:
    """Rotations [N,3,3] of quaternions [N,4] (w x y z) of any length but zero."""
    w, x, y, z = F.normalize(quats, dim=1).unbind(1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, 1).view(-1, 3, 3)


def project(splats: Splats, cameras: Cameras, screen: Tensor | None = None) -> Projected:
    """EWA projection (Zwicker et al. 2001, equations 26 to 31), moved by `screen` [V,N,2] pixels."""
    views, count = len(cameras), len(splats.means)
    turn, shift = cameras.view()
    x, y, depth = ((turn @ splats.means.T) + shift[..., None]).unbind(1)  # [V,N]
    ahead = depth > NEAR
    inverse = 1 / torch.where(ahead, depth, 1.0)
    axes = splats.axes().permute(1, 0, 2).reshape(3, -1)
    side, down, along = (turn @ axes).view(views, 3, count, 3).unbind(1)
    focal = cameras.focal[:, None]
    wide, high = (WIDE * 0.5 * pixels / focal for pixels in (cameras.width, cameras.height))
    right, below = (x * inverse).clamp(-wide, wide), (y * inverse).clamp(-high, high)
    scale = (focal * inverse)[..., None]
    first, second = scale * (side - right[..., None] * along), scale * (down - below[..., None] * along)
    centre = focal[..., None] * torch.stack([x * inverse, y * inverse], -1)
    centre = centre + centre.new_tensor([cameras.width / 2, cameras.height / 2])
    if screen is not None:
        centre = centre + screen
    conic, size = conics(first.flatten(0, 1), second.flatten(0, 1))
    opacity = splats.opacity.sigmoid().expand(views, -1).flatten()
    with torch.no_grad():
        sigmas = (2 * (opacity / CUT).clamp_min(1).log()).sqrt()  # beyond so many, alpha is below the cut
        seen = ahead.flatten() & (sigmas > 0)
        reach = torch.where(seen, sigmas, 0.0)[:, None] * size.sqrt() * SLACK + seen[:, None] * EDGE
    colours = splats.colours.expand(views, -1, -1).flatten(0, 1)
    values = [colours, depth.reshape(-1, 1), torch.ones_like(depth).view(-1, 1)]
    table = torch.cat([centre.view(-1, 2), conic, opacity[:, None], *values], 1)
    return Projected(centre.detach().view(-1, 2), reach, depth.detach().flatten(), table)


def conics(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse covariances (xx, xy, yy) [M,3] and variances [M,2] of splats whose half axes have these x and y [M,3].

    The determinant is a sum of squares (Cauchy and Binet), exact for needles where xx yy - xy^2 cancels.
    """
    a, b, c = (first * first).sum(1), (first * second).sum(1), (second * second).sum(1)
    area = torch.linalg.cross(first, second).square().sum(1)
    det = area + BLUR * (a + c) + BLUR**2
    variance = torch.stack([a + BLUR, c + BLUR], 1)
    return torch.stack([variance[:, 1] / det, -b / det, variance[:, 0] / det], 1), variance.detach()


@dataclass(frozen=True)
class Plan:
    """Which rows are in which tile: `row` [P] by tile and depth, and the place [P] of those pairs when sorted by row.

    `start` and `count` [T] cut the pairs into tiles; the other way round `rows` [R] have `shares` [R] pairs each.
    """

    row: Tensor
    place: Tensor
    start: Tensor
    count: Tensor
    rows: Tensor
    shares: Tensor
    across: int
    down: int

    @classmethod
    def of(cls, seen: Projected, views: int, height: int, width: int) -> Plan:
        """Of M rows, M / views a view, on pictures of this size."""
        across, down = -(-width // TILE), -(-height // TILE)
        most = seen.centre.new_tensor([across, down])
        low, high = seen.centre - seen.reach, seen.centre + seen.reach  # tiles' outer centres are half a pixel inside
        first = torch.minimum(((low - (TILE - 0.5)) / TILE).ceil().clamp_min(0), most)
        last = torch.minimum(((high - 0.5) / TILE).floor() + 1, most)
        sides = ((last - first).clamp_min(0) * (seen.reach > 0)).long()
        shares = sides[:, 0] * sides[:, 1]
        order = seen.depth.argsort(stable=True)
        order = order[shares[order] > 0]
        many = shares[order]
        row = order.repeat_interleave(many)
        inside = torch.arange(len(row), device=row.device) - (many.cumsum(0) - many).repeat_interleave(many)
        x, y = first[row, 0].long() + inside % sides[row, 0], first[row, 1].long() + inside // sides[row, 0]
        view = row // max(1, len(shares) // max(1, views))
        tile, place = ((view * down + y) * across + x).sort(stable=True)
        count = torch.bincount(tile, minlength=views * down * across)
        return cls(row[place], place, count.cumsum(0) - count, count, order, many, across, down)

    def chunks(self) -> list[tuple[Tensor, int]]:
        """Tiles [t] that are worked on together, fullest first, and the pairs of their fullest; empty ones are out."""
        order = self.count.argsort(descending=True, stable=True)
        counts, found, i = self.count[order].tolist(), [], 0
        while i < len(counts) and counts[i]:
            size = max(1, CHUNK // (counts[i] * PIXELS))
            found.append((order[i : i + size], counts[i]))
            i += size
        return [(tiles[self.count[tiles] > 0], most) for tiles, most in found]

    def pairs(self, tiles: Tensor, most: int) -> Tensor:
        """The pairs [t,K] of tiles; P where a tile has fewer."""
        slot = torch.arange(most, device=tiles.device)
        return torch.where(slot < self.count[tiles, None], self.start[tiles, None] + slot, len(self.row))

    def corner(self, tiles: Tensor) -> Tensor:
        """The first pixel's corner [t,2] of tiles."""
        return torch.stack([tiles % self.across, tiles // self.across % self.down], 1) * TILE


@dataclass(frozen=True)
class Shade:
    """A chunk of tiles: alpha and the light [t,K,64] that comes through all nearer splats."""

    alpha: Tensor
    light: Tensor
    offset: Tensor  # of the rows' centres from the tiles' corners [t,K,2]

    @classmethod
    def of(cls, table: Tensor, corner: Tensor) -> Shade:
        """Of rows [t,K,6+...] in tiles at corners [t,2]."""
        x, y, a, b, c, opacity = table[..., :SHAPE].unbind(-1)
        x, y = x - corner[:, None, 0], y - corner[:, None, 1]
        pixel = torch.arange(TILE, device=table.device) + 0.5
        right, below = pixel - x[..., None], pixel - y[..., None]
        sigma = (b[..., None] * below)[..., None] * right[..., None, :]
        sigma += (0.5 * c[..., None] * below * below)[..., None]
        sigma += (0.5 * a[..., None] * right * right)[..., None, :]
        alpha = sigma.flatten(2).neg_().exp_().mul_(opacity[..., None])
        alpha = F.threshold(alpha, CUT, 0.0, inplace=True).clamp_max_(MOST)
        light = torch.ones_like(alpha)
        torch.cumprod(1 - alpha[:, :-1], 1, out=light[:, 1:])
        return cls(alpha, light, torch.stack([x, y], -1))


class Composite(torch.autograd.Function):
    """Values of rows [M,6+C] composited front to back into tiles [T,64,C]; the backward works chunk by chunk again."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, plan: Plan) -> Tensor:
        """Memory is that of the tiles and of one chunk."""
        ctx.plan = plan
        ctx.save_for_backward(table)
        out = table.new_zeros(len(plan.count), PIXELS, table.shape[1] - SHAPE)
        for tiles, most in plan.chunks():
            rows = gathered(table, plan, plan.pairs(tiles, most))
            shade = Shade.of(rows, plan.corner(tiles))
            out[tiles] = (shade.alpha * shade.light).transpose(1, 2) @ rows[..., SHAPE:]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient of the table; what pairs say of a row is summed in the order of its tiles."""
        plan, (table,) = ctx.plan, ctx.saved_tensors
        said = table.new_empty(len(plan.row) + 1, table.shape[1])
        place = torch.cat([plan.place, plan.place.new_tensor([len(plan.row)])])
        for tiles, most in plan.chunks():
            pairs = plan.pairs(tiles, most)
            rows = gathered(table, plan, pairs)
            said[place[pairs].flatten()] = slopes(rows, plan.corner(tiles), grad[tiles]).flatten(0, 1)
        out = torch.zeros_like(table)
        if len(plan.rows):
            out[plan.rows] = torch.segment_reduce(said[:-1], "sum", lengths=plan.shares)
        return out, None


def gathered(table: Tensor, plan: Plan, pairs: Tensor) -> Tensor:
    """The rows [t,K,6+C] of pairs [t,K]; nothing at all where there is none."""
    row = torch.cat([plan.row, plan.row.new_tensor([0])])[pairs]
    found = table.index_select(0, row.flatten()).view(*pairs.shape, -1)
    return found * (pairs < len(plan.row))[..., None]


def slopes(rows: Tensor, corner: Tensor, grad: Tensor) -> Tensor:
    """The gradient [t,K,6+C] of rows in tiles at corners [t,2], from that of their pixels [t,64,C].

    With h = alpha light g (g what a pixel's gradient says of the row's values), the gradient of log alpha is
    s = h - alpha / (1 - alpha) (the sum of h behind); all else are moments of s over a tile's pixels.
    """
    shade = Shade.of(rows, corner)
    weight = shade.alpha * shade.light
    behind = rows[..., SHAPE:] @ grad.transpose(1, 2)
    s = behind.mul_(weight)
    after = s.flip(1).cumsum_(1).flip(1)
    s[:, :-1].sub_(shade.alpha[:, :-1] / (1 - shade.alpha[:, :-1]) * after[:, 1:])
    s *= shade.alpha < MOST
    moments = s @ monomials(s)  # of the pixel's place in the tile: 1, u, v, uu, uv, vv
    return torch.cat([centred(moments, rows, shade.offset), weight @ grad], -1)


def monomials(like: Tensor) -> Tensor:
    """1, u, v, uu, uv, vv [64,6] at the pixels of a tile."""
    v, u = torch.meshgrid(*[torch.arange(TILE, dtype=like.dtype, device=like.device) + 0.5] * 2, indexing="ij")
    return torch.stack([torch.ones_like(u), u, v, u * u, u * v, v * v], -1).view(PIXELS, 6)


def centred(moments: Tensor, rows: Tensor, offset: Tensor) -> Tensor:
    """The gradient [t,K,6] of x, y, conic and opacity, from moments [t,K,6] of s about the tile's corner.

    sigma = (a dx^2 + 2 b dx dy + c dy^2) / 2 with dx from the centre at `offset` [t,K,2]; d alpha = -alpha d sigma.
    """
    (one, u, v, uu, uv, vv), (x, y) = moments.unbind(-1), offset.unbind(-1)
    _, _, a, b, c, opacity = rows[..., :SHAPE].unbind(-1)
    dx, dy = u - x * one, v - y * one
    dxx, dyy, dxy = uu - x * (u + dx), vv - y * (v + dy), uv - x * v - y * dx
    moved = [a * dx + b * dy, b * dx + c * dy, -0.5 * dxx, -dxy, -0.5 * dyy]
    return torch.stack([*moved, one / torch.where(opacity > 0, opacity, 1.0)], -1)


def render(splats: Splats, cameras: Cameras, screen: Tensor | None = None) -> Picture:
    """What cameras see, with gradients to all of `splats` and to `screen` [V,N,2], offsets in pixels."""
    seen = project(splats, cameras, screen)
    with torch.no_grad():
        plan = Plan.of(seen, len(cameras), cameras.height, cameras.width)
    tiles: Tensor = Composite.apply(seen.table, plan)  # type: ignore[no-untyped-call]
    values = tiles.view(len(cameras), plan.down, plan.across, TILE, TILE, -1).permute(0, 5, 1, 3, 2, 4)
    whole = values.reshape(len(cameras), -1, plan.down * TILE, plan.across * TILE)
    return Picture.of(whole[..., : cameras.height, : cameras.width])


def dense(splats: Splats, cameras: Cameras, screen: Tensor | None = None) -> Picture:
    """The same by every splat on every pixel, without tiles, boxes or a backward of our own: the reference."""
    seen, size = project(splats, cameras, screen), (cameras.height, cameras.width)
    v, u = torch.meshgrid(*(torch.arange(n).to(seen.centre) + 0.5 for n in size), indexing="ij")
    found = []
    for table, depth in zip(seen.table.chunk(len(cameras)), seen.depth.chunk(len(cameras)), strict=True):
        near = torch.where(depth > NEAR, depth, torch.inf).argsort(stable=True)[: int((depth > NEAR).sum())]
        x, y, a, b, c, opacity = (column[:, None] for column in table.index_select(0, near)[:, :SHAPE].unbind(1))
        dx, dy = u.flatten() - x, v.flatten() - y
        alpha = opacity * torch.exp(-0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy)
        alpha = torch.where(alpha > CUT, alpha, 0.0).clamp_max(MOST)
        light = torch.cat([torch.ones_like(alpha[:1]), (1 - alpha[:-1]).cumprod(0)])[: len(alpha)]
        found.append((table.index_select(0, near)[:, SHAPE:].T @ (alpha * light)).view(-1, *size))
    return Picture.of(torch.stack(found))
