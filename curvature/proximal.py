"""Proximal optimisation of a composite loss, and the steps that approximate it.

The setting: a function f of the weights w (a network on a fixed batch), a loss of its outputs
z = f(w), and a dissimilarity rho(z, z0) of outputs, zero where they agree. The proximal point

    argmin_w  loss(f(w)) + lam rho(f(w), f(w0))

lowers the loss without changing the outputs more than lam allows. Its approximations, each a
function of this module, with g the gradient and H the Hessian of loss(f(w)) at w0, and G = J' G_z J
the pullback through J = df/dw of the metric G_z, the Hessian of rho at z = z0:

    proximal_point          the loss as it is,  rho as it is
    damped_newton_step      second order,       second order     -(H + lam G)^-1 g
    natural_gradient_step   first order,        second order     -(1/lam) G^-1 g
    mirror_descent_step     first order in z,   rho as it is     in output space
    implicit_gradient_step  the loss as it is,  rho = 1/2 |w - w0|^2 of the weights
    trust_region_step       second order,       a bound v' G v <= radius^2 instead of a penalty

Steps are displacements v, to be added: `optax.apply_updates(w, v)`. Data belongs in f's and loss's
closures. `rho` is a function rho(z, z0) -> scalar, or a metric: an object whose `mvp(z, v)` gives
G_z v. A metric that can be called, as a Bregman divergence can, is called, and its values summed;
what is only a metric stands for the divergence 1/2 (z - z0)' G_z0 (z - z0).

All functions are pure and can be jitted with w and lam as arguments. Their convergence comes back
as data. Outputs and weights may be any pytrees of floating-point arrays of one dtype.

`curvature.newton` has the solvers. Sources: Grosse, Neural Net Training Dynamics, chapter 3
(metrics); Parikh and Boyd 2014, Proximal Algorithms; Amari 1998; Beck and Teboulle 2003 (mirror
descent); Nocedal and Wright 2006 (solvers).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.scipy.sparse.linalg import cg
from jax.typing import ArrayLike

from curvature.metrics import (
    Metric,
    gauss_newton_mvp,
    hessian_mvp,
    pullback_mvp,
)
from curvature.newton import (
    Convergence,
    minimise,
    negligible,
    quadratic_in_ball,
    relative_tolerance,
)

PyTree = Any
Function = Callable[[Any], Any]
Scalar = Callable[[Any], jax.Array]
Solver = Literal["cg", "dense"]
Model = Literal["hessian", "gauss_newton"]

Divergence = Callable[[Any, Any], jax.Array] | Metric


def proximal_point(
    f: Function,
    loss: Scalar,
    rho: Divergence,
    w0: PyTree,
    lam: ArrayLike,
    *,
    tolerance: float | None = None,
    max_iterations: int = 100,
) -> tuple[PyTree, Convergence]:
    """A minimiser of loss(f(w)) + lam rho(f(w), f(w0)), found from w0.

    Newton's method with truncated conjugate gradients in a trust region (Nocedal and Wright 2006,
    algorithms 4.1 and 7.2), which goes on where the objective is not convex, to a point where the
    gradient is as small as the tolerance says: a local minimiser. Where f ignores some directions
    of w, the result is one of many. With a small lam a net's objective may have its infimum at
    infinity (saturated units); the search then ends at `max_iterations`.

    Args:
      f: weights to outputs z.
      loss: outputs to a scalar.
      rho: divergence of outputs, rho(z, z0) >= 0 with equality at z = z0; or a metric.
      w0: weights to start at and stay close to.
      lam: strength of the proximal term, a positive number, in units of loss over rho.
      tolerance: the solve ends when the norm of the gradient is at most `tolerance` times
        max(1, its norm at w0). None: eps^(2/3), which is 4e-11 in float64 and 2e-5 in float32.
      max_iterations: of Newton's method.

    Returns:
      The point, of the structure of w0, and a record of convergence. Where `converged` is false
      the point is the best one found.

    Raises:
      TypeError: for weights that are not floating point, or a `rho` that is neither kind.
      ValueError: for a `lam`, `tolerance` or `max_iterations` out of range, or a `loss` or `rho`
        that is not a scalar.

    >>> import jax.numpy as jnp
    >>> from curvature import proximal
    >>> f = lambda w: jnp.stack([w[0], w[1] - w[0] ** 2])
    >>> loss = lambda z: (1 - z[0]) ** 2 + 100 * z[1] ** 2  # loss(f(w)) is Rosenbrock's function
    >>> rho = lambda z, z0: ((z - z0) ** 2).sum()
    >>> w0 = jnp.array([-1.2, 1.0])
    >>> point, record = proximal.proximal_point(f, loss, rho, w0, 1.0, tolerance=1e-6)
    >>> bool(record.converged), [round(float(z), 3) for z in f(point)]  # -0.2/2, -0.44/101
    (True, [-0.1, -0.004])
    """
    lam = _positive("lam", lam)
    x0, unravel = _ravel(w0)
    lam = lam.astype(x0.dtype)
    z0 = f(w0)
    _check_scalar("loss", loss, z0)
    distance = _divergence(rho, z0)

    def objective(x: jax.Array) -> jax.Array:
        z = f(unravel(x))
        return loss(z) + lam * distance(z)

    point, record = minimise(objective, x0, tolerance, max_iterations)
    return unravel(point), record


def implicit_gradient_step(
    loss: Scalar,
    w0: PyTree,
    learning_rate: ArrayLike,
    *,
    tolerance: float | None = None,
    max_iterations: int = 100,
) -> tuple[PyTree, Convergence]:
    """The step v with v = -learning_rate grad loss(w0 + v): the gradient where one arrives.

    The backward Euler step of gradient flow, which is the proximal point for f(w) = w and
    rho = 1/2 |w - w0|^2 (Parikh and Boyd 2014, section 4.1). It is stable at any learning rate
    where the loss is convex.

    Args:
      loss: weights to a scalar.
      w0: weights to step from.
      learning_rate: a positive number; 1/lam of the proximal point.
      tolerance: as in `proximal_point`.
      max_iterations: as in `proximal_point`.

    Returns:
      The step, of the structure of w0, and a record of convergence.

    Raises:
      TypeError: as `proximal_point`.
      ValueError: as `proximal_point`.

    >>> import jax.numpy as jnp
    >>> from curvature import proximal
    >>> loss = lambda w: 50 * w**2  # gradient descent diverges at rates beyond 0.02
    >>> v, _ = proximal.implicit_gradient_step(loss, jnp.array(1.0), 1.0)
    >>> round(float(1.0 + v), 4)  # 1 / (1 + 100)
    0.0099
    """
    rate = _positive("learning_rate", learning_rate)
    point, record = proximal_point(
        lambda w: w,
        loss,
        _half_squares,
        w0,
        1 / rate,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
    return jax.tree.map(jnp.subtract, point, w0), record


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
    lam = _positive("lam", lam)
    x, unravel = _ravel(w)
    z = f(w)
    _check_scalar("loss", loss, z)
    _divergence(rho, z)
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
    _check_solver(solver)
    _not_negative("damping", damping)

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
        _check_structure("updates", updates, "params", params)

        def outputs(w: PyTree) -> PyTree:
            return f(w, *f_args)

        _divergence(rho, outputs(params))
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
    lam = _positive("lam", lam)
    lam = lam.astype(_ravel(w)[0].dtype)
    z = f(w)
    _check_scalar("loss", loss, z)
    _divergence(rho, z)
    gradient, second = _quadratic_model(f, loss, w, model)

    def matrix(v: PyTree) -> PyTree:
        return jax.tree.map(lambda h, g: h + lam * g, second(v), pullback_mvp(f, rho, w, v))

    return jax.tree.map(jnp.negative, _solve(matrix, gradient, solver, tolerance))


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
    radius = _positive("radius", radius)
    x, unravel = _ravel(w)
    radius = radius.astype(x.dtype)
    z = f(w)
    _check_scalar("loss", loss, z)
    _divergence(rho, z)
    gradient, second = _quadratic_model(f, loss, w, model)
    g = ravel_pytree(gradient)[0]
    hessian = _dense(second, w)
    metric = _dense(lambda v: pullback_mvp(f, rho, w, v), w)

    values, vectors = jnp.linalg.eigh(metric)
    kept = values > negligible(values)
    whiten = vectors * jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, values, 1.0)), 0.0)
    y, multiplier = quadratic_in_ball(whiten.T @ hessian @ whiten, whiten.T @ g, kept, radius)
    v = whiten @ y
    decrease = -(g @ v + 0.5 * v @ (hessian @ v))
    return unravel(v), TrustRegion(multiplier, jnp.linalg.norm(y), decrease)


Potential = Literal["euclidean", "entropy", "log_sum_exp", "softplus"] | Scalar


def mirror_descent_step(
    potential: Potential,
    z: PyTree,
    gradient: PyTree,
    learning_rate: ArrayLike,
    *,
    tolerance: float | None = None,
    max_iterations: int = 100,
) -> tuple[PyTree, Convergence]:
    """The step to argmin_u <gradient, u> + D_phi(u, z) / learning_rate.

    D_phi is the Bregman divergence of a strictly convex phi, so the minimiser u has
    grad phi(u) = grad phi(z) - learning_rate gradient: gradient descent in the dual coordinates
    (Beck and Teboulle 2003). The potentials with closed forms:

    - "euclidean", phi = 1/2 |z|^2: gradient descent.
    - "entropy", phi = sum z log z on the simplex along the last axis, D_phi = KL(u || z): the
      exponentiated gradient, u proportional to z exp(-learning_rate gradient). Entries of z must be
      positive; the sum over the last axis is kept.
    - "log_sum_exp", categorical natural parameters (logits) along the last axis, and "softplus",
      Bernoulli ones, elementwise: phi is the log-partition function, D_phi(u, z) = KL(z || u) of
      the distributions, and the dual coordinates are their means. A step that would carry a
      probability out of (0, 1) has no minimiser, and gives NaN. The mean logit is kept, and the
      part of the gradient that shifts all logits, which is zero for losses of distributions, is
      ignored.

    Args:
      potential: one of these names, or any strictly convex phi(z) -> scalar, which is solved by
        Newton's method as in `proximal_point`; its minimiser should lie inside phi's domain.
      z: a point of the output space, a pytree.
      gradient: of the loss at z, of the structure of z.
      learning_rate: a positive number, 1/lam of the proximal point.
      tolerance: of the solver, as in `proximal_point`.
      max_iterations: of the solver, as in `proximal_point`.

    Returns:
      The step, of the structure of z, and a record of convergence (for a closed form 0 iterations,
      `converged` saying whether the step is finite).

    Raises:
      TypeError: for z that is not floating point.
      ValueError: for an unknown potential, a phi that is not a scalar, or a number out of range.

    >>> import jax.numpy as jnp
    >>> from curvature import proximal
    >>> p, gradient = jnp.array([0.25, 0.75]), jnp.array([0.0, 1.0])
    >>> step, _ = proximal.mirror_descent_step("entropy", p, gradient, jnp.log(3.0))
    >>> p + step
    Array([0.5, 0.5], dtype=float32)
    """
    rate = _positive("learning_rate", learning_rate)
    x, unravel = _ravel(z, "z")
    rate = rate.astype(x.dtype)
    _check_structure("gradient", gradient, "z", z)
    if isinstance(potential, str):
        if potential not in _CLOSED_FORMS:
            raise ValueError(
                f"potential is {potential!r}, expected one of {sorted(_CLOSED_FORMS)} or a "
                "function phi(z) -> scalar."
            )
        form = _CLOSED_FORMS[potential]
        step = jax.tree.map(lambda u, g: form(u, rate * g), z, gradient)
        flat = ravel_pytree(step)[0]
        missing = jnp.zeros((), x.dtype)
        good = jnp.isfinite(flat).all()
        return step, Convergence(good, jnp.zeros((), jnp.int32), missing, missing)
    _check_scalar("potential", potential, z)
    dual = jax.grad(lambda x: potential(unravel(x)))(x) - rate * ravel_pytree(gradient)[0]
    point, record = minimise(
        lambda u: potential(unravel(u)) - dual @ u, x, tolerance, max_iterations
    )
    return unravel(point - x), record


def mirror_descent(
    learning_rate: optax.ScalarOrSchedule, potential: Potential
) -> optax.GradientTransformation:
    """Mirror descent as an optax transformation: see `mirror_descent_step`.

    Args:
      learning_rate: a positive number or a schedule.
      potential: the name of a closed form, or phi(z) -> scalar.

    Returns:
      A transformation whose state counts steps (for the schedule); `update` needs `params`.

    Raises:
      ValueError: as `mirror_descent_step`; by `update` without `params`.

    >>> import jax, jax.numpy as jnp, optax
    >>> from curvature import proximal
    >>> tx = proximal.mirror_descent(0.5, "entropy")
    >>> p = jnp.ones(3) / 3
    >>> state = tx.init(p)
    >>> for _ in range(50):  # play the best of three arms
    ...     updates, state = tx.update(jnp.array([3.0, 1.0, 2.0]), state, p)
    ...     p = optax.apply_updates(p, updates)
    >>> p.round(3)
    Array([0., 1., 0.], dtype=float32)
    """
    if not callable(learning_rate):
        _positive("learning_rate", learning_rate)

    def init(params: PyTree) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree, state: optax.ScaleByScheduleState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.ScaleByScheduleState]:
        if params is None:
            raise ValueError("update was called without params: call update(grads, state, params).")
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        step, _ = mirror_descent_step(potential, params, updates, rate)
        return step, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


# --- closed forms of mirror descent: the step from z, given the dual step `move` ------------------


def _euclidean(z: jax.Array, move: jax.Array) -> jax.Array:
    del z
    return -move


def _entropy(z: jax.Array, move: jax.Array) -> jax.Array:
    total = z.sum(-1, keepdims=True)
    return total * jax.nn.softmax(jnp.log(z) - move) - z


def _log_sum_exp(z: jax.Array, move: jax.Array) -> jax.Array:
    move = move - move.mean(-1, keepdims=True)  # a shift of all logits changes nothing
    # log(q - move) - log q, as log1p of the ratio: exact for small moves
    step = jnp.log1p(-move / jax.nn.softmax(z))
    return step - step.mean(-1, keepdims=True)


def _softplus(z: jax.Array, move: jax.Array) -> jax.Array:
    q, rest = jax.nn.sigmoid(z), jax.nn.sigmoid(-z)
    return jnp.log1p(-move / q) - jnp.log1p(move / rest)


_CLOSED_FORMS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "euclidean": _euclidean,
    "entropy": _entropy,
    "log_sum_exp": _log_sum_exp,
    "softplus": _softplus,
}

# --- linear algebra -------------------------------------------------------------------------------


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
    x, _ = _ravel(w)
    strength = _not_negative("damping", damping).astype(x.dtype)

    def matrix(v: PyTree) -> PyTree:
        return jax.tree.map(lambda g, u: g + strength * u, pullback_mvp(f, rho, w, v), v)

    return _solve(matrix, gradient, solver, tolerance)


def _quadratic_model(f: Function, loss: Scalar, w: PyTree, model: Model) -> tuple[PyTree, Function]:
    """The gradient of loss(f(w)), and the product with its Hessian or Gauss-Newton matrix."""

    def composite(w: PyTree) -> jax.Array:
        return loss(f(w))

    if model == "hessian":
        return jax.grad(composite)(w), functools.partial(hessian_mvp, composite, w)
    if model == "gauss_newton":
        return jax.grad(composite)(w), functools.partial(gauss_newton_mvp, f, loss, w)
    raise ValueError(f"model is {model!r}, expected 'hessian' or 'gauss_newton'.")


def _dense(mvp: Function, like: PyTree) -> jax.Array:
    """The symmetric matrix of a linear map on pytrees, shape [size, size]."""
    x, unravel = ravel_pytree(like)
    matrix = jax.vmap(lambda e: ravel_pytree(mvp(unravel(e)))[0])(jnp.eye(x.size, dtype=x.dtype))
    return 0.5 * (matrix + matrix.T)


def _solve(mvp: Function, b: PyTree, solver: Solver, tolerance: float | None) -> PyTree:
    """The shortest x with mvp(x) = b, for a symmetric map."""
    _check_solver(solver)
    flat, unravel = ravel_pytree(b)
    if solver == "dense":
        values, vectors = jnp.linalg.eigh(_dense(mvp, b))
        kept = jnp.abs(values) > negligible(values)
        inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1.0), 0.0)
        return unravel(vectors @ (inverse * (vectors.T @ flat)))
    share = relative_tolerance(tolerance, flat.dtype)
    return cg(mvp, b, tol=share, maxiter=10 * flat.size)[0]


# --- divergences and checks -----------------------------------------------------------------------


def _half_squares(z: PyTree, z0: PyTree) -> jax.Array:
    difference = ravel_pytree(jax.tree.map(jnp.subtract, z, z0))[0]
    return 0.5 * difference @ difference


def _divergence(rho: Divergence, z0: PyTree) -> Scalar:
    """The map z -> rho(z, z0), quadratic for what is only a metric."""
    if callable(rho):
        if hasattr(rho, "mvp"):  # a value for every unit, where mvp is of their sum
            return lambda z: jnp.sum(rho(z, z0))
        _check_scalar("rho", lambda z: rho(z, z0), z0)
        return lambda z: rho(z, z0)
    if not hasattr(rho, "mvp"):
        raise TypeError(
            f"rho is {type(rho).__name__}, expected a function rho(z, z0) -> scalar or a metric "
            "with a method mvp(z, v)."
        )

    def quadratic(z: PyTree) -> jax.Array:
        difference = jax.tree.map(jnp.subtract, z, z0)
        product = ravel_pytree(rho.mvp(z0, difference))[0]
        return 0.5 * ravel_pytree(difference)[0] @ product

    return quadratic


def _ravel(w: PyTree, name: str = "weights") -> tuple[jax.Array, Callable[[jax.Array], PyTree]]:
    for leaf in jax.tree.leaves(w):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"{name}: found dtype {dtype}, expected floating point throughout.")
    return ravel_pytree(w)


def _check_scalar(name: str, function: Function, z: PyTree) -> None:
    shape = jax.tree.map(jnp.shape, jax.eval_shape(function, z))
    if shape != ():
        raise ValueError(f"{name} returns shape {shape}, expected a scalar: take a mean or a sum.")


def _check_structure(name: str, tree: PyTree, like_name: str, like: PyTree) -> None:
    found, expected = (str(jax.tree.map(jnp.shape, t)) for t in (tree, like))
    if found != expected:
        raise ValueError(f"{name} has shapes {found}, expected those of {like_name}: {expected}.")


def _check_solver(solver: str) -> None:
    if solver not in ("cg", "dense"):
        raise ValueError(f"solver is {solver!r}, expected 'cg' or 'dense'.")


def _positive(name: str, value: ArrayLike) -> jax.Array:
    """The number as an array; arrays under a trace are not looked at."""
    if not isinstance(value, jax.core.Tracer) and not 0 < float(np.asarray(value)) < np.inf:
        raise ValueError(f"{name} is {value}, expected a positive number.")
    return jnp.asarray(value)


def _not_negative(name: str, value: ArrayLike) -> jax.Array:
    if not isinstance(value, jax.core.Tracer) and not 0 <= float(np.asarray(value)) < np.inf:
        raise ValueError(f"{name} is {value}, expected a number not below zero.")
    return jnp.asarray(value)
