"""Diagonal blocks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from curvature.blocks.block import Block, Spectrum, safe_power, shifted
from curvature.linalg import diagonal_matrices


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Diagonal(Block):
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

    def spectrum(self) -> Spectrum:
        """The values themselves."""
        return Spectrum(self.values)

    def trace(self) -> jax.Array:
        """The trace, summed over the stack."""
        return jnp.sum(self.values)

    def diagonal(self) -> jax.Array:
        """The diagonal, as block coordinates."""
        return self.values

    def to_dense(self) -> jax.Array:
        """The matrix, shape `stack + (size, size)`."""
        return diagonal_matrices(self.values.reshape((*self.values.shape[: self.stack_ndim], -1)))

    def damped_inverse(self, damping: ArrayLike) -> Diagonal:
        """(G + damping I)^-1."""
        return Diagonal(safe_power(shifted(self.values, damping), -1.0), self.stack_ndim)
