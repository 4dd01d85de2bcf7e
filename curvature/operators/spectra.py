"""Trace, diagonal, largest eigenvalues and spectral density from products alone.

The estimators and the Lanczos iteration are matfree's; here they meet operators that loop over data
in Python, and come with their errors. They work for any symmetric lineax operator, and run in
Python: not to be called inside `jax.jit`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from matfree import decomp, stochtrace

from curvature.operators.operator import Flat

PyTree = Any


def trace(
    op: lx.AbstractLinearOperator, key: jax.Array, samples: int = 32, *, at_once: int = 8
) -> tuple[jax.Array, jax.Array]:
    """Estimates the trace by the mean of v' A v over random signs v (Hutchinson 1989).

    Args:
      op: a linear operator on trees.
      key: random key.
      samples: number of vectors v, one product each; at least 2.
      at_once: vectors multiplied together: faster, at the cost of memory.

    Returns:
      The estimate and its standard error.

    Raises:
      ValueError: there are fewer than 2 samples.

    >>> import jax, jax.numpy as jnp
    >>> from curvature import operators
    >>> op = operators.hessian(lambda p, x: (x * p**2).mean(), jnp.ones(2), [jnp.ones((4, 2))])
    >>> [float(x) for x in operators.trace(op, jax.random.key(0))]
    [2.0, 0.0]
    """
    return _monte_carlo(Flat(op), stochtrace.monte_carlo_trace(), key, samples, at_once)


def diagonal(
    op: lx.AbstractLinearOperator, key: jax.Array, samples: int = 32, *, at_once: int = 8
) -> tuple[PyTree, PyTree]:
    """Estimates the diagonal by the mean of v * A v over random signs v (Bekas et al. 2007).

    Args:
      op: a linear operator on trees.
      key: random key.
      samples: number of vectors v, one product each; at least 2.
      at_once: vectors multiplied together: faster, at the cost of memory.

    Returns:
      The estimate and its standard error, trees of the operator's structure.

    Raises:
      ValueError: there are fewer than 2 samples.
    """
    flat = Flat(op)
    estimate, error = _monte_carlo(flat, stochtrace.monte_carlo_diagonal(), key, samples, at_once)
    return flat.unravel(estimate), flat.unravel(error)


def _monte_carlo(
    flat: Flat, integrand: Callable[..., Any], key: jax.Array, samples: int, at_once: int
) -> tuple[jax.Array, jax.Array]:
    """Mean and standard error of an integrand over random signs, a few at a time."""
    if samples < 2 or at_once < 1:
        raise ValueError(
            f"Found samples={samples} and at_once={at_once}, expected at least 2 samples, for a "
            "standard error, and at least one at once."
        )
    mean, squares, done = jnp.zeros((), flat.dtype), jnp.zeros((), flat.dtype), 0
    zeros = jnp.zeros(flat.size, flat.dtype)
    for part in jax.random.split(key, math.ceil(samples / at_once)):
        count = min(at_once, samples - done)
        sampler = stochtrace.sampler_signs(zeros, num=count)
        estimate = stochtrace.estimator_monte_carlo_mean_and_sem(integrand, sampler)
        new, error = estimate(flat.mv, part)
        # Sums of squares about the mean, pooled (Chan, Golub and LeVeque 1983). The error of one
        # group is that of a population: sqrt(squares) / count.
        shift = new - mean
        squares = squares + (error * count) ** 2 + shift**2 * (done * count / (done + count))
        mean, done = mean + shift * (count / (done + count)), done + count
    return mean, jnp.sqrt(squares / (samples * (samples - 1)))


class Eigenpairs(NamedTuple):
    """Eigenvalues and eigenvectors, each with the norm of its residual A v - value v.

    Attributes:
      values: shape `(k,)`, descending.
      vectors: trees of the operator's structure, stacked along a leading axis of k; of norm one.
      residuals: shape `(k,)`. An eigenvalue of A lies within that distance of each value.
    """

    values: jax.Array
    vectors: PyTree
    residuals: jax.Array


def top_eigenpairs(
    op: lx.AbstractLinearOperator, k: int, key: jax.Array, *, products: int | None = None
) -> Eigenpairs:
    """The k largest eigenvalues and their eigenvectors, by Lanczos' iteration.

    With full reorthogonalisation, hence `products` vectors like the parameters in memory. Of a
    multiple eigenvalue one pair is found: a single Krylov space holds no more. For the lowest
    ones, pass `-1.0 * op`.

    Args:
      op: a symmetric linear operator on trees with n entries.
      k: number of pairs.
      key: random key, for the start.
      products: number of products, at most n are made; `max(4 k, 2 k + 30)` by default. More make
        smaller residuals.

    Returns:
      The pairs, fewer than k where the Krylov space is exhausted before.

    Raises:
      ValueError: k is not positive, or larger than n or `products`.
    """
    flat = Flat(op)
    depth = min(flat.size, max(4 * k, 2 * k + 30) if products is None else products)
    if not 1 <= k <= depth:
        raise ValueError(
            f"k is {k}, expected a positive number of eigenpairs, at most the number of products "
            f"and of entries, here {depth}."
        )
    start = jax.random.normal(key, (flat.size,), flat.dtype)
    lanczos = _lanczos(flat, start, depth)
    values, vectors = jnp.linalg.eigh(lanczos.matrix)
    values, vectors = values[::-1][:k], vectors[:, ::-1][:, :k]
    residuals = jnp.abs(vectors[-1]) * jnp.where(jnp.any(lanczos.matrix), lanczos.residual, 0)
    return Eigenpairs(values, jax.vmap(flat.unravel)(vectors.T @ lanczos.basis), residuals)


class _Lanczos(NamedTuple):
    """A Q' = Q' T + r e_m', with the rows of Q (m, n) orthonormal."""

    basis: jax.Array
    matrix: jax.Array
    residual: jax.Array  # the norm of r


