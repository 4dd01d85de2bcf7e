"""Mirror descent: first order in the outputs, with a Bregman divergence as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from curvature.proximal.common import (
    PyTree,
    Scalar,
    check_scalar,
    check_structure,
    not_negative,
    positive,
    ravel,
)
from curvature.proximal.newton import (
    Convergence,
    minimise,
)

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
      learning_rate: a number not below zero, 1/lam of the proximal point.
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
    rate = not_negative("learning_rate", learning_rate)  # a warm-up may start from zero
    x, unravel = ravel(z, "z")
    rate = rate.astype(x.dtype)
    check_structure("gradient", gradient, "z", z)
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
    check_scalar("potential", potential, z)
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
        positive("learning_rate", learning_rate)

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


def _euclidean(z: jax.Array, move: jax.Array) -> jax.Array:
    del z
    return -move


def _entropy(z: jax.Array, move: jax.Array) -> jax.Array:
    total = z.sum(-1, keepdims=True)
    return total * jax.nn.softmax(jnp.log(z) - move) - z


def _log_sum_exp(z: jax.Array, move: jax.Array) -> jax.Array:
    move = move - move.mean(-1, keepdims=True)  # a shift of all logits changes nothing
    # log(q - move) - log q, as log1p of the ratio: exact for small moves
    step = jnp.log1p(-_share(move, jax.nn.softmax(z)))
    return step - step.mean(-1, keepdims=True)


def _softplus(z: jax.Array, move: jax.Array) -> jax.Array:
    q, rest = jax.nn.sigmoid(z), jax.nn.sigmoid(-z)
    return jnp.log1p(-_share(move, q)) - jnp.log1p(_share(move, rest))


def _share(move: jax.Array, of: jax.Array) -> jax.Array:
    """Move / of; nothing of a probability that underflowed is nothing."""
    return jnp.where(move == 0, 0, move / jnp.where(move == 0, 1, of))


_CLOSED_FORMS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "euclidean": _euclidean,
    "entropy": _entropy,
    "log_sum_exp": _log_sum_exp,
    "softplus": _softplus,
}
