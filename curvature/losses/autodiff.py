"""Derivatives of a function of one unit, for losses and metrics that no closed form is known of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Scalar = Callable[[jax.Array], jax.Array]


def over_units(function: Callable[..., Any], units: int) -> Callable[..., Any]:
    """`function` of one unit as a function of arrays with `units` more axes in front."""
    for _ in range(units):
        function = jax.vmap(function)
    return function


def hessian_mvp(function: Scalar, z: jax.Array, v: jax.Array) -> jax.Array:
    """The Hessian of a scalar function at `z`, times `v`: forward over reverse."""
    return jax.jvp(jax.grad(function), (z,), (v,))[1]


def psd_root(function: Scalar, z: jax.Array, v: jax.Array) -> jax.Array:
    """S v for the symmetric square root S of the positive semi-definite part of the Hessian at `z`.

    The Hessian is formed and decomposed, in O(n^3) for n entries of `z`; its negative eigenvalues
    are set to zero.
    """
    dense = jax.hessian(lambda flat: function(flat.reshape(z.shape)))(z.reshape(-1))
    eigenvalues, q = jnp.linalg.eigh(dense)
    root = jnp.sqrt(jnp.maximum(eigenvalues, 0))
    return (q @ (root * (q.T @ v.reshape(-1)))).reshape(z.shape)
