"""What a refresh does to a factor: invert it damped, or find its eigenbasis.

All of these take batches of symmetric matrices, `(batch, size, size)`, with what the refresh before
found for them and how stale that has become, and may start from it, or leave it where it is good
enough still (`tolerance`).

- `Cholesky` and `NewtonSchulz` invert damped factors: damping is factored with pi.
- `Eigh` and `QR` find eigenbases, in which damping is factored as that of the other two, or exact.
  Layers with the block `"ekfac"` need a basis: `Cholesky` and `NewtonSchulz` give them `Eigh()`'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvature.linalg import (
    cholesky_inverse,
    diagonal,
    diagonal_matrices,
    eigh,
    orthonormal,
)
from curvature.optimizer.refresh.cond import cond
from curvature.precision import HIGHEST


@dataclasses.dataclass(frozen=True)
class Cholesky:
    """Inverses by Cholesky factorisation: the cheapest on a CPU.

    Staleness is |M X - I| / |I| in Frobenius norm for the damped factor M and the previous inverse
    X, estimated along eight random directions; it is measured if there is a tolerance for it.

    Attributes:
      tolerance: staleness up to which an inverse is kept; 0 renews it always.
    """

    tolerance: float = 0.0

    def __post_init__(self) -> None:
        _check_tolerance(self.tolerance)

    def inverse(self, matrices: jax.Array, previous: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Inverses and the staleness, `(batch,)`, of the previous ones."""
        if self.tolerance == 0:
            return cholesky_inverse(matrices), jnp.zeros(len(matrices), matrices.dtype)
        shape = (1, matrices.shape[-1], 8)
        probe = np.random.default_rng(0).choice([-1.0, 1.0], shape).astype(matrices.dtype)
        there = jnp.matmul(previous, probe, precision=HIGHEST)
        there = jnp.matmul(matrices, there, precision=HIGHEST)
        stale = _norm(there - probe) / probe.size**0.5
        new = _by_need(self.tolerance, stale, lambda: cholesky_inverse(matrices), previous)
        return new, stale


