"""Factorisations of stacks of symmetric matrices.

On CPU matrices are taken one after another. The batched LAPACK calls of jaxlib 0.10 wait for
threads of the pool that they run in: on a machine with few cores, several of them at once can wait
for ever.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvature.precision import HIGHEST

_LARGE = 768


def cholesky_inverse(matrices: jax.Array) -> jax.Array:
    """Inverses of positive definite matrices `stack + (size, size)`; NaN where one is not.

    By Cholesky factorisation, and of large ones by eliminating one half of the coordinates first:
    then most of the work is in matrix products, twice as fast.
    """
    return _each(_inverse, matrices)


def eigh(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, ascending, and eigenvectors as columns."""
    return _each(_eigh, matrices)


def without_rounding(
    values: jax.Array, axis: int | tuple[int, ...] = -1, size: int = 0, power: int = 1
) -> jax.Array:
    """Eigenvalues of positive semi-definite matrices, zero where they are rounding errors.

    Args:
      values: the eigenvalues.
      axis: the axes that hold those of one matrix.
      size: the matrix's; as many as there are along the last axis if it is 0.
      power: of the relative error size * eps; 2 where the values are squares.
    """
    rounding = (size or values.shape[-1]) * float(np.finfo(values.dtype).eps)
    top = jnp.max(values, axis=axis, keepdims=True)
    return jnp.where(values > top * rounding**power, values, 0)


def orthonormal(matrices: jax.Array) -> jax.Array:
    """The Q of a QR decomposition."""
    return _each(_q, matrices)


def diagonal(matrices: jax.Array) -> jax.Array:
    """The diagonals: every (size + 1)st entry.

    A strided slice is compiled faster than the gather of `jnp.diagonal`.
    """
    *stack, size, _ = matrices.shape
    return matrices.reshape((*stack, size * size))[..., :: size + 1]


def diagonal_matrices(values: jax.Array) -> jax.Array:
    """The matrices with these diagonals, `stack + (size, size)`."""
    *stack, size = values.shape
    identity = jnp.eye(size, dtype=values.dtype).reshape((*(1 for _ in stack), size, size))
    return values[..., None] * identity


def multiples_of_identity(scale: jax.Array, size: int) -> jax.Array:
    """Scale I for every entry of an array, `stack + (size, size)`."""
    return diagonal_matrices(jnp.broadcast_to(scale[..., None], (*scale.shape, size)))


def _inverse(matrix: jax.Array) -> jax.Array:
    size, dot = matrix.shape[-1], functools.partial(jnp.matmul, precision=HIGHEST)
    if size < _LARGE:
        lower = jax.lax.linalg.cholesky(matrix, symmetrize_input=False)
        identity = jnp.eye(size, dtype=matrix.dtype)
        half = jax.lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)
        return dot(half.mT, half)
    cut = size // 2
    first, below = _inverse(matrix[:cut, :cut]), matrix[cut:, :cut]
    ratio = dot(below, first)
    second = _inverse(matrix[cut:, cut:] - dot(ratio, below.mT))  # of the Schur complement
    corner = -dot(second, ratio)
    return jnp.block([[first - dot(ratio.mT, corner), corner.mT], [corner, second]])


def _eigh(matrix: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(jnp.linalg.eigh(matrix))


def _q(matrix: jax.Array) -> jax.Array:
    return jnp.linalg.qr(matrix)[0]


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _one_by_one(function: Callable[[jax.Array], Any], matrices: jax.Array) -> Any:
    """In a `jit`, without which each call would compile a loop anew outside of one."""
    return jax.lax.map(function, matrices)


def _each(function: Callable[[jax.Array], Any], matrices: jax.Array) -> Any:
    *stack, rows, columns = matrices.shape
    flat = matrices.reshape(-1, rows, columns)
    if len(flat) == 1:
        out = jax.tree.map(lambda x: x[None], function(flat[0]))
    else:
        out = jax.lax.platform_dependent(
            flat,
            cpu=functools.partial(_one_by_one, function),
            default=lambda flat: jax.vmap(function)(flat),
        )
    return jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), out)
