"""What the steps share: models, solves, divergences of outputs, checks of arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.scipy.sparse.linalg import cg
from jax.typing import ArrayLike

from curvature.metrics import Metric, gauss_newton_mvp, hessian_mvp
from curvature.metrics.products import apply
from curvature.proximal.newton import negligible, relative_tolerance

PyTree = Any
Function = Callable[[Any], Any]
Scalar = Callable[[Any], jax.Array]
Solver = Literal["cg", "dense"]
Model = Literal["hessian", "gauss_newton"]
Divergence = Callable[[Any, Any], jax.Array] | Metric


def quadratic_model(f: Function, loss: Scalar, w: PyTree, model: Model) -> tuple[PyTree, Function]:
    """The gradient of loss(f(w)), and the product with its Hessian or Gauss-Newton matrix."""

    def composite(w: PyTree) -> jax.Array:
        return loss(f(w))

    if model == "hessian":
        return jax.grad(composite)(w), functools.partial(hessian_mvp, composite, w)
    if model == "gauss_newton":
        return jax.grad(composite)(w), functools.partial(gauss_newton_mvp, f, loss, w)
    raise ValueError(f"model is {model!r}, expected 'hessian' or 'gauss_newton'.")


def solve(mvp: Function, b: PyTree, solver: Solver, tolerance: float | None) -> PyTree:
    """The shortest x with mvp(x) = b, for a symmetric map."""
    check_solver(solver)
    flat, unravel = ravel_pytree(b)
    if solver == "dense":
        values, vectors = jnp.linalg.eigh(dense(mvp, b))
        kept = jnp.abs(values) > negligible(values)
        inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1.0), 0.0)
        return unravel(vectors @ (inverse * (vectors.T @ flat)))
    share = relative_tolerance(tolerance, flat.dtype)
    x = cg(mvp, b, tol=share, maxiter=10 * flat.size)[0]
    # To conjugate gradients NaN is as good as zero: they end where they are.
    fine = jnp.isfinite(flat - ravel_pytree(mvp(x))[0]).all()
    return jax.tree.map(lambda x: jnp.where(fine, x, jnp.nan), x)


def dense(mvp: Function, like: PyTree) -> jax.Array:
    """The symmetric matrix of a linear map on pytrees, shape [size, size]."""
    x, unravel = ravel_pytree(like)
    matrix = jax.vmap(lambda e: ravel_pytree(mvp(unravel(e)))[0])(jnp.eye(x.size, dtype=x.dtype))
    return 0.5 * (matrix + matrix.T)


def half_squares(z: PyTree, z0: PyTree) -> jax.Array:
    """Half the squared distance of two trees."""
    difference = ravel_pytree(jax.tree.map(jnp.subtract, z, z0))[0]
    return 0.5 * difference @ difference


def divergence(rho: Divergence, z0: PyTree) -> Scalar:
    """The map z -> rho(z, z0), quadratic for what is only a metric."""
    if callable(rho) and not isinstance(rho, Metric):
        check_scalar("rho", lambda z: rho(z, z0), z0)
        return lambda z: rho(z, z0)

    def one(metric: Any, z: PyTree, z0: PyTree) -> jax.Array:
        if callable(metric):  # a value for every unit, where mvp is of their sum
            values = jax.tree.leaves(jax.tree.map(metric, z, z0))
            return jnp.sum(jnp.stack([jnp.sum(x) for x in values]))
        difference = jax.tree.map(jnp.subtract, z, z0)
        product = ravel_pytree(apply(metric, z0, difference))[0]
        return 0.5 * ravel_pytree(difference)[0] @ product

    def total(z: PyTree) -> jax.Array:
        values = jax.tree.map(one, rho, z, z0, is_leaf=lambda x: isinstance(x, Metric))
        return jnp.sum(jnp.stack(jax.tree.leaves(values)))

    return total


def ravel(w: PyTree, name: str = "weights") -> tuple[jax.Array, Callable[[jax.Array], PyTree]]:
    """A tree as one vector, and the way back; raises where it is not float32 or float64."""
    leaves = jax.tree.leaves(w)
    for leaf in leaves:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"{name}: found dtype {dtype}, expected floating point throughout.")
        if dtype.itemsize < 4:
            raise TypeError(f"{name}: found dtype {dtype}, expected float32 or float64: cast them.")
    if not leaves:
        raise ValueError(f"{name}: found no arrays, expected a tree with at least one.")
    return ravel_pytree(w)


def check_scalar(name: str, function: Function, z: PyTree) -> None:
    """Raises where the function does not return a scalar."""
    shape = jax.tree.map(jnp.shape, jax.eval_shape(function, z))
    if shape != ():
        raise ValueError(f"{name} returns shape {shape}, expected a scalar: take a mean or a sum.")


def check_structure(name: str, tree: PyTree, like_name: str, like: PyTree) -> None:
    """Raises where two trees differ in structure or shapes."""
    found, expected = (str(jax.tree.map(jnp.shape, t)) for t in (tree, like))
    if found != expected:
        raise ValueError(f"{name} has shapes {found}, expected those of {like_name}: {expected}.")


def check_solver(solver: str) -> None:
    """Raises for the name of an unknown solver."""
    if solver not in ("cg", "dense"):
        raise ValueError(f"solver is {solver!r}, expected 'cg' or 'dense'.")


def positive(name: str, value: ArrayLike) -> jax.Array:
    """The number as an array; arrays under a trace are not looked at."""
    if not isinstance(value, jax.core.Tracer) and not 0 < float(np.asarray(value)) < np.inf:
        raise ValueError(f"{name} is {value}, expected a positive number.")
    return jnp.asarray(value)


def not_negative(name: str, value: ArrayLike) -> jax.Array:
    """The number as an array, zero allowed; see `positive`."""
    if not isinstance(value, jax.core.Tracer) and not 0 <= float(np.asarray(value)) < np.inf:
        raise ValueError(f"{name} is {value}, expected a number not below zero.")
    return jnp.asarray(value)
