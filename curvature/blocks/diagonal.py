"""Diagonal blocks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from curvature.blocks.block import safe_power
from curvature.linalg import diagonal_matrices


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Diagonal:
    """G = diag(values).

    Attributes:
      values: non-negative, the shape of the block coordinates.
      stack_ndim: number of leading stack axes.
    """

    values: jax.Array
    stack_ndim: int = dataclasses.field(default=0, metadata={"static": True})

    def __matmul__(self, v: jax.Array) -> jax.Array:
        """G v."""
        return self.values * v

    def solve(self, v: jax.Array, damping: ArrayLike = 0.0) -> jax.Array:
        """(G + damping I)^-1 v; zero where both are zero."""
        return self.power(v, -1.0, damping)

    def power(self, v: jax.Array, p: float, damping: ArrayLike = 0.0) -> jax.Array:
        """(G + damping I)^p v; zero where G + damping I is."""
        return safe_power(self._shifted(damping), p) * v

    def trace(self) -> jax.Array:
        """The trace, summed over the stack."""
        return jnp.sum(self.values)

    def logdet(self, damping: ArrayLike = 0.0) -> jax.Array:
        """Log det(G + damping I), summed over the stack."""
        return jnp.sum(jnp.log(self._shifted(damping)))

    def eigenvalues(self) -> jax.Array:
        """All eigenvalues, shape `stack + (size,)`, ascending within each copy."""
        return jnp.sort(self._flat(), axis=-1)

    def diagonal(self) -> jax.Array:
        """The diagonal, as block coordinates."""
        return self.values

    def to_dense(self) -> jax.Array:
        """The matrix, shape `stack + (size, size)`."""
        flat = self._flat()
        return diagonal_matrices(flat)

    def damped_inverse(self, damping: ArrayLike) -> Diagonal:
        """(G + damping I)^-1."""
        return Diagonal(safe_power(self._shifted(damping), -1.0), self.stack_ndim)

    def _shifted(self, damping: ArrayLike) -> jax.Array:
        return self.values + jnp.asarray(damping, self.values.dtype)

    def _flat(self) -> jax.Array:
        return self.values.reshape((*self.values.shape[: self.stack_ndim], -1))