@dataclasses.dataclass(frozen=True)
class NewtonSchulz:
    """Inverses by X <- X + X (I - M X) from the previous ones: matrix products alone.

    Where the previous inverse is too far away for that to converge, as it is at first, the inverse
    is that of `Cholesky`. The staleness, |M X - I| / |I|, comes for free.

    Attributes:
      iterations: each squares I - M X, and costs two products of matrices.
      tolerance: staleness up to which an inverse is kept; 0 renews it always.
    """

    iterations: int = 2
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        _check_tolerance(self.tolerance)
        if self.iterations < 1:
            raise ValueError(f"iterations is {self.iterations}, expected a positive integer.")

    def inverse(self, matrices: jax.Array, previous: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Inverses and the staleness, `(batch,)`, of the previous ones."""
        residual = _residual(matrices, previous)
        stale = _norm(residual) / matrices.shape[-1] ** 0.5

        def improved() -> jax.Array:
            x, left = previous, residual
            for i in range(self.iterations):
                left = left if i == 0 else _residual(matrices, x)
                x = x + jnp.matmul(x, left, precision=HIGHEST)
            near = _norm(left) < 0.5  # then |I - M X| is below 0.25 now; false for NaN
            x = (x + x.mT) / 2
            return cond(
                jnp.all(near),
                lambda: x,
                lambda: jnp.where(near[:, None, None], x, cholesky_inverse(matrices)),
            )

        return _by_need(self.tolerance, stale, improved, previous), stale


@dataclasses.dataclass(frozen=True)
class Eigh:
    """Eigenbases by an eigendecomposition.

    Staleness is the off-diagonal part of Q'AQ relative to A, in Frobenius norm, for the factor A
    and the previous basis Q (Eschenhagen et al. 2025, "Purifying Shampoo"). A basis that is kept
    has new eigenvalues all the same: the diagonal of Q'AQ.

    Attributes:
      tolerance: staleness up to which a basis is kept; 0 renews it always.
      factored: whether factors are damped one by one, as by `Cholesky`: an eigenvalue a b of
        A (x) B becomes (a + pi sqrt(damping)) (b + sqrt(damping) / pi), and not a b + damping. The
        latter, exact damping, leaves directions that few examples have shown with next to none.
    """

    tolerance: float = 0.0
    factored: bool = True

    def __post_init__(self) -> None:
        _check_tolerance(self.tolerance)

    def basis(
        self, factors: jax.Array, previous: jax.Array, first: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Eigenvalues, eigenvectors as columns, and the staleness of the previous ones.

        Args:
          factors: `(batch, size, size)`.
          previous: earlier eigenvectors.
          first: whether there are none yet.
        """
        _, kept, stale = _in_basis(factors, previous, first)
        values, vectors = _by_need(self.tolerance, stale, lambda: eigh(factors), (kept, previous))
        return values, vectors, stale


@dataclasses.dataclass(frozen=True)
class QR:
    """Eigenbases tracked by orthogonal iteration, Q <- qr(A Q), from the previous ones.

    One step of it, as in SOAP (Vyas et al. 2024), is three matrix products and a QR decomposition,
    for devices on which eigendecompositions are slow; on a CPU it is no faster than `Eigh`. The
    first basis is `Eigh`'s. Staleness, tolerance and damping are as there.

    Attributes:
      tolerance: staleness up to which a basis is kept; 0 renews it always.
      factored: whether factors are damped one by one.
    """

    tolerance: float = 0.0
    factored: bool = True

    def __post_init__(self) -> None:
        _check_tolerance(self.tolerance)

    def basis(
        self, factors: jax.Array, previous: jax.Array, first: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Eigenvalues, eigenvectors as columns, and the staleness of the previous ones."""
        product, kept, stale = _in_basis(factors, previous, first)

        def tracked() -> tuple[jax.Array, jax.Array]:
            order = jnp.argsort(-kept, axis=-1)  # the iteration sorts by size: help it
            vectors = orthonormal(jnp.take_along_axis(product, order[:, None, :], axis=-1))
            again = jnp.matmul(factors, vectors, precision=HIGHEST)
            return jnp.sum(vectors * again, axis=-2), vectors

        def renewed() -> tuple[jax.Array, jax.Array]:
            return cond(first, lambda: eigh(factors), tracked)

        values, vectors = _by_need(self.tolerance, stale, renewed, (kept, previous))
        return values, vectors, stale


Method = Cholesky | NewtonSchulz | Eigh | QR


def _by_need(tolerance: float, stale: jax.Array, renew: Callable[[], Any], kept: Any) -> Any:
    """`renew()` if one of the batch is too stale."""
    if tolerance == 0:
        return renew()
    return cond(jnp.all(stale <= tolerance), lambda: kept, renew)


def _residual(matrices: jax.Array, x: jax.Array) -> jax.Array:
    identity = diagonal_matrices(jnp.ones(matrices.shape[:-1], matrices.dtype))
    return identity - jnp.matmul(matrices, x, precision=HIGHEST)


def _in_basis(
    factors: jax.Array, basis: jax.Array, first: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """AQ, the diagonal of Q'AQ, and the rest of that relative to A: the staleness, 1 at first."""
    product = jnp.matmul(factors, basis, precision=HIGHEST)
    rotated = jnp.matmul(basis.mT, product, precision=HIGHEST)
    values = diagonal(rotated)
    off = rotated - diagonal_matrices(values)
    whole = _norm(factors)
    stale = _norm(off) / jnp.where(whole > 0, whole, 1)
    return product, values, jnp.where(first, 1.0, stale)


def _norm(matrices: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(matrices**2, axis=(-2, -1)))


def _check_tolerance(tolerance: float) -> None:
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}, expected a number in [0, 1).")
