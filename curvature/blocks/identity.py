"""Identity-scaled blocks: one number for a layer."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from curvature.blocks.block import Block, Spectrum, safe_power, shifted
from curvature.linalg import multiples_of_identity


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Identity(Block):
    """G = c I.

    With c the mean of a matrix's diagonal, G has its trace, and no other multiple of the identity
    is closer to it in Frobenius norm.

    Attributes:
      values: c, non-negative, shape `stack`.
      shape: the shape of the block coordinates, stack included.
      stack_ndim: number of leading stack axes.
    """

    values: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    stack_ndim: int = dataclasses.field(default=0, metadata={"static": True})

    def __matmul__(self, v: jax.Array) -> jax.Array:
        """G v."""
        return self._spread(self.values) * v

    def spectrum(self) -> Spectrum:
        """c, as often as there are coordinates."""
        return Spectrum(self.diagonal())

    def trace(self) -> jax.Array:
        """The trace, summed over the stack."""
        return jnp.sum(self.values) * self._size

    def diagonal(self) -> jax.Array:
        """The diagonal, as block coordinates."""
        return jnp.broadcast_to(self._spread(self.values), self.shape)

    def to_dense(self) -> jax.Array:
        """The matrix, shape `stack + (size, size)`."""
        return multiples_of_identity(self.values, self._size)

    def damped_inverse(self, damping: ArrayLike) -> Identity:
        """(G + damping I)^-1."""
        return dataclasses.replace(self, values=safe_power(shifted(self.values, damping), -1.0))

    @property
    def _size(self) -> int:
        return math.prod(self.shape[self.stack_ndim :])

    def _spread(self, values: jax.Array) -> jax.Array:
        """One number for each copy, to be broadcast against block coordinates."""
        return values.reshape(values.shape + (1,) * (len(self.shape) - self.stack_ndim))
