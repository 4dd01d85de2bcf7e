"""Steps from the second-order expansion: natural gradient, damped Newton, trust region."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from curvature.metrics import pullback_mvp
from curvature.proximal.common import (
    Divergence,
    Function,
    Model,
    PyTree,
    Scalar,
    Solver,
    check_scalar,
    check_solver,
    check_structure,
    dense,
    divergence,
    not_negative,
    positive,
    quadratic_model,
    ravel,
    solve,
)
from curvature.proximal.newton import (
    negligible,
    quadratic_in_ball,
)


def natural_gradient_step(
    f: Function,
    loss: Scalar,
    rho: Divergence,
    w: PyTree,
    lam: ArrayLike,
    *,
    damping: ArrayLike = 0.0,
    solver: Solver = "cg",
    tolerance: float | None = None,
) -> PyTree:
    """The step v = -(1/lam) (G + damping I)^-1 g, G the pullback of rho's metric at w.

    With the loss to first order and rho to second, v is the proximal step; 1/lam is its learning
    rate. For rho the KL divergence of the outputs' distribution, G is the Fisher information and v
    the natural-gradient step (Amari 1998).

    Args:
      f: weights to outputs z.
      loss: outputs to a scalar.
      rho: divergence of outputs, or a metric.
      w: weights to step from.
      lam: strength of the proximal term, a positive number.
      damping: added to G's diagonal, a number not below zero.
      solver: "cg", conjugate gradients by products with G alone; or "dense", the
        eigendecomposition of the full matrix. Where G is singular both give the shortest of the
        solutions: "dense" counts eigenvalues below rounding error as zero, "cg" can only stop early
        enough, and takes a coarser tolerance.
      tolerance: "cg" ends when the residual is at most this share of the gradient. None: eps^(2/3).

    Returns:
      The step, of the structure of w.

    Raises:
      TypeError: as `proximal_point`.
      ValueError: as `proximal_point`, or for an unknown solver.

    >>> import jax.numpy as jnp
    >>> from curvature import proximal
    >>> f = lambda w: jnp.array([1.0, 60.0]) * w  # the second weight in another unit
    >>> loss = lambda z: ((z - 1) ** 2).sum() / 2
    >>> rho = lambda z, z0: ((z - z0) ** 2).sum() / 2
    >>> v = proximal.natural_gradient_step(f, loss, rho, jnp.zeros(2), 2.0)
    >>> f(v).round(3)  # half way, in both
    Array([0.5, 0.5], dtype=float32)
    """
    lam = positive("lam", lam)
    x, unravel = ravel(w)
    z = f(w)
    check_scalar("loss", loss, z)
    divergence(rho, z)
    gradient = jax.grad(lambda w: loss(f(w)))(w)
    direction = _natural_gradient(f, rho, w, gradient, damping, solver, tolerance)
    return unravel(-ravel_pytree(direction)[0] / lam.astype(x.dtype))


def scale_by_natural_gradient(
    f: Callable[..., Any],
    rho: Divergence,
    *,
    damping: ArrayLike = 0.0,
    solver: Solver = "cg",
    tolerance: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies gradients by (G + damping I)^-1, G the exact pullback of rho's metric.

    The optax form of `natural_gradient_step`, to be chained with a learning rate. What the K-FAC
    transformations approximate: every update costs products with G on all of f's arguments.

    Args:
      f: parameters, and `f_args`, to outputs z.
      rho: divergence of outputs, or a metric.
      damping: as in `natural_gradient_step`.
      solver: as in `natural_gradient_step`.
      tolerance: as in `natural_gradient_step`.

    Returns:
      A transformation with extra arguments, without state:
      `update(grads, state, params, f_args=(x,))`.

    Raises:
      TypeError: by `update`, as `natural_gradient_step`.
      ValueError: for an unknown solver or damping out of range; by `update` without `params`.

    >>> import jax, jax.numpy as jnp, optax
    >>> from curvature import proximal
    >>> f = lambda w, x: x @ w
    >>> rho = lambda z, z0: ((z - z0) ** 2).sum() / 2
    >>> x, y = jnp.array([[1.0, 0.0], [1.0, 60.0]]), jnp.array([1.0, 2.0])
    >>> tx = optax.chain(proximal.scale_by_natural_gradient(f, rho, solver="dense"), optax.sgd(1.0))
    >>> w = jnp.zeros(2)
    >>> grads = jax.grad(lambda w: rho(f(w, x), y))(w)
    >>> updates, _ = tx.update(grads, tx.init(w), w, f_args=(x,))
    >>> bool(jnp.allclose(f(optax.apply_updates(w, updates), x), y, atol=1e-5))
    True
    """
    check_solver(solver)
    not_negative("damping", damping)

    def init(params: PyTree) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(
        updates: PyTree,
        state: optax.EmptyState,
        params: PyTree | None = None,
        *,
        f_args: tuple[Any, ...] = (),
        **extra: Any,
    ) -> tuple[PyTree, optax.EmptyState]:
        del extra
        if params is None:
            raise ValueError(
                "update was called without params: call update(grads, state, params, ...)."
            )
        check_structure("updates", updates, "params", params)

        def outputs(w: PyTree) -> PyTree:
            return f(w, *f_args)

        divergence(rho, outputs(params))
        return _natural_gradient(outputs, rho, params, updates, damping, solver, tolerance), state

    return optax.GradientTransformationExtraArgs(init, update)


