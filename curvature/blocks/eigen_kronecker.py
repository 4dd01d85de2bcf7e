"""Eigenvalue-corrected Kronecker blocks, EKFAC (George et al. 2018).

With the eigenvectors Q_A and Q_B of the factors of a Kronecker block (see `kronecker`),

    G = (Q_A (x) Q_B) diag(values) (Q_A (x) Q_B)',    G V = Q_A (values * (Q_A' V Q_B)) Q_B'.

K-FAC is the case in which `values` are the products of the factors' eigenvalues. With the second
moments of the gradient in this basis instead, E[(Q_A' dV Q_B)^2], the trace is exact, and no matrix
that is diagonal in this basis is closer to the exact block in Frobenius norm (theorem 2 there).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from curvature.blocks.block import safe_power
from curvature.linalg import diagonal_matrices
from curvature.precision import HIGHEST, Precision, product


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EigenKronecker:
    """G = (Q_A (x) Q_B) diag(values) (Q_A (x) Q_B)' on block coordinates `stack + (d_in, d_out)`.

    Attributes:
      input_basis: Q_A, orthogonal, `stack + (d_in, d_in)`; ones, `stack + (d_in,)`, where the input
        factor is diagonal and Q_A the identity.
      output_basis: Q_B, `stack + (d_out, d_out)` or `stack + (d_out,)`.
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
        return self._scaled(self.values, v)

    def solve(self, v: jax.Array, damping: ArrayLike = 0.0) -> jax.Array:
        """(G + damping I)^-1 v exactly; the pseudo-inverse where an eigenvalue is zero."""
        return self.power(v, -1.0, damping)

    def power(self, v: jax.Array, p: float, damping: ArrayLike = 0.0) -> jax.Array:
        """(G + damping I)^p v exactly; zero on the null space."""
        return self._scaled(safe_power(self._shifted(damping), p), v)

    def trace(self) -> jax.Array:
        """The trace, summed over the stack."""
        return jnp.sum(self.values)

    def logdet(self, damping: ArrayLike = 0.0) -> jax.Array:
        """Log det(G + damping I), summed over the stack."""
        return jnp.sum(jnp.log(self._shifted(damping)))

    def eigenvalues(self) -> jax.Array:
        """All eigenvalues, shape `stack + (size,)`, ascending within each copy."""
        values = self._cleaned()
        return jnp.sort(values.reshape((*values.shape[: self.stack_ndim], -1)), axis=-1)

    def diagonal(self) -> jax.Array:
        """The diagonal, as block coordinates."""
        left, right = (
            basis if basis.ndim == self.stack_ndim + 1 else basis**2
            for basis in (self.input_basis, self.output_basis)
        )
        return from_basis((left, right), self.values, self.stack_ndim)

    def to_dense(self) -> jax.Array:
        """The matrix, shape `stack + (size, size)`."""
        left, right = self._full(self.input_basis), self._full(self.output_basis)
        vectors = jnp.einsum("...ik,...jl->...ijkl", left, right, precision=HIGHEST)
        size = left.shape[-1] * right.shape[-1]
        vectors = vectors.reshape((*vectors.shape[:-4], size, size))
        values = self.values.reshape((*vectors.shape[:-2], 1, size))
        return jnp.matmul(vectors * values, vectors.mT, precision=HIGHEST)

    def damped_inverse(self, damping: ArrayLike) -> EigenKronecker:
        """(G + damping I)^-1."""
        return dataclasses.replace(self, values=safe_power(self._shifted(damping), -1.0))

    def _scaled(self, values: jax.Array, v: jax.Array) -> jax.Array:
        bases, rest = (self.input_basis, self.output_basis), (self.stack_ndim, self.precision)
        return from_basis(bases, values * into_basis(bases, v, *rest), *rest)

    def _shifted(self, damping: ArrayLike) -> jax.Array:
        return self._cleaned() + jnp.asarray(damping, self.values.dtype)

    def _cleaned(self) -> jax.Array:
        """The values, zero where they are rounding errors: those of a row's entries, squared."""
        rounding = max(self.values.shape[-2:]) * float(np.finfo(self.values.dtype).eps)
        top = jnp.max(self.values, axis=(-2, -1), keepdims=True)
        return jnp.where(self.values > top * rounding**2, self.values, 0)

    def _full(self, basis: jax.Array) -> jax.Array:
        if basis.ndim == self.stack_ndim + 1:
            return diagonal_matrices(basis)
        return basis


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
    left, right = bases
    if left.ndim > stack_ndim + 1:
        v = product(first, left, v, precision)
    if right.ndim > stack_ndim + 1:
        v = product(second, v, right, precision)
    return v
