"""The proximal point itself, in output space and in weight space."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from curvature.proximal.common import (
    Divergence,
    Function,
    PyTree,
    Scalar,
    check_scalar,
    divergence,
    half_squares,
    positive,
    ravel,
)
from curvature.proximal.newton import (
    Convergence,
    minimise,
)


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
    lam = positive("lam", lam)
    x0, unravel = ravel(w0)
    lam = lam.astype(x0.dtype)
    z0 = f(w0)
    check_scalar("loss", loss, z0)
    distance = divergence(rho, z0)

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
    rate = positive("learning_rate", learning_rate)
    point, record = proximal_point(
        lambda w: w,
        loss,
        half_squares,
        w0,
        1 / rate,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
    return jax.tree.map(jnp.subtract, point, w0), record
