"""Eigenvalue-corrected Kronecker blocks, EKFAC (George et al. 2018).

With the eigenvectors Q_A and Q_B of the factors of a Kronecker block (see `kronecker`),

    G = (Q_A (x) Q_B) diag(values) (Q_A (x) Q_B)',    G V = Q_A (values * (Q_A' V Q_B)) Q_B'.

K-FAC is the case in which `values` are the products of the factors' eigenvalues. With the second
moments of the gradient in this basis instead, E[(Q_A' dV Q_B)^2], the trace is exact, and no matrix
that is diagonal in this basis is closer to the exact block in Frobenius norm (theorem 2 there).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from curvature.blocks.block import Block, Spectrum, safe_power, shifted
from curvature.linalg import without_rounding
from curvature.precision import HIGHEST, Precision
from curvature.sides import full, is_diagonal, left, right


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EigenKronecker(Block):
    """G = (Q_A (x) Q_B) diag(values) (Q_A (x) Q_B)' on block coordinates `stack + (d_in, d_out)`.

    Attributes:
      input_basis: Q_A, orthogonal, `stack + (d_in, d_in)`; ones, `stack + (d_in,)`, where the input
        factor is diagonal and Q_A the identity; `stack + (count, width, width)` where it is in
        blocks.
      output_basis: Q_B, likewise.
      values: the eigenvalues, non-negative, `stack + (d_in, d_out)`.
      stack_ndim: number of leading stack axes.
      precision: of changes of basis.
    """

    input_basis: jax.Array
    output_basis: jax.Array
    values: jax.Array
    stack_ndim: int = dataclasses.field(default=0, metadata={"static": True})
    precision: Precision = dataclasses.field(default=HIGHEST, metadata={"static": True})

    def __matmul__(self, v: jax.Array) -> jax.Array:
        """G v."""
        return self._from(self.values * self._into(v))

    def spectrum(self) -> Spectrum:
        """The values, in the bases that are there.

        Those that are rounding errors are zero: errors of a row's entries, squared.
        """
        size = max(self.values.shape[-2:])
        return Spectrum(without_rounding(self.values, (-2, -1), size, 2), self._into, self._from)

    def trace(self) -> jax.Array:
        """The trace, summed over the stack."""
        return jnp.sum(self.values)

    def diagonal(self) -> jax.Array:
        """The diagonal, as block coordinates."""
        squares = [
            basis if is_diagonal(basis, self.stack_ndim) else basis**2
            for basis in (self.input_basis, self.output_basis)
        ]
        return from_basis(squares, self.values, self.stack_ndim)

    def to_dense(self) -> jax.Array:
        """The matrix, shape `stack + (size, size)`."""
        sizes, bases = self.values.shape[-2:], (self.input_basis, self.output_basis)
        a, b = (full(q, size, self.stack_ndim) for q, size in zip(bases, sizes, strict=True))
        vectors = jnp.einsum("...ik,...jl->...ijkl", a, b, precision=HIGHEST)
        size = math.prod(sizes)
        vectors = vectors.reshape((*vectors.shape[:-4], size, size))
        values = self.values.reshape((*vectors.shape[:-2], 1, size))
        return jnp.matmul(vectors * values, vectors.mT, precision=HIGHEST)

    def damped_inverse(self, damping: ArrayLike) -> EigenKronecker:
        """(G + damping I)^-1."""
        values = shifted(self.spectrum().values, damping)
        return dataclasses.replace(self, values=safe_power(values, -1.0))

    def _into(self, v: jax.Array) -> jax.Array:
        bases = self.input_basis, self.output_basis
        return into_basis(bases, v, self.stack_ndim, self.precision)

    def _from(self, v: jax.Array) -> jax.Array:
        bases = self.input_basis, self.output_basis
        return from_basis(bases, v, self.stack_ndim, self.precision)


def into_basis(
    bases: Sequence[jax.Array], v: jax.Array, stack_ndim: int, precision: Precision = HIGHEST
) -> jax.Array:
    """Q_A' V Q_B, for the bases of both sides as an `EigenKronecker` has them."""
    return _turned(bases, v, stack_ndim, precision, "...ji,...jk->...ik", "...ik,...kl->...il")


def from_basis(
    bases: Sequence[jax.Array], v: jax.Array, stack_ndim: int, precision: Precision = HIGHEST
) -> jax.Array:
    """Q_A V Q_B'."""
    return _turned(bases, v, stack_ndim, precision, "...ij,...jk->...ik", "...ik,...lk->...il")


def _turned(
    bases: Sequence[jax.Array],
    v: jax.Array,
    stack_ndim: int,
    precision: Precision,
    first: str,
    second: str,
) -> jax.Array:
    """Products with both bases; a basis `stack + (size,)` is the identity.

    Which axes are summed over is said by subscripts: a CPU copies the transpose of a batch.
    """
    a, b = bases
    if not is_diagonal(a, stack_ndim):
        v = left(first, a, v, stack_ndim, precision)
    if not is_diagonal(b, stack_ndim):
        v = right(second, v, b, stack_ndim, precision)
    return v
