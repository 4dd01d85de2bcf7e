"""What every curvature block can do.

A block is a symmetric positive semi-definite linear operator on arrays of *block coordinates* (see
`registry.layers`). Leading stack axes hold independent copies: the operator is block-diagonal over
them. Blocks are pytrees; everything here is jittable.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


class Block(Protocol):
    """A linear operator on block coordinates."""

    def __matmul__(self, v: jax.Array) -> jax.Array:
        """G v."""
        ...

    def solve(self, v: jax.Array, damping: ArrayLike = 0.0) -> jax.Array:
        """(G + damping I)^-1 v exactly; the pseudo-inverse where an eigenvalue is zero."""
        ...

    def power(self, v: jax.Array, p: float, damping: ArrayLike = 0.0) -> jax.Array:
        """(G + damping I)^p v exactly; zero on the null space."""
        ...

    def trace(self) -> jax.Array:
        """The trace, summed over the stack."""
        ...

    def logdet(self, damping: ArrayLike = 0.0) -> jax.Array:
        """Log det(G + damping I), summed over the stack."""
        ...

    def eigenvalues(self) -> jax.Array:
        """All eigenvalues, shape `stack + (size,)`, ascending within each copy."""
        ...

    def diagonal(self) -> jax.Array:
        """The diagonal, as block coordinates."""
        ...

    def to_dense(self) -> jax.Array:
        """The matrix on row-major flattened coordinates, shape `stack + (size, size)`."""
        ...

    def damped_inverse(self, damping: ArrayLike) -> Block:
        """A block close to (G + damping I)^-1 that is cheap to make and to apply."""
        ...


def safe_power(values: jax.Array, p: float) -> jax.Array:
    """values^p, and zero where a value is not positive: powers on the range only."""
    positive = values > 0
    powers = jnp.where(positive, values, 1) ** p
    return jnp.where(positive, powers, 0)
