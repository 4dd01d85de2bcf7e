"""Dense blocks: the full matrix of a small layer."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from curvature.blocks.block import safe_power
from curvature.linalg import diagonal, eigh
from curvature.precision import HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """G = values on row-major flattened block coordinates.

    Attributes:
      values: `stack + (size, size)`, symmetric.
      shape: the shape of the block coordinates, stack included.
      stack_ndim: number of leading stack axes.
    """

    values: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    stack_ndim: int = dataclasses.field(default=0, metadata={"static": True})

    def __matmul__(self, v: jax.Array) -> jax.Array:
        """G v."""
        return self._applied(self.values, v)

    def solve(self, v: jax.Array, damping: ArrayLike = 0.0) -> jax.Array:
        """(G + damping I)^-1 v; the pseudo-inverse where an eigenvalue is zero."""
        return self.power(v, -1.0, damping)

    def power(self, v: jax.Array, p: float, damping: ArrayLike = 0.0) -> jax.Array:
        """(G + damping I)^p v; zero on the null space."""
        return self._applied(self._power(p, damping), v)

    def trace(self) -> jax.Array:
        """The trace, summed over the stack."""
        return jnp.sum(diagonal(self.values))

    def logdet(self, damping: ArrayLike = 0.0) -> jax.Array:
        """Log det(G + damping I), summed over the stack."""
        values = self.eigenvalues()
        return jnp.sum(jnp.log(values + jnp.asarray(damping, values.dtype)))

    def eigenvalues(self) -> jax.Array:
        """All eigenvalues, shape `stack + (size,)`, ascending within each copy."""
        return self._eigh()[0]

    def diagonal(self) -> jax.Array:
        """The diagonal, as block coordinates."""
        return diagonal(self.values).reshape(self.shape)

    def to_dense(self) -> jax.Array:
        """The matrix, shape `stack + (size, size)`."""
        return self.values

    def damped_inverse(self, damping: ArrayLike) -> Dense:
        """(G + damping I)^-1."""
        return dataclasses.replace(self, values=self._power(-1.0, damping))

    def _applied(self, matrix: jax.Array, v: jax.Array) -> jax.Array:
        size = math.prod(self.shape[self.stack_ndim :])
        flat = v.reshape((*self.shape[: self.stack_ndim], size, 1))
        return jnp.matmul(matrix, flat, precision=HIGHEST).reshape(self.shape)

    def _eigh(self) -> tuple[jax.Array, jax.Array]:
        values, vectors = eigh(self.values)
        rounding = values.shape[-1] * float(np.finfo(values.dtype).eps)
        return jnp.where(values > values[..., -1:] * rounding, values, 0), vectors

    def _power(self, p: float, damping: ArrayLike) -> jax.Array:
        values, vectors = self._eigh()
        powers = safe_power(values + jnp.asarray(damping, values.dtype), p)
        return jnp.matmul(vectors * powers[..., None, :], vectors.mT, precision=HIGHEST)
