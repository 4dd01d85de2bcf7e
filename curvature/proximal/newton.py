"""Two small solvers on flat vectors: Newton's method, and a quadratic in a ball.

Both are pure and can be jitted; how they ended comes back as data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Scalar = Callable[[Any], jax.Array]


class Convergence(NamedTuple):
    """How an inner solve ended.

    Attributes:
      converged: whether the gradient norm came down to the tolerance, a bool scalar.
      iterations: Newton iterations made (0 for a closed form), an integer scalar.
      gradient_norm: Euclidean norm of the inner objective's gradient at the end.
      objective: value of the inner objective at the end.
    """

    converged: jax.Array
    iterations: jax.Array
    gradient_norm: jax.Array
    objective: jax.Array


class _Search(NamedTuple):
    x: jax.Array
    value: jax.Array
    gradient: jax.Array
    radius: jax.Array
    floor: jax.Array  # the gradient's rounding error
    iterations: jax.Array


def minimise(
    objective: Scalar, start: jax.Array, tolerance: float | None, max_iterations: int
) -> tuple[jax.Array, Convergence]:
    """Trust-region Newton with truncated conjugate gradients, from a starting point.

    Nocedal and Wright 2006, algorithms 4.1 and 7.2 (Steihaug 1983): products with the Hessian only,
    and no need for it to be positive definite.

    Args:
      objective: of a vector of shape [size], twice differentiable.
      start: shape [size].
      tolerance: share of max(1, norm of the gradient at `start`) at which the gradient's norm ends
        the search; None: eps^(2/3). A gradient at its rounding error ends it, too.
      max_iterations: of Newton's method, each one evaluation of the objective.

    Returns:
      The point, shape [size], and how the search ended.

    Raises:
      ValueError: for a tolerance or number of iterations out of range.
    """
    if not isinstance(max_iterations, (int, np.integer)) or max_iterations < 1:
        raise ValueError(f"max_iterations is {max_iterations!r}, expected a positive integer.")
    both = jax.value_and_grad(objective)
    value, gradient = both(start)
    scale = jnp.maximum(1.0, jnp.linalg.norm(gradient))
    goal = relative_tolerance(tolerance, start.dtype) * scale

    def going(s: _Search) -> jax.Array:
        # False for NaN, which ends the search.
        far = jnp.linalg.norm(s.gradient) > jnp.maximum(goal, s.floor)
        room = s.radius > _eps(s.x.dtype) * jnp.linalg.norm(s.x)
        return far & room & (s.iterations < max_iterations)

    def iterate(s: _Search) -> _Search:
        def product(v: jax.Array) -> jax.Array:
            return jax.jvp(jax.grad(objective), (s.x,), (v,))[1]

        size = jnp.linalg.norm(s.gradient)
        # As in the book, relative to the problem's scale: superlinear convergence.
        forcing = jnp.minimum(0.5, jnp.sqrt(size / scale)) * size
        step = _truncated_cg(product, s.gradient, s.radius, forcing)
        length = jnp.linalg.norm(step)
        value, gradient = both(s.x + step)
        bent = product(step)
        predicted = -(s.gradient @ step + 0.5 * step @ bent)
        # A gradient that changes so fast cannot be known better, x being rounded.
        slope = jnp.linalg.norm(bent) / jnp.where(length > 0, length, 1.0)
        floor = 10 * _eps(s.x.dtype) * slope * jnp.linalg.norm(s.x + step)
        # Close to the minimum values differ by rounding only; then the model is trusted (Conn,
        # Gould and Toint 2000, section 17.4.2).
        noise = 10 * _eps(s.x.dtype) * jnp.abs(s.value)
        ratio = (s.value - value + noise) / (predicted + noise)
        good = (ratio > 0.1) & jnp.isfinite(gradient).all()
        longer = jnp.where((ratio > 0.75) & (length > 0.99 * s.radius), 2.0, 1.0) * s.radius
        radius = jnp.where(good & (ratio >= 0.25), longer, 0.25 * length)
        x, value, gradient = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (s.x + step, value, gradient),
            (s.x, s.value, s.gradient),
        )
        return _Search(x, value, gradient, radius, floor, s.iterations + 1)

    radius = jnp.maximum(1.0, jnp.linalg.norm(start))
    zero = jnp.zeros_like(value)
    first = _Search(start, value, gradient, radius, zero, jnp.zeros((), jnp.int32))
    end = jax.lax.while_loop(going, iterate, first)
    norm = jnp.linalg.norm(end.gradient)
    near = norm <= jnp.maximum(goal, end.floor)
    return end.x, Convergence(near, end.iterations, norm, end.value)


def _truncated_cg(
    mvp: Callable[[jax.Array], jax.Array], gradient: jax.Array, radius: jax.Array, goal: jax.Array
) -> jax.Array:
    """H d = -gradient to a residual of `goal`, or to the bound |d| = radius if met earlier."""

    def going(state: tuple[Any, ...]) -> jax.Array:
        _, r, _, count, ended = state
        return (jnp.linalg.norm(r) > goal) & (count < 10 * gradient.size) & ~ended

    def iterate(state: tuple[Any, ...]) -> tuple[Any, ...]:
        d, r, p, count, _ = state
        product = mvp(p)
        bend = p @ product
        # not `bend <= ...`: NaN counts as negative curvature
        negative = ~(bend > _eps(p.dtype) * jnp.linalg.norm(p) * jnp.linalg.norm(product))
        alpha = r @ r / jnp.where(negative, 1.0, bend)
        outside = negative | (jnp.linalg.norm(d + alpha * p) >= radius)
        d = d + jnp.where(outside, _to_the_bound(d, p, radius), alpha) * p
        less = r + alpha * product
        after = -less + (less @ less) / (r @ r) * p
        return d, less, after, count + 1, outside

    start = (jnp.zeros_like(gradient), gradient, -gradient, 0, jnp.asarray(False))
    return jax.lax.while_loop(going, iterate, start)[0]


def _to_the_bound(d: jax.Array, p: jax.Array, radius: jax.Array) -> jax.Array:
    """The t >= 0 at which |d + t p| = radius, where |d| <= radius."""
    a, b, c = p @ p, d @ p, jnp.minimum(0.0, d @ d - radius**2)
    root = jnp.sqrt(b**2 - a * c)
    # the larger root of a t^2 + 2 b t + c, without cancellation
    return jnp.where(b > 0, -c / (b + root), (root - b) / a)


def quadratic_in_ball(
    hessian: jax.Array, g: jax.Array, kept: jax.Array, radius: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Minimises g'y + 1/2 y'Hy over |y| <= radius, y = 0 where not `kept`.

    By eigendecomposition and bisection for the multiplier mu, with (H + mu) y = -g and H + mu
    positive semi-definite (Nocedal and Wright 2006, section 4.3), the hard case included.

    Args:
      hessian: symmetric, shape [size, size], its rows and columns zero where not `kept`.
      g: shape [size], zero where not `kept`.
      kept: bool, shape [size].
      radius: a positive scalar.

    Returns:
      y, shape [size], and mu.
    """
    # Coordinates that are left out come with a zero row and column. A large eigenvalue there keeps
    # them out of the search for the smallest one.
    top = jnp.abs(hessian).sum()
    values, vectors = jnp.linalg.eigh(hessian + jnp.diag(jnp.where(kept, 0.0, top)))
    b = vectors.T @ g
    # H + mu must not have negative eigenvalues. One that is zero but for rounding is no reason to
    # go to the bound.
    lowest = jnp.where(values[0] < -negligible(values), -values[0], 0.0)

    def y_of(t: jax.Array) -> jax.Array:
        """-(H + lowest + t)^-1 g in the eigenbasis, the shortest one at t = 0."""
        shifted = values + lowest + t
        good = shifted > jnp.where(t > 0, 0.0, negligible(values))
        return jnp.where(good, -b / jnp.where(good, shifted, 1.0), 0.0)

    def halve(_: int, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        middle = 0.5 * (low + high)
        long = jnp.linalg.norm(y_of(middle)) > radius
        return jnp.where(long, middle, low), jnp.where(long, high, middle)

    high = jnp.linalg.norm(b) / radius  # |y(t)| <= |b| / t
    t = jax.lax.fori_loop(0, 200, halve, (jnp.zeros_like(high), high))[1]
    free = y_of(jnp.zeros_like(t))
    # Inside, or the hard case: at t = 0 the step is short, and a gradient in the lowest
    # eigendirection does not make it long.
    blocked = (values + lowest <= negligible(values)) & (jnp.abs(b) > negligible(b))
    short = (jnp.linalg.norm(free) <= radius) & ~blocked.any()
    y = jnp.where(short, free, y_of(t))
    gap = jnp.sqrt(jnp.maximum(0.0, radius**2 - y @ y))
    y = y.at[0].add(jnp.where(short & (lowest > 0), gap, 0.0))
    return vectors @ y, lowest + jnp.where(short, 0.0, t)


def negligible(values: jax.Array) -> jax.Array:
    """Eigenvalues up to this size are rounding error."""
    return values.size * _eps(values.dtype) * jnp.abs(values).max()


def relative_tolerance(tolerance: float | None, dtype: Any) -> float:
    """The tolerance, checked; eps^(2/3) of the dtype where it is None."""
    if tolerance is None:
        return _eps(dtype) ** (2 / 3)
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}, expected a number in (0, 1), or None.")
    return tolerance


def _eps(dtype: Any) -> float:
    return float(np.finfo(dtype).eps)
