"""Kronecker-factored blocks (Martens and Grosse 2015).

For a dense layer with kernel V of shape (d_in, d_out), G = A (x) B with A the second moment of the
input, (d_in, d_in), and B that of the output gradients, (d_out, d_out), acts as

    G V = A V B,    and as the matrix A (x) B on the row-major flattened V.

A factor may be diagonal, a vector in place of a matrix, or blocks along its diagonal: see `sides`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from curvature.blocks.block import Block, Spectrum, safe_power
from curvature.blocks.eigen_kronecker import from_basis, into_basis
from curvature.linalg import cholesky_inverse, multiples_of_identity, without_rounding
from curvature.precision import HIGHEST, Precision
from curvature.sides import (
    emptied,
    entries,
    full,
    in_blocks,
    is_diagonal,
    left,
    right,
    side_eigh,
    told_apart,
)

T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kronecker(Block):
    """G = input (x) output on block coordinates `stack + (d_in, d_out)`.

    Attributes:
      input: `stack + (d_in, d_in)`, `stack + (d_in,)` for a diagonal factor, or
        `stack + (count, width, width)` for blocks along its diagonal.
      output: likewise.
      stack_ndim: number of leading stack axes.
      precision: of the products in G v.
      sizes: d_in and d_out; None where no block is filled up.
    """

    input: jax.Array
    output: jax.Array
    stack_ndim: int = dataclasses.field(default=0, metadata={"static": True})
    precision: Precision = dataclasses.field(default=HIGHEST, metadata={"static": True})
    sizes: tuple[int, int] | None = dataclasses.field(default=None, metadata={"static": True})

    def __matmul__(self, v: jax.Array) -> jax.Array:
        """G v."""
        depth, how = self.stack_ndim, "...ij,...jk->...ik"
        if is_diagonal(self.input, depth):
            half = self.input[..., :, None] * v
        else:
            half = left(how, self.input, v, depth, self.precision)
        if is_diagonal(self.output, depth):
            return half * self.output[..., None, :]
        return right(how, half, self.output, depth, self.precision)

    def spectrum(self) -> Spectrum:
        """Products of the factors' eigenvalues, `stack + (d_in, d_out)`."""
        (a, qa), (b, qb) = self._each(side_eigh)
        a, b = (
            jnp.maximum(values, 0) if is_diagonal(q, self.stack_ndim) else without_rounding(values)
            for values, q in ((a, qa), (b, qb))
        )
        return Spectrum(
            a[..., :, None] * b[..., None, :],
            lambda v: into_basis((qa, qb), v, self.stack_ndim),
            lambda v: from_basis((qa, qb), v, self.stack_ndim),
        )

    def trace(self) -> jax.Array:
        """tr(A) tr(B), summed over the stack."""
        a, b = (jnp.sum(x, axis=-1) for x in self._each(entries))
        return jnp.sum(a * b)

    def diagonal(self) -> jax.Array:
        """The diagonal, as block coordinates."""
        a, b = self._each(entries)
        return a[..., :, None] * b[..., None, :]

    def to_dense(self) -> jax.Array:
        """The matrix A (x) B, shape `stack + (size, size)`."""
        a, b = self._each(full)
        product = jnp.einsum("...ik,...jl->...ijkl", a, b, precision=HIGHEST)
        size = a.shape[-1] * b.shape[-1]
        return product.reshape((*product.shape[:-4], size, size))

    def damped_inverse(self, damping: ArrayLike) -> Kronecker:
        """(A + pi sqrt(damping) I)^-1 (x) (B + sqrt(damping) / pi I)^-1.

        Two Cholesky factorisations, about ten times cheaper than the eigendecompositions of
        `solve`; see `factored_damping`.
        """
        shifts = self.factored_damping(damping)
        a, b = (
            self._damped_inverse(factor, shift, size)
            for (factor, size), shift in zip(self._sides, shifts, strict=True)
        )
        return Kronecker(a, b, self.stack_ndim, sizes=self.sizes)

    @property
    def mean_eigenvalues(self) -> tuple[jax.Array, jax.Array]:
        """Tr A / d_in and tr B / d_out."""
        mean_a, mean_b = (jnp.mean(x, axis=-1) for x in self._each(entries))
        return mean_a, mean_b

    def factored_damping(
        self, damping: ArrayLike, *, relative: bool = False, least: ArrayLike = 0.0
    ) -> tuple[jax.Array, jax.Array]:
        """What is added to the diagonals of A and B so that the product is about G + damping I.

        pi sqrt(damping) and sqrt(damping) / pi with pi = sqrt((tr A / d_in) / (tr B / d_out)),
        which minimises a bound on the difference (Martens and Grosse 2015, section 6.3).

        Args:
          damping: what is added to G.
          relative: whether it is a multiple of G's mean eigenvalue; then these are multiples of A's
            and B's.
          least: what B's mean eigenvalue is taken for where it is less, for a relative damping.
        """
        mean_a, mean_b = self.mean_eigenvalues
        mean_b = jnp.maximum(mean_b, jnp.asarray(least, mean_b.dtype)) if relative else mean_b
        root = jnp.sqrt(jnp.asarray(damping, mean_a.dtype))
        both = (mean_a > 0) & (mean_b > 0)
        mean_a, mean_b = jnp.where(both, mean_a, 1), jnp.where(both, mean_b, 1)
        if relative:
            return root * mean_a, root * mean_b
        pi = jnp.sqrt(mean_a / mean_b)
        return pi * root, root / pi

    @property
    def _sides(self) -> tuple[tuple[jax.Array, int], ...]:
        """Both factors, and how many coordinates they have."""
        sizes = self.sizes or [
            math.prod(x.shape[self.stack_ndim :][:2])
            if in_blocks(x, self.stack_ndim)
            else x.shape[-1]
            for x in (self.input, self.output)
        ]
        return (self.input, sizes[0]), (self.output, sizes[1])

    def _damped_inverse(self, factor: jax.Array, shift: jax.Array, size: int) -> jax.Array:
        if is_diagonal(factor, self.stack_ndim):
            return safe_power(factor + shift[..., None], -1.0)
        damped = damped_side(factor, shift, size, self.stack_ndim)
        return emptied(cholesky_inverse(damped), size, self.stack_ndim)

    def _each(self, function: Callable[[jax.Array, int, int], T]) -> tuple[T, T]:
        """A function of `sides` of both factors."""
        first, second = (function(x, size, self.stack_ndim) for x, size in self._sides)
        return first, second


def damped_side(factor: jax.Array, shift: jax.Array, size: int, stack_ndim: int) -> jax.Array:
    """A + shift I for one side that is no diagonal, to be inverted."""
    shift = shift[..., None] if in_blocks(factor, stack_ndim) else shift
    return told_apart(factor, size, stack_ndim) + multiples_of_identity(shift, factor.shape[-1])
