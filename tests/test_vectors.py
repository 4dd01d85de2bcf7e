"""Operators on vectors that are complex, or of whole numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from curvature import losses, operators

X, Y = jax.random.normal(jax.random.key(0), (6, 3)), jnp.ones((6, 2))
PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
APPLIED: dict[str, Callable[[curvature.BlockDiagonal, Any], Any]] = {
    "product": lambda op, v: op @ v,
    "solve": lambda op, v: op.solve(v, 0.1),
    "power": lambda op, v: op.power(v, -0.5, 0.1),
}


def loss_fn(p: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return losses.l2_loss(x @ p["w"] + p["b"], y).sum(-1).mean()


def vectors() -> tuple[Any, Any]:
    keys = jax.random.split(jax.random.key(1), 2)
    one, other = (jax.tree.map(lambda x, k=k: jax.random.normal(k, x.shape), PARAMS) for k in keys)
    return one, other


@pytest.mark.parametrize("block", ["kronecker", "ekfac", "diagonal", "dense", "identity"])
@pytest.mark.parametrize("how", APPLIED)
def test_blocks_take_any_numbers(how: str, block: str) -> None:
    registry = curvature.register(loss_fn, PARAMS, X, Y).with_blocks(block)
    op = curvature.Estimator(registry, curvature.GaussNewton())(PARAMS, X, Y)
    apply, (real, imag) = APPLIED[how], vectors()
    found = apply(op, jax.tree.map(jax.lax.complex, real, imag))
    for part, expected in ((np.real, apply(op, real)), (np.imag, apply(op, imag))):
        for name in PARAMS:
            np.testing.assert_allclose(part(found[name]), expected[name], rtol=1e-6)
    mixed = apply(op, {"w": jax.lax.complex(real["w"], imag["w"]), "b": real["b"]})
    np.testing.assert_allclose(
        np.imag(mixed["b"]), apply(op, {"w": imag["w"], "b": 0 * imag["b"]})["b"], atol=1e-6
    )
    whole = jax.tree.map(lambda x: jnp.round(3 * x).astype(jnp.int32), real)
    expected = apply(op, jax.tree.map(lambda x: x.astype(float), whole))
    for name, x in apply(op, whole).items():
        assert jnp.issubdtype(x.dtype, jnp.floating)
        np.testing.assert_allclose(x, expected[name], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32])
def test_exact_operators_say_what_they_take(dtype: Any) -> None:
    op = operators.gauss_newton(loss_fn, PARAMS, [(X, Y)])
    vector = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    for apply in (lambda: op @ vector, lambda: operators.solve(op, vector, damping=0.1)):
        with pytest.raises(TypeError, match=r"The tree\['b'\] is of .*expected real floating"):
            apply()
