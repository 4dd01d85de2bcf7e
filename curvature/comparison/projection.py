"""Random projections of a block's coordinates to a few hundred, which keep inner products.

With R of n rows and entries of random sign, one in each row and part, <R'x, R'y> is <x, y> on
average, with a variance of about (|x|^2 |y|^2 + <x, y>^2) / dim (Charikar, Chen and Farach-Colton
2002). So R'GR stands for G in traces, Frobenius inner products, leading eigenvalues and angles, and
solves, as long as few eigenvalues matter; dim is 995, and curvatures have a few dozen.

A coordinate's bucket is its place modulo a prime. Neighbours in a row or column of a weight matrix
then never share one, and no index has to be looked up. The projection consists of independent
parts: leaving out one at a time says how far figures are off (`figures.jackknife`). Where there are
more than 16,381 coordinates, all parts share a first fold to so many, whose variance is a sixteenth
of theirs: memory is read once.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

PARTS = 5
FOLD = 16_381  # the largest prime below 2^14


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

    def __call__(self, x: jax.Array, fold: jax.Array, parts: jax.Array) -> jax.Array:
        """Projects vectors.

        Args:
          x: shape `(count, size)`.
          fold: random signs, shape `(size,)`.
          parts: random signs, shape `(PARTS, folded(total))`, the same for all parts of `total`.

        Returns:
          Shape `(count, dim)`: the part of `total` coordinates that comes from these `size`.
        """
        if self.width is None or self.total <= FOLD:
            y = jnp.pad(x, [(0, 0), (self.offset, self.total - self.offset - self.size)])
        else:
            y = _folded(x, fold, self.offset % FOLD)
        if self.width is None:
            return y
        found = []
        for signs in parts:
            padded = jnp.pad(y * signs.astype(x.dtype), [(0, 0), (0, -y.shape[1] % self.width)])
            found.append(padded.reshape((len(x), -1, self.width)).sum(axis=1))
        return jnp.concatenate(found, axis=1) / jnp.sqrt(jnp.asarray(PARTS, x.dtype))


def folded(total: int) -> int:
    """How many coordinates the parts of a projection see."""
    return min(total, FOLD)


def _folded(x: jax.Array, signs: jax.Array, offset: int) -> jax.Array:
    """The sums of x * signs by (place + offset) modulo FOLD, shape `(count, FOLD)`.

    A loop over slices: a sum over an axis of a reshaped array takes XLA six times as long on CPUs.
    """
    rows, rest = divmod(x.shape[1], FOLD)

    def add(i: int, total: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(x, i * FOLD, FOLD, axis=1)
        return total + part * jax.lax.dynamic_slice_in_dim(signs, i * FOLD, FOLD).astype(x.dtype)

    tail = x[:, rows * FOLD :] * signs[rows * FOLD :].astype(x.dtype)
    total = jnp.pad(tail, [(0, 0), (0, FOLD - rest)])
    if rows:
        total = jax.lax.fori_loop(0, rows, add, total)
    return jnp.roll(total, offset, axis=1)


def width(total: int, limit: int, dim: int) -> int | None:
    """The number of buckets with which `total` coordinates become at most `dim`.

    None where they are no more than `limit`.
    """
    if total <= limit:
        return None
    return next(n for n in range(max(dim // PARTS, 2), 1, -1) if _prime(n))


def _prime(n: int) -> bool:
    return all(n % i for i in range(2, int(n**0.5) + 1))
