"""Identity-scaled blocks: one number for a layer."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from curvature.blocks.block import safe_power
from curvature.linalg import multiples_of_identity


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Identity:
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

    def solve(self, v: jax.Array, damping: ArrayLike = 0.0) -> jax.Array:
        """(G + damping I)^-1 v; zero where both are zero."""
        return self.power(v, -1.0, damping)

    def power(self, v: jax.Array, p: float, damping: ArrayLike = 0.0) -> jax.Array:
        """(G + damping I)^p v; zero where G + damping I is."""
        return self._spread(safe_power(self._shifted(damping), p)) * v

    def trace(self) -> jax.Array:
        """The trace, summed over the stack."""
        return jnp.sum(self.values) * self._size

    def logdet(self, damping: ArrayLike = 0.0) -> jax.Array:
        """Log det(G + damping I), summed over the stack."""
        return jnp.sum(jnp.log(self._shifted(damping))) * self._size

    def eigenvalues(self) -> jax.Array:
        """All eigenvalues, shape `stack + (size,)`: c, as often as there are coordinates."""
        return jnp.broadcast_to(self.values[..., None], (*self.values.shape, self._size))

    def diagonal(self) -> jax.Array:
        """The diagonal, as block coordinates."""
        return jnp.broadcast_to(self._spread(self.values), self.shape)

    def to_dense(self) -> jax.Array:
        """The matrix, shape `stack + (size, size)`."""
        return multiples_of_identity(self.values, self._size)

    def damped_inverse(self, damping: ArrayLike) -> Identity:
        """(G + damping I)^-1."""
        return dataclasses.replace(self, values=safe_power(self._shifted(damping), -1.0))

    @property
    def _size(self) -> int:
        return math.prod(self.shape[self.stack_ndim :])

    def _shifted(self, damping: ArrayLike) -> jax.Array:
        return self.values + jnp.asarray(damping, self.values.dtype)

    def _spread(self, values: jax.Array) -> jax.Array:
        """One number for each copy, to be broadcast against block coordinates."""
        return values.reshape(values.shape + (1,) * (len(self.shape) - self.stack_ndim))
