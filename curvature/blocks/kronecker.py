"""Kronecker-factored blocks (Martens and Grosse 2015).

For a dense layer with kernel V of shape (d_in, d_out), G = A (x) B with A the second moment of the
input, (d_in, d_in), and B that of the output gradients, (d_out, d_out), acts as

    G V = A V B,    and as the matrix A (x) B on the row-major flattened V.

A factor may be diagonal: a vector in place of a matrix.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from curvature.blocks.block import Block, Spectrum, safe_power
from curvature.blocks.eigen_kronecker import from_basis, into_basis
from curvature.linalg import (
    cholesky_inverse,
    diagonal,
    diagonal_matrices,
    eigh,
    multiples_of_identity,
    without_rounding,
)
from curvature.precision import HIGHEST, Precision, product


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kronecker(Block):
    """G = input (x) output on block coordinates `stack + (d_in, d_out)`.

    Attributes:
      input: `stack + (d_in, d_in)`, or `stack + (d_in,)` for a diagonal factor.
      output: `stack + (d_out, d_out)`, or `stack + (d_out,)`.
      stack_ndim: number of leading stack axes.
      precision: of the products in G v.
    """

    input: jax.Array
    output: jax.Array
    stack_ndim: int = dataclasses.field(default=0, metadata={"static": True})
    precision: Precision = dataclasses.field(default=HIGHEST, metadata={"static": True})

    def __matmul__(self, v: jax.Array) -> jax.Array:
        """G v."""
        if self._is_diagonal(self.input):
            left = self.input[..., :, None] * v
        else:
            left = product("...ij,...jk->...ik", self.input, v, self.precision)
        if self._is_diagonal(self.output):
            return left * self.output[..., None, :]
        return product("...ij,...jk->...ik", left, self.output, self.precision)

    def spectrum(self) -> Spectrum:
        """Products of the factors' eigenvalues, `stack + (d_in, d_out)`."""
        (a, qa), (b, qb) = self._eigh(self.input), self._eigh(self.output)
        return Spectrum(
            a[..., :, None] * b[..., None, :],
            lambda v: into_basis((qa, qb), v, self.stack_ndim),
            lambda v: from_basis((qa, qb), v, self.stack_ndim),
        )

    def trace(self) -> jax.Array:
        """tr(A) tr(B), summed over the stack."""
        return jnp.sum(self._traces(self.input) * self._traces(self.output))

    def diagonal(self) -> jax.Array:
        """The diagonal, as block coordinates."""
        a, b = self._diagonal_of(self.input), self._diagonal_of(self.output)
        return a[..., :, None] * b[..., None, :]

    def to_dense(self) -> jax.Array:
        """The matrix A (x) B, shape `stack + (size, size)`."""
        a, b = self._full(self.input), self._full(self.output)
        product = jnp.einsum("...ik,...jl->...ijkl", a, b, precision=HIGHEST)
        size = a.shape[-1] * b.shape[-1]
        return product.reshape((*product.shape[:-4], size, size))

    def damped_inverse(self, damping: ArrayLike) -> Kronecker:
        """(A + pi sqrt(damping) I)^-1 (x) (B + sqrt(damping) / pi I)^-1.

        Two Cholesky factorisations, about ten times cheaper than the eigendecompositions of
        `solve`; see `factored_damping`.
        """
        shifts = self.factored_damping(damping)
        return Kronecker(
            _damped_inverse(self.input, shifts[0], self._is_diagonal(self.input)),
            _damped_inverse(self.output, shifts[1], self._is_diagonal(self.output)),
            self.stack_ndim,
        )

    def factored_damping(
        self, damping: ArrayLike, *, relative: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """What is added to the diagonals of A and B so that the product is about G + damping I.

        pi sqrt(damping) and sqrt(damping) / pi with pi = sqrt((tr A / d_in) / (tr B / d_out)),
        which minimises a bound on the difference (Martens and Grosse 2015, section 6.3).

        Args:
          damping: what is added to G.
          relative: whether it is a multiple of G's mean eigenvalue; then these are multiples of A's
            and B's.
        """
        mean_a, mean_b = (
            jnp.mean(self._diagonal_of(factor), axis=-1) for factor in (self.input, self.output)
        )
        root = jnp.sqrt(jnp.asarray(damping, mean_a.dtype))
        both = (mean_a > 0) & (mean_b > 0)
        mean_a, mean_b = jnp.where(both, mean_a, 1), jnp.where(both, mean_b, 1)
        if relative:
            return root * mean_a, root * mean_b
        pi = jnp.sqrt(mean_a / mean_b)
        return pi * root, root / pi

    def _is_diagonal(self, factor: jax.Array) -> bool:
        return factor.ndim == self.stack_ndim + 1

    def _diagonal_of(self, factor: jax.Array) -> jax.Array:
        return factor if self._is_diagonal(factor) else diagonal(factor)

    def _traces(self, factor: jax.Array) -> jax.Array:
        return jnp.sum(self._diagonal_of(factor), axis=-1)

    def _full(self, factor: jax.Array) -> jax.Array:
        if self._is_diagonal(factor):
            return diagonal_matrices(factor)
        return factor

    def _eigh(self, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Eigenvalues, zero where they are rounding errors, and eigenvectors; ones for identity."""
        if self._is_diagonal(factor):
            return jnp.maximum(factor, 0), jnp.ones_like(factor)
        values, vectors = eigh(factor)
        return without_rounding(values), vectors


def _damped_inverse(factor: jax.Array, shift: jax.Array, diagonal: bool) -> jax.Array:
    if diagonal:
        return safe_power(factor + shift[..., None], -1.0)
    return cholesky_inverse(factor + multiples_of_identity(shift, factor.shape[-1]))
