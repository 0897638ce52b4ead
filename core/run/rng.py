"""Randomness as a pure function of (run seed, stream name, step): a resume needs no generator state.

Everything is drawn on the CPU for the global batch and cut to this process's rows, so draws depend neither on the
number of processes nor on the device nor on logging.
"""

import hashlib

import torch
from torch import Generator, Tensor

from limbeck.core.run.errors import BadInput


def derive(seed: int, stream: str, step: int = 0) -> int:
    """A 63-bit seed, the same on every machine and Python (unlike `hash`)."""
    digest = hashlib.blake2b(f"{seed}\0{stream}\0{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, stream: str, step: int, device: str | torch.device = "cpu") -> Generator:
    """A fresh generator for one stream of one step."""
    return Generator(device).manual_seed(derive(seed, stream, step))


class Draws:
    """The random numbers of one step. Each stream name may be used once per step."""

    def __init__(
        self, seed: int, step: int, batch: int, rank: int = 0, world: int = 1, device: str | torch.device = "cpu"
    ) -> None:
        """`batch` is the global one; this process has `batch / world` rows of it."""
        if batch % world:
            raise BadInput(
                f"batch {batch} cannot be shared by {world} (processes times accumulate); make it a multiple of {world}"
            )
        self.seed, self.step, self.batch, self.device = seed, step, batch, device
        local = batch // world
        self.rows = slice(rank * local, (rank + 1) * local)
        self._used: set[str] = set()

    def split(self, parts: int) -> "list[Draws]":
        """The same draws, their rows shared out: as many processes, one after the other, would have them."""
        if parts == 1:
            return [self]
        size, rank = self.rows.stop - self.rows.start, self.rows.start
        world, first = self.batch // size * parts, rank // size * parts
        return [Draws(self.seed, self.step, self.batch, first + k, world, self.device) for k in range(parts)]

    def of(self, step: int) -> "Draws":
        """The same rows at another step."""
        size = self.rows.stop - self.rows.start
        return Draws(self.seed, step, self.batch, self.rows.start // size, self.batch // size, self.device)

    def gen(self, stream: str) -> Generator:
        """A CPU generator for the global batch (cut to `rows` afterwards)."""
        if stream in self._used:
            raise ValueError(f'the stream "{stream}" was already drawn in step {self.step}; use another name')
        self._used.add(stream)
        return generator(self.seed, stream, self.step)

    def normal(self, stream: str, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal [b, *shape]."""
        draw = torch.float64 if dtype == torch.float64 else torch.float32
        return self._local(torch.randn((self.batch, *shape), generator=self.gen(stream), dtype=draw)).to(dtype)

    def uniform(self, stream: str, shape: tuple[int, ...] = (), lo: float = 0.0, hi: float = 1.0) -> Tensor:
        """Uniform on [lo, hi), float32 [b, *shape]."""
        return self._local(torch.rand((self.batch, *shape), generator=self.gen(stream)) * (hi - lo) + lo)

    def integers(self, stream: str, hi: int, shape: tuple[int, ...] = ()) -> Tensor:
        """Uniform integers 0..hi-1, int64 [b, *shape]."""
        return self._local(torch.randint(hi, (self.batch, *shape), generator=self.gen(stream)))

    def _local(self, x: Tensor) -> Tensor:
        return x[self.rows].to(self.device)
