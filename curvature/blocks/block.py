"""What every curvature block can do.

A block is a symmetric positive semi-definite linear operator on arrays of *block coordinates* (see
`trace.layers`). Leading stack axes hold independent copies: the operator is block-diagonal over
them. Blocks are pytrees; everything here is jittable.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


class Spectrum(NamedTuple):
    """A block's eigenvalues, and block coordinates in its eigenbasis and back.

    Attributes:
      values: `stack + ...`, zero where they are rounding errors, in any order.
      into: from block coordinates to coefficients, of a shape that broadcasts with `values`.
      back: from coefficients to block coordinates.
    """

    values: jax.Array
    into: Callable[[jax.Array], jax.Array] = lambda v: v
    back: Callable[[jax.Array], jax.Array] = lambda v: v


class Block(abc.ABC):
    """A linear operator on block coordinates."""

    stack_ndim: int

    @abc.abstractmethod
    def __matmul__(self, v: jax.Array) -> jax.Array:
        """G v."""

    @abc.abstractmethod
    def spectrum(self) -> Spectrum:
        """The eigendecomposition, from which solves, powers and log determinants follow."""

    @abc.abstractmethod
    def trace(self) -> jax.Array:
        """The trace, summed over the stack."""

    @abc.abstractmethod
    def diagonal(self) -> jax.Array:
        """The diagonal, as block coordinates."""

    @abc.abstractmethod
    def to_dense(self) -> jax.Array:
        """The matrix on row-major flattened coordinates, shape `stack + (size, size)`."""

    @abc.abstractmethod
    def damped_inverse(self, damping: ArrayLike) -> Block:
        """A block close to (G + damping I)^-1 that is cheap to make and to apply."""

    def solve(self, v: jax.Array, damping: ArrayLike = 0.0) -> jax.Array:
        """(G + damping I)^-1 v exactly; the pseudo-inverse where an eigenvalue is zero."""
        return self.power(v, -1.0, damping)

    def power(self, v: jax.Array, p: float, damping: ArrayLike = 0.0) -> jax.Array:
        """(G + damping I)^p v exactly; zero on the null space."""
        values, into, back = self.spectrum()
        return back(safe_power(shifted(values, damping), p) * into(v))

    def logdet(self, damping: ArrayLike = 0.0) -> jax.Array:
        """Log det(G + damping I), summed over the stack."""
        return jnp.sum(jnp.log(shifted(self.spectrum().values, damping)))

    def eigenvalues(self) -> jax.Array:
        """All eigenvalues, shape `stack + (size,)`, ascending within each copy."""
        values = self.spectrum().values
        return jnp.sort(values.reshape((*values.shape[: self.stack_ndim], -1)), axis=-1)


def shifted(values: jax.Array, damping: ArrayLike) -> jax.Array:
    """Values + damping, in the values' dtype."""
    return values + jnp.asarray(damping, values.dtype)


def safe_power(values: jax.Array, p: float) -> jax.Array:
    """values^p, and zero where a value is not positive: powers on the range only."""
    positive = values > 0
    powers = jnp.where(positive, values, 1) ** p
    return jnp.where(positive, powers, 0)