def damped_newton_step(
    f: Function,
    loss: Scalar,
    rho: Divergence,
    w: PyTree,
    lam: ArrayLike,
    *,
    model: Model = "hessian",
    solver: Solver = "cg",
    tolerance: float | None = None,
) -> PyTree:
    """The step v = -(H + lam G)^-1 g: Newton's step on the proximal objective at w.

    Args:
      f: weights to outputs z.
      loss: outputs to a scalar.
      rho: divergence of outputs, or a metric.
      w: weights to step from.
      lam: strength of the proximal term, a positive number. H + lam G must be positive definite for
        v to be a descent step: the matrix is not checked, and "cg" may end anywhere where it is not
        ("dense" gives the stationary point).
      model: what H is: "hessian", or "gauss_newton", J' H_z J, which is positive semi-definite
        where the loss is convex in the outputs.
      solver: as in `natural_gradient_step`.
      tolerance: as in `natural_gradient_step`.

    Returns:
      The step, of the structure of w.

    Raises:
      TypeError: as `proximal_point`.
      ValueError: as `proximal_point`, or for an unknown solver or model.

    >>> import jax.numpy as jnp
    >>> from curvature import proximal
    >>> square = lambda z, z0=0.0: ((z - z0) ** 2).sum() / 2
    >>> proximal.damped_newton_step(lambda w: 10 * w, square, square, jnp.ones(1), 1.0)
    Array([-0.5], dtype=float32)
    """
    lam = positive("lam", lam)
    lam = lam.astype(ravel(w)[0].dtype)
    z = f(w)
    check_scalar("loss", loss, z)
    divergence(rho, z)
    gradient, second = quadratic_model(f, loss, w, model)

    def matrix(v: PyTree) -> PyTree:
        return jax.tree.map(lambda h, g: h + lam * g, second(v), pullback_mvp(f, rho, w, v))

    return jax.tree.map(jnp.negative, solve(matrix, gradient, solver, tolerance))


class TrustRegion(NamedTuple):
    """How a trust-region problem was solved.

    Attributes:
      multiplier: mu >= 0 of the bound: (H + mu G) v = -g, and mu = 0 inside the region.
      radius: sqrt(v' G v), the length of the step.
      decrease: -(g' v + 1/2 v' H v), by how much the model says the loss falls.
    """

    multiplier: jax.Array
    radius: jax.Array
    decrease: jax.Array


def trust_region_step(
    f: Function,
    loss: Scalar,
    rho: Divergence,
    w: PyTree,
    radius: ArrayLike,
    *,
    model: Model = "hessian",
) -> tuple[PyTree, TrustRegion]:
    """The step that minimises g'v + 1/2 v'Hv subject to v'Gv <= radius^2, to rounding error.

    The bound is on the outputs: 1/2 radius^2 is what the step may change rho, to second order.
    Solved by the eigendecomposition of H in coordinates where G is the identity, and bisection for
    the multiplier (Nocedal and Wright 2006, section 4.3), the hard case included. H may be
    indefinite. Forms dense matrices: for up to some thousand weights.

    Directions that leave the outputs unchanged to first order (the null space of G, eigenvalues
    below rounding error) are left out of the step, as no bound would hold it there.

    Args:
      f: weights to outputs z.
      loss: outputs to a scalar.
      rho: divergence of outputs, or a metric.
      w: weights to step from.
      radius: a positive number, in the units of sqrt(rho).
      model: what H is: "hessian" or "gauss_newton".

    Returns:
      The step, of the structure of w, and the multiplier that proves it.

    Raises:
      TypeError: as `proximal_point`.
      ValueError: as `proximal_point`, or for an unknown model or a radius out of range.

    >>> import jax.numpy as jnp
    >>> from curvature import proximal
    >>> loss = lambda z: z[0] ** 2 - z[1] ** 2 + 0.1 * z[1]  # a saddle: v runs down to the bound
    >>> rho = lambda z, z0: ((z - z0) ** 2).sum() / 2
    >>> v, record = proximal.trust_region_step(lambda w: w, loss, rho, jnp.zeros(2), 0.5)
    >>> v, round(float(record.multiplier), 4)
    (Array([ 0. , -0.5], dtype=float32), 2.2)
    """
    radius = positive("radius", radius)
    x, unravel = ravel(w)
    radius = radius.astype(x.dtype)
    z = f(w)
    check_scalar("loss", loss, z)
    divergence(rho, z)
    gradient, second = quadratic_model(f, loss, w, model)
    g = ravel_pytree(gradient)[0]
    hessian = dense(second, w)
    metric = dense(lambda v: pullback_mvp(f, rho, w, v), w)

    values, vectors = jnp.linalg.eigh(metric)
    kept = values > negligible(values)
    whiten = vectors * jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, values, 1.0)), 0.0)
    y, multiplier = quadratic_in_ball(whiten.T @ hessian @ whiten, whiten.T @ g, kept, radius)
    v = whiten @ y
    decrease = -(g @ v + 0.5 * v @ (hessian @ v))
    return unravel(v), TrustRegion(multiplier, jnp.linalg.norm(y), decrease)


def _natural_gradient(
    f: Function,
    rho: Divergence,
    w: PyTree,
    gradient: PyTree,
    damping: ArrayLike,
    solver: Solver,
    tolerance: float | None,
) -> PyTree:
    """(G + damping I)^-1 gradient."""
    x, _ = ravel(w)
    strength = not_negative("damping", damping).astype(x.dtype)

    def matrix(v: PyTree) -> PyTree:
        return jax.tree.map(lambda g, u: g + strength * u, pullback_mvp(f, rho, w, v), v)

    return solve(matrix, gradient, solver, tolerance)
