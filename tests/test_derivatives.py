"""Derivatives of the curvature with respect to the parameters equal finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import half

import curvature
from curvature import losses

IDS = jnp.arange(12).reshape((6, 2)) % 5
Problem = tuple[Callable[..., jax.Array], Any, jax.Array]


def cross_entropy(z: jax.Array) -> jax.Array:
    return losses.softmax_cross_entropy_with_integer_labels(z, Y)


def normal(i: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(i).normal(size=shape) / 2)


X, Y, IMAGES = 2 * normal(0, 6, 3), jnp.arange(6) % 3, 2 * normal(1, 6, 4, 4, 2)


def plain() -> Problem:
    p = {"w1": normal(2, 3, 4), "b": normal(3, 4), "w2": normal(4, 4, 3)}
    return lambda p, x: cross_entropy(jnp.tanh(x @ p["w1"] + p["b"]) @ p["w2"]).mean(), p, X


def scanned() -> Problem:
    def loss(p: Any, x: jax.Array) -> jax.Array:
        step = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
        h, _ = jax.lax.scan(step, x, p["ws"])
        h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["shared"]), None), h, None, length=2)
        return cross_entropy(h).mean()

    return loss, {"ws": normal(2, 2, 3, 3), "shared": normal(3, 3, 3)}, X


def convolved() -> Problem:
    def loss(p: Any, x: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        h = jax.lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=numbers)
        return cross_entropy(jnp.tanh(h).mean((1, 2)) @ p["w"]).mean()

    return loss, {"k": normal(2, 2, 2, 2, 3), "w": normal(3, 3, 3)}, IMAGES


def embedded() -> Problem:
    def loss(p: Any, ids: jax.Array) -> jax.Array:
        return cross_entropy(jnp.tanh(p["table"][ids]).mean(1) @ p["w"]).mean()

    return loss, {"table": normal(2, 5, 3), "w": normal(3, 3, 3)}, IDS


def normed() -> Problem:
    def loss(p: Any, x: jax.Array) -> jax.Array:
        h = jax.nn.standardize(x @ p["w"]) * p["scale"] + p["shift"]
        return cross_entropy(jnp.tanh(h) @ jnp.exp(p["curved"] * p["w"])).mean()

    scale, shift = 1 + normal(3, 3), normal(4, 3)
    return loss, {"w": normal(2, 3, 3), "scale": scale, "shift": shift, "curved": normal(5, 1)}, X


def batch_normed() -> Problem:
    def loss(p: Any, x: jax.Array) -> jax.Array:
        h = x @ p["w"]
        h = (h - h.mean(0)) * (p["scale"] * jax.lax.rsqrt(h.var(0) + 0.1))
        return cross_entropy(jnp.tanh(h)).mean()

    return loss, {"w": normal(2, 3, 3), "scale": 1 + normal(3, 3)}, X


def masked() -> Problem:
    def loss(p: Any, x: jax.Array) -> jax.Array:
        mask = (jnp.arange(6) < 4).astype(float)
        return (cross_entropy(jnp.tanh(x @ p["w1"]) @ p["w2"]) * mask).sum() / mask.sum()

    return loss, {"w1": normal(2, 3, 4), "w2": normal(4, 4, 3)}, X


def weighted() -> Problem:
    """A learned weight, a function of the loss, and a penalty, which has no curvature."""

    def loss(p: Any, x: jax.Array) -> jax.Array:
        value = cross_entropy(jnp.tanh(x @ p["w1"]) @ p["w2"]).mean()
        return jnp.sqrt(value) * jnp.exp(-p["s"]) + p["s"] + jnp.sum(p["w1"] ** 2)

    return loss, {"w1": normal(2, 3, 4), "w2": normal(4, 4, 3), "s": jnp.array(0.3)}, X


PROBLEMS = {
    f.__name__: f
    for f in (
        plain,
        scanned,
        convolved,
        embedded,
        normed,
        batch_normed,
        masked,
        weighted,
    )
}
KINDS = {
    "exact Fisher": curvature.Fisher(samples=None),
    "Fisher": curvature.Fisher(samples=2),
    "empirical Fisher": curvature.EmpiricalFisher(),
    "Gauss-Newton": curvature.GaussNewton(),
}


def check(function: Callable[[Any], jax.Array], params: Any, tolerance: float = 1e-6) -> None:
    """The derivative along a direction, by jax.grad and by central differences."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    direction = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]

    @jax.jit
    def along(t: float) -> jax.Array:
        moved = [x + t * d for x, d in zip(leaves, direction, strict=True)]
        return function(jax.tree.unflatten(treedef, moved))

    slope = float(jax.jit(jax.grad(along))(0.0))
    difference = float(along(1e-5) - along(-1e-5)) / 2e-5
    np.testing.assert_allclose(slope, difference, rtol=tolerance, atol=1e-7)
    assert abs(slope) > 1e-4


def checked(problem: str, kind: str, block: str | None) -> None:
    loss, params, x = PROBLEMS[problem]()
    registry = curvature.register(loss, params, x)
    registry = registry if block is None else registry.with_blocks(block)
    estimator = curvature.Estimator(registry, KINDS[kind])

    def value(p: Any) -> jax.Array:
        op = estimator(p, x, key=jax.random.key(1))
        return op.trace() + 0.1 * op.logdet(0.1)

    check(value, params)


@pytest.mark.parametrize("problem", ["plain", "masked", "weighted"])
def test_trace_and_logdet(problem: str) -> None:
    checked(problem, "exact Fisher", None)


@pytest.mark.slow
@pytest.mark.parametrize(("problem", "kind"), half(list(PROBLEMS), list(KINDS)))
def test_trace_and_logdet_of_every_net_and_kind(problem: str, kind: str) -> None:
    checked(problem, kind, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "block"),
    half(
        ["plain", "scanned", "embedded"],
        ["kronecker_reduce", "kronecker_weighted", "ekfac", "foof", "diagonal", "identity"],
    ),
)
def test_trace_and_logdet_of_every_block(problem: str, block: str) -> None:
    checked(problem, "Gauss-Newton", block)


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["plain", "normed", "weighted"])
def test_dense_blocks(problem: str) -> None:
    checked(problem, "exact Fisher", "dense")


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.5, curvature.QuadraticModel()])
def test_the_loss_after_a_step(rate: Any) -> None:
    loss, params, x = plain()
    registry = curvature.register(loss, params, x)
    momentum = {} if isinstance(rate, curvature.QuadraticModel) else {"momentum": 0.0}
    kind = curvature.GaussNewton()
    tx = curvature.kfac(registry, rate, damping=0.1, kind=kind, kl_clip=None, **momentum)

    def after(p: Any) -> jax.Array:
        state = tx.init(p)
        update, _ = tx.update(jax.grad(loss)(p, x), state, p, loss_args=(x,))
        return loss(optax.apply_updates(p, update), x)

    check(after, params, 1e-5)


def test_products_with_the_curvature() -> None:
    loss, params, x = plain()
    registry = curvature.register(loss, params, x)
    estimator = curvature.Estimator(registry, curvature.GaussNewton())

    def product(p: Any) -> jax.Array:
        op = estimator(p, x)
        return optax.tree.vdot(params, op @ params) + optax.tree.vdot(params, op.solve(params, 0.1))

    check(product, params)
