"""Random projections of a block's coordinates to a few hundred, which keep inner products.

With R of n rows and entries of random sign, one in each row and part, <R'x, R'y> is <x, y> on
average, with a variance of about (|x|^2 |y|^2 + <x, y>^2) / dim (Charikar, Chen and Farach-Colton
2002). So R'GR stands for G in traces, Frobenius inner products, leading eigenvalues and angles, and
solves, as long as few eigenvalues matter; dim is 995, and curvatures have a few dozen.

A coordinate's bucket is its place modulo a prime. Neighbours in a row or column of a weight matrix
then never share one, and no index has to be looked up. The projection consists of independent
parts: leaving out one at a time says how far figures are off (`figures.jackknife`).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

PARTS = 5


@dataclasses.dataclass(frozen=True)
class Projection:
    """A linear map from `size` coordinates, which start at `offset` among `total`, to `dim`.

    Attributes:
      offset: where the coordinates start.
      size: how many they are.
      total: how many there are in all: those of one block, or of the whole network.
      width: the number of buckets of each part, a prime; None for no projection.
    """

    offset: int
    size: int
    total: int
    width: int | None

    @property
    def dim(self) -> int:
        """The number of coordinates after the projection."""
        return self.total if self.width is None else PARTS * self.width

    def __call__(self, x: jax.Array, signs: jax.Array) -> jax.Array:
        """Projects vectors.

        Args:
          x: shape `(..., size)`.
          signs: from `signs`, shape `(PARTS, size)`.

        Returns:
          Shape `(..., dim)`: the part of `total` coordinates that comes from these `size`.
        """
        lead = [(0, 0)] * (x.ndim - 1)
        if self.width is None:
            return jnp.pad(x, [*lead, (self.offset, self.total - self.offset - self.size)])
        before = self.offset % self.width
        after = -(before + self.size) % self.width
        parts = []
        for i in range(PARTS):
            padded = jnp.pad(x * signs[i].astype(x.dtype), [*lead, (before, after)])
            parts.append(padded.reshape((*x.shape[:-1], -1, self.width)).sum(axis=-2))
        return jnp.concatenate(parts, axis=-1) / jnp.sqrt(jnp.asarray(PARTS, x.dtype))


def signs(key: jax.Array, size: int) -> jax.Array:
    """The random signs of a projection of `size` coordinates, shape `(PARTS, size)`, as int8."""
    return jax.random.rademacher(key, (PARTS, size), jnp.int8)


def width(total: int, limit: int) -> int | None:
    """The number of buckets with which `total` coordinates become at most `limit`.

    None where they are no more than that.
    """
    if total <= limit:
        return None
    return next(n for n in range(max(limit // PARTS, 2), 1, -1) if _prime(n))


def _prime(n: int) -> bool:
    return all(n % i for i in range(2, int(n**0.5) + 1))
