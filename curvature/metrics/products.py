"""Products with the Jacobian of f, its transpose, and the matrices they make of a metric."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from curvature.metrics.metric import Metric

PyTree = Any
Function = Callable[[PyTree], PyTree]


def pushforward(f: Function, w: PyTree, v: PyTree) -> PyTree:
    """J v: what a step v of the parameters does to the output, to first order.

    Args:
      f: `f(w)`, an array or a pytree of arrays.
      w: parameters.
      v: a vector, the structure of `w`.

    Returns:
      The structure of `f(w)`.

    >>> import jax.numpy as jnp, curvature
    >>> curvature.metrics.pushforward(jnp.square, jnp.array([3.0]), jnp.array([1.0]))
    Array([6.], dtype=float32)
    """
    return jax.jvp(f, (w,), (v,))[1]


def pullback(f: Function, w: PyTree, covector: PyTree) -> PyTree:
    """J' c: a covector of the output, such as a loss's gradient in z, as one of the parameters.

    Args:
      f: `f(w)`, an array or a pytree of arrays.
      w: parameters.
      covector: the structure of `f(w)`.

    Returns:
      The structure of `w`.

    >>> import jax.numpy as jnp, curvature
    >>> curvature.metrics.pullback(jnp.square, jnp.array([3.0]), jnp.array([1.0]))
    Array([6.], dtype=float32)
    """
    return jax.vjp(f, w)[1](covector)[0]


def pullback_mvp(f: Function, metric: PyTree, w: PyTree, v: PyTree) -> PyTree:
    """J' G J v: the pullback metric at `w`, times a vector; one forward and one backward pass.

    Args:
      f: `f(w)`, an array or a pytree of arrays.
      metric: a `Metric`, for every array of the output; or a pytree of them, the output's structure
        or a prefix of it; or a function `rho(z, z')`, a scalar, of whole outputs.
      w: parameters.
      v: a vector, the structure of `w`.

    Returns:
      The structure of `w`.

    Raises:
      TypeError: `metric` is none of these.

    >>> import jax.numpy as jnp, curvature
    >>> curvature.metrics.pullback_mvp(
    ...     jnp.square, curvature.metrics.Euclidean(), jnp.array([3.0]), jnp.array([1.0]))
    Array([36.], dtype=float32)
    """
    return _sandwich(f, lambda z, jv: apply(metric, z, jv), w, v)


def gauss_newton_mvp(f: Function, loss: PyTree, w: PyTree, v: PyTree) -> PyTree:
    """J' H J v: the generalised Gauss-Newton matrix of loss(f(w)), times a vector.

    Schraudolph (2002), with one forward and one backward pass of f. The second derivative of the
    loss is taken in z alone: in closed form where `loss` is a `HessianMetric`, else forward over
    reverse.

    Args:
      f: `f(w)`, an array or a pytree of arrays.
      loss: a function of the output, a scalar; or a metric as `pullback_mvp` takes it.
      w: parameters.
      v: a vector, the structure of `w`.

    Returns:
      The structure of `w`.

    Raises:
      TypeError: `loss` is neither.

    >>> import jax.numpy as jnp, curvature
    >>> curvature.metrics.gauss_newton_mvp(
    ...     jnp.square, lambda z: jnp.sum(z**2), jnp.array([3.0]), jnp.array([1.0]))
    Array([72.], dtype=float32)
    """
    if callable(loss) and not isinstance(loss, Metric):
        return _sandwich(f, lambda z, jv: hessian_mvp(loss, z, jv), w, v)
    return _sandwich(f, lambda z, jv: apply(loss, z, jv), w, v)


def hessian_mvp(loss: Callable[[PyTree], jax.Array], w: PyTree, v: PyTree) -> PyTree:
    """The Hessian of loss(w), times a vector: forward over reverse (Pearlmutter 1994).

    Args:
      loss: a function of the parameters, a scalar.
      w: parameters.
      v: a vector, the structure of `w`.

    Returns:
      The structure of `w`.

    >>> import jax.numpy as jnp, curvature
    >>> curvature.metrics.hessian_mvp(lambda w: jnp.sum(w**3), jnp.array([2.0]), jnp.array([1.0]))
    Array([12.], dtype=float32)
    """
    return jax.jvp(jax.grad(loss), (w,), (v,))[1]


def pullback_metric(f: Function, metric: PyTree, w: PyTree) -> jax.Array:
    """J' G J as a dense matrix, for small problems: `pullback_mvp` on every unit vector.

    Args:
      f: `f(w)`, an array or a pytree of arrays.
      metric: as `pullback_mvp` takes it.
      w: parameters, of n entries in all.

    Returns:
      Shape `[n, n]`, in the order of `jax.flatten_util.ravel_pytree(w)`.

    >>> import jax.numpy as jnp, curvature
    >>> w = {"a": jnp.array(1.0), "b": jnp.array(2.0)}
    >>> curvature.metrics.pullback_metric(
    ...     lambda w: jnp.stack([w["a"] * w["b"]]), curvature.metrics.Euclidean(), w)
    Array([[4., 2.],
           [2., 1.]], dtype=float32)
    """
    flat, unravel = ravel_pytree(w)

    def row(v: jax.Array) -> jax.Array:
        return ravel_pytree(pullback_mvp(f, metric, w, unravel(v)))[0]

    return jax.vmap(row)(jnp.eye(flat.size, dtype=flat.dtype))


def _sandwich(
    f: Function, product: Callable[[PyTree, PyTree], PyTree], w: PyTree, v: PyTree
) -> PyTree:
    """J' G J v for the product (z, u) -> G u, with one linearisation of f on both sides."""
    z, push = jax.linearize(f, w)
    return jax.linear_transpose(push, w)(product(z, push(v)))[0]


def apply(metrics: PyTree, z: PyTree, v: PyTree) -> PyTree:
    """G v on trees: every metric on all arrays of the subtree that it stands for.

    Of a function `rho(z, z')`, G is the Hessian at z = z'.
    """
    if callable(metrics) and not isinstance(metrics, Metric):
        return hessian_mvp(lambda moved: metrics(moved, z), z, v)

    def one(metric: Any, z: PyTree, v: PyTree) -> PyTree:
        if not isinstance(metric, Metric):
            raise TypeError(
                f"{metric!r} is a {type(metric).__name__}, expected a metric (with methods `mvp` "
                "and `root`), a tree of them with the output's structure, or a function."
            )
        return jax.tree.map(metric.mvp, z, v)

    return jax.tree.map(one, metrics, z, v, is_leaf=lambda x: isinstance(x, Metric))
