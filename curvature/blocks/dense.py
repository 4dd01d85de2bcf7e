"""Dense blocks: the full matrix of a small layer."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from curvature.blocks.block import Block, Spectrum, safe_power, shifted
from curvature.linalg import diagonal, eigh, without_rounding
from curvature.precision import HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense(Block):
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
        return _times(self.values, v.reshape(self.values.shape[:-1])).reshape(self.shape)

    def spectrum(self) -> Spectrum:
        """By eigendecomposition; coefficients are flat, `stack + (size,)`."""
        values, vectors = eigh(self.values)
        flat = (*self.shape[: self.stack_ndim], -1)
        return Spectrum(
            without_rounding(values),
            lambda v: _times(vectors.mT, v.reshape(flat)),
            lambda v: _times(vectors, v).reshape(self.shape),
        )

    def trace(self) -> jax.Array:
        """The trace, summed over the stack."""
        return jnp.sum(diagonal(self.values))

    def diagonal(self) -> jax.Array:
        """The diagonal, as block coordinates."""
        return diagonal(self.values).reshape(self.shape)

    def to_dense(self) -> jax.Array:
        """The matrix, shape `stack + (size, size)`."""
        return self.values

    def damped_inverse(self, damping: ArrayLike) -> Dense:
        """(G + damping I)^-1."""
        values, vectors = eigh(self.values)
        powers = safe_power(shifted(without_rounding(values), damping), -1.0)
        inverse = jnp.matmul(vectors * powers[..., None, :], vectors.mT, precision=HIGHEST)
        return dataclasses.replace(self, values=inverse)


def _times(matrices: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.matmul(matrices, v[..., None], precision=HIGHEST)[..., 0]
