"""Triangle meshes: their topology, measures and repair. Legend: N vertices, M faces, C components."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from limbeck.core.run.errors import BadInput

Array = np.ndarray
HASTE = (7, 4, 2)  # of the simplifier, from its own default to gentle
WELD = 1e-6  # of the largest extent: nearer vertices are one


@dataclass(frozen=True)
class Mesh:
    """Vertices float64 [N,3] and faces int64 [M,3] whose corners run anticlockwise as seen from outside."""

    vertices: Array
    faces: Array

    @property
    def corners(self) -> Array:
        """[M,3,3]."""
        found: Array = self.vertices[self.faces]
        return found

    @property
    def bounds(self) -> Array:
        """Lowest and highest coordinates [2,3]."""
        return np.stack([self.vertices.min(0), self.vertices.max(0)])

    @property
    def crossed(self) -> Array:
        """Face normals as long as twice the area [M,3]."""
        a, b, c = self.corners.swapaxes(0, 1)
        return np.cross(b - a, c - a)

    @property
    def volumes(self) -> Array:
        """Of the tetrahedra from the middle to each face [M]; their sum is the volume if the mesh is closed."""
        middle = self.bounds.mean(0)
        found: Array = ((self.corners[:, 0] - middle) * self.crossed).sum(1) / 6
        return found

    @property
    def volume(self) -> float:
        """What the mesh encloses, positive where faces look outwards."""
        return float(self.volumes.sum())

    @property
    def watertight(self) -> bool:
        """Every edge has exactly two faces, which run along it in opposite directions."""
        ahead = np.concatenate([self.faces[:, [0, 1]], self.faces[:, [1, 2]], self.faces[:, [2, 0]]])
        code, back = (e.astype(np.int64) @ np.array([len(self.vertices), 1]) for e in (ahead, ahead[:, ::-1]))
        alone = len(np.unique(code)) == len(code)
        return len(code) > 0 and alone and bool(np.array_equal(np.sort(code), np.sort(back)))

    @property
    def normals(self) -> Array:
        """Unit normals of vertices [N,3], each face counting by its area."""
        total = np.zeros_like(self.vertices)
        for i in range(3):
            for axis in range(3):
                total[:, axis] += np.bincount(self.faces[:, i], self.crossed[:, axis], len(self.vertices))
        size = np.linalg.norm(total, axis=1, keepdims=True)
        return np.where(size > 1e-30, total / np.maximum(size, 1e-30), [0.0, 0.0, 1.0])

    def components(self) -> tuple[int, Array]:
        """How many parts hang together by their vertices, and the part of each face [M]."""
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        rows, columns = self.faces[:, [0, 1]].T.ravel(), self.faces[:, [1, 2]].T.ravel()
        graph = coo_matrix((np.ones(len(rows)), (rows, columns)), (len(self.vertices),) * 2)
        label = connected_components(graph, directed=False)[1][self.faces[:, 0]]
        names, part = np.unique(label, return_inverse=True)
        return len(names), part

    def euler(self) -> list[int]:
        """Vertices - edges + faces of each component: 2 for a ball, 0 for a ring."""
        count, part = self.components()
        found = []
        for i in range(count):
            faces = self.faces[part == i]
            edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), 1)
            found.append(len(np.unique(faces)) - len(np.unique(edges, axis=0)) + len(faces))
        return found

    def pick(self, keep: Array) -> Mesh:
        """Some of the faces (mask or index) and the vertices that they use."""
        used, faces = np.unique(self.faces[keep], return_inverse=True)
        return Mesh(self.vertices[used], faces.reshape(-1, 3))

    def welded(self) -> Mesh:
        """Vertices at the same place are one; faces that shrank to a line are gone."""
        step = max(float(np.ptp(self.vertices, axis=0).max()), 1e-30) * WELD
        keys = np.round(self.vertices / step).astype(np.int64)
        _, first, name = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        faces = name.reshape(-1)[self.faces]
        alive = (faces != np.roll(faces, 1, 1)).all(1)
        return Mesh(self.vertices[first], faces).pick(alive)

    def moved(self, turn: Array, scale: float = 1.0, shift: Array | float = 0.0) -> Mesh:
        """scale * (turn v) + shift at each vertex."""
        return Mesh(scale * self.vertices @ turn.T + shift, self.faces)


def smoothed(mesh: Mesh, passes: int, shrink: float = 0.5, grow: float = -0.53) -> Mesh:
    """Taubin 1995: steps towards the mean of the neighbours and a little more back, which keep the volume."""
    from scipy.sparse import coo_matrix, diags

    count = len(mesh.vertices)
    rows, columns = mesh.faces.ravel(), np.roll(mesh.faces, 1, 1).ravel()
    near = coo_matrix((np.ones(2 * len(rows)), (np.r_[rows, columns], np.r_[columns, rows])), (count, count)).tocsr()
    near.data[:] = 1.0  # an edge has two faces
    mean = diags(1 / np.maximum(np.asarray(near.sum(1)).ravel(), 1)) @ near
    vertices = mesh.vertices
    for _ in range(passes):
        for step in (shrink, grow):
            vertices = vertices + step * (mean @ vertices - vertices)
    return Mesh(vertices, mesh.faces)


def decimated(mesh: Mesh, faces: int, closed: bool = False) -> Mesh:
    """At most `faces` faces by quadric error (Garland and Heckbert 1997, the `fast-simplification` package).

    Gentler passes are tried where a hasty one opens the mesh. If all open it, or miss the budget, the gentlest open one
    within the budget is returned; with `closed` larger budgets are tried, up to the whole mesh.
    """
    simplify = load("fast_simplification").simplify
    budget, points = faces, mesh.vertices.astype(np.float32)
    while budget < len(mesh.faces):
        opened: Mesh | None = None
        for haste in HASTE:
            found = Mesh(*simplify(points, mesh.faces.astype(np.int32), target_count=budget, agg=haste))
            found = Mesh(found.vertices.astype(np.float64), found.faces.astype(np.int64)).welded()
            if len(found.faces) > budget:
                continue
            if found.watertight:
                return found
            opened = found
        if opened is not None and not closed:
            return opened
        budget = budget * 3 // 2
    return mesh


def load(name: str) -> Any:
    """A module of the extra `threed`."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise BadInput(f"meshes need {name}: run `pip install 'limbeck[threed]'`") from None