def _lanczos(flat: Flat, start: jax.Array, depth: int) -> _Lanczos:
    """Lanczos' iteration, cut off where the Krylov space is exhausted."""
    with jax.disable_jit():  # in Python: the product loops over data
        tridiagonalise = decomp.tridiag_sym(depth, reortho="full", custom_vjp=False)
        found = tridiagonalise(flat.eager(), start / jnp.linalg.norm(start))
    # Where nothing but rounding is left of A q, the space is invariant and what follows is noise.
    below = jnp.abs(jnp.diagonal(found.J_small, -1))
    whole = below > 10 * float(np.finfo(flat.dtype).eps) * jnp.nanmax(jnp.abs(found.J_small))
    if whole.all():
        return _Lanczos(found.Q_tall, found.J_small, jnp.linalg.norm(found.residual))
    size = int(jnp.argmin(whole)) + 1
    return _Lanczos(found.Q_tall[:size], found.J_small[:size, :size], below[size - 1])


@dataclasses.dataclass(frozen=True)
class SpectralDensity:
    """The distribution of an operator's eigenvalues: a quadrature rule for each random vector.

    Attributes:
      nodes: shape `(samples, m)`, places on the axis of eigenvalues.
      weights: shape `(samples, m)`, the mass at each of them; each row sums to one.
    """

    nodes: jax.Array
    weights: jax.Array

    def expectation(
        self, function: Callable[[jax.Array], jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """The mean of `function` over the eigenvalues, and its standard error.

        Times n, this is the trace of f(A): the trace itself for the identity, the log-determinant
        for the logarithm.
        """
        values = jnp.where(self.weights > 0, function(self.nodes), 0.0)
        means = jnp.sum(self.weights * values, axis=1)
        return means.mean(), means.std(ddof=1) / math.sqrt(len(means))

    def __call__(self, grid: jax.Array, width: float) -> jax.Array:
        """The density on a grid, every node smeared out to a Gaussian.

        Args:
          grid: eigenvalues at which the density is wanted, any shape.
          width: the Gaussians' standard deviation, in units of eigenvalues.

        Returns:
          The density, shape of `grid`; it integrates to one.
        """
        distance = (jnp.asarray(grid)[..., None, None] - self.nodes) / width
        bumps = jnp.exp(-(distance**2) / 2) / (width * math.sqrt(2 * math.pi))
        return jnp.sum(bumps * self.weights, axis=(-2, -1)) / len(self.nodes)


def spectral_density(
    op: lx.AbstractLinearOperator, key: jax.Array, *, samples: int = 8, products: int = 64
) -> SpectralDensity:
    """Estimates how the eigenvalues are distributed, by stochastic Lanczos quadrature.

    Golub and Meurant 1994, section 4; Lin, Saad and Yang 2016, section 3.2.1. With `products`
    vectors like the parameters in memory.

    Args:
      op: a symmetric linear operator on trees with n entries.
      key: random key.
      samples: number of random vectors, at least 2.
      products: number of products for each of them, at most n are made: a rule of m nodes has the
        exact moments up to degree 2 m - 1 of its vector.

    Returns:
      The density; see `SpectralDensity`.

    Raises:
      ValueError: there are fewer than 2 samples, or no products.
    """
    flat = Flat(op)
    if samples < 2 or products < 1:
        raise ValueError(
            f"Found samples={samples} and products={products}, expected at least 2 samples, for a "
            "standard error, and at least one product."
        )
    depth = min(flat.size, products)
    rules = []
    for part in jax.random.split(key, samples):
        (start,) = stochtrace.sampler_signs(jnp.zeros(flat.size, flat.dtype), num=1)(part)
        values, vectors = jnp.linalg.eigh(_lanczos(flat, start, depth).matrix)
        missing = (0, depth - len(values))
        rules.append((jnp.pad(values, missing), jnp.pad(vectors[0] ** 2, missing)))
    nodes, weights = (jnp.stack(parts) for parts in zip(*rules, strict=True))
    return SpectralDensity(nodes, weights)
