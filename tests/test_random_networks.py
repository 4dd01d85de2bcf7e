"""Random networks against brute force: loss, gradients, Kronecker and diagonal statistics.

A network is a list of drawn layers on arrays (examples, positions, features). Each layer is one
function `layer(p, x, tap)`; the model calls it with a tap that does nothing, the brute force with
one that records inputs and perturbs outputs. Scans are unrolled in the brute force.

`RANDOM_NETWORKS=500 pytest tests/test_random_networks.py` runs more examples than the default,
which is 4 of them, and 20 among the slow tests.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import factors

import curvature

N, T, D = 3, 2, 3
EXAMPLES = int(os.environ.get("RANDOM_NETWORKS", "12"))
QUICK = 4


def weight(key, *shape):
    return jax.random.normal(key, shape) / np.sqrt(D)


def halves(k):
    one, two = weight(k, D, 1), weight(jax.random.fold_in(k, 7), D, D - 1)
    return {"left": one, "right": two}


LAYOUTS = {
    "plain": (lambda k: weight(k, D, D), lambda w, x: x @ w),
    "transposed": (lambda k: weight(k, D, D), lambda w, x: x @ w.T),
    "flat": (lambda k: weight(k, D * D), lambda w, x: x @ w.reshape(D, D)),
    "left": (lambda k: weight(k, D, D), lambda w, x: jnp.einsum("oi,nti->nto", w, x)),
    "heads": (
        lambda k: weight(k, D, D, 1),
        lambda w, x: jnp.einsum("nti,iho->ntho", x, w).reshape(x.shape),
    ),
    "vmapped": (lambda k: weight(k, D, D), lambda w, x: jax.vmap(lambda v: v @ w)(x)),
    "joined": (
        halves,
        lambda w, x: x @ jnp.concatenate([w["left"], w["right"]], 1),
    ),
    "sliced, reversed": (lambda k: weight(k, 2 * D, D), lambda w, x: x @ w[D:][::-1]),
}


def dense(name, layout, biased, key):
    make, product = LAYOUTS[layout]
    params = {"w": make(key)} | ({"b": weight(jax.random.fold_in(key, 1), D)} if biased else {})

    def apply(p, x, tap):
        y = product(p["w"], x)
        return jnp.tanh(tap(f"{name}/w", x, y + p["b"] if biased else y))

    return params, apply


def shared(name, layout, biased, key):
    params, once = dense(name, layout, biased, key)
    return params, lambda p, x, tap: once(p, once(p, x, tap), tap)


def scanned(name, layout, biased, key, depth, remat):
    keys = jax.random.split(key, depth)
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[
        dense(name, layout, biased, k)[0] for k in keys
    ])  # fmt: skip

    def apply(p, x, tap):
        if tap is not same:
            for i in range(depth):
                one = dense(f"{name}@{i}", layout, biased, key)[1]
                x = one(jax.tree.map(lambda leaf, i=i: leaf[i], p), x, tap)
            return x
        body = dense(name, layout, biased, key)[1]
        body = jax.checkpoint(body, static_argnums=2) if remat else body
        return jax.lax.scan(lambda h, q: (body(q, h, same), None), x, p)[0]

    return params, apply


def convolution(name, layout, biased, key):
    params = {"w": weight(key, 2, D, D)} | ({"b": weight(key, D)} if biased else {})

    def apply(p, x, tap):
        y = jax.lax.conv_general_dilated(
            x, p["w"], (1,), [(1, 0)], dimension_numbers=("NWC", "WIO", "NWC")
        )
        before = jnp.pad(x, [(0, 0), (1, 0), (0, 0)])[:, :-1]
        a = jnp.stack([before, x], -1).reshape(*x.shape[:2], -1)
        return jnp.tanh(tap(f"{name}/w", a, y + p["b"] if biased else y))

    return params, apply


def elementwise(name, layout, biased, key):
    params = {"scale": weight(key, D) + 1, "offset": weight(jax.random.fold_in(key, 1), T, 1)}
    return params, lambda p, x, tap: jnp.tanh(x * p["scale"] + p["offset"])


@st.composite
def networks(draw):
    """(params, model(params, x, tap), names of Kronecker layers with a bias)."""
    key = jax.random.key(draw(st.integers(0, 2**31 - 1)))
    params, layers, biased_names = {}, [], set()
    for i in range(draw(st.integers(1, 3))):
        name, layout = f"layer{i}", draw(st.sampled_from(sorted(LAYOUTS)))
        biased, jitted = draw(st.booleans()), draw(st.booleans())
        kinds = {"dense": dense, "shared": shared, "conv": convolution, "norm": elementwise}
        kind = draw(st.sampled_from([*sorted(kinds), "scanned"]))
        args = (name, layout, biased, jax.random.fold_in(key, i))
        if kind == "scanned":
            depth, remat = draw(st.integers(1, 3)), draw(st.booleans())
            params[name], apply = scanned(*args, depth, remat)
            names = {f"{name}@{j}/w" for j in range(depth)}
        else:
            params[name], apply = kinds[kind](*args)
            names = {f"{name}/w"} if kind != "norm" else set()
        biased_names |= names if biased else set()
        layers.append((name, apply, jitted))

    def model(p, x, tap=same):
        for name, apply, jitted in layers:
            run = jax.jit(apply, static_argnums=2) if jitted and tap is same else apply
            x = run(p[name], x, tap)
        return x

    return params, model, biased_names


def grouped(expected):
    """Factors by layer name, scanned copies stacked in front."""
    layers = {}
    for name, pair in sorted(expected.items()):
        head, _, rest = name.partition("@")
        layers.setdefault(head if rest else name.removesuffix("/w"), []).append((pair, bool(rest)))
    return {
        name: tuple(
            np.stack(f) if pairs[0][1] else f[0] for f in zip(*(p for p, _ in pairs), strict=True)
        )
        for name, pairs in layers.items()
    }


SETTINGS = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@settings(SETTINGS, max_examples=QUICK)
@given(networks(), st.sampled_from(["l2", "softmax"]))
def test_random_network(network, loss):
    check(network, loss)


@pytest.mark.slow
@settings(SETTINGS, max_examples=EXAMPLES)
@given(networks(), st.sampled_from(["l2", "softmax"]))
def test_random_networks(network, loss):
    check(network, loss)


def check(network, loss):
    params, model, biased = network
    x = jax.random.normal(jax.random.key(1), (N, T, D))
    targets = jax.random.normal(jax.random.key(2), (N, T, D))
    weights = jnp.arange(1.0, N + 1)

    def loss_of(module):
        def total(z, targets):
            if loss == "l2":
                return (module.l2_loss(z, targets).sum(-1) * weights[: len(z), None]).mean()
            values = module.softmax_cross_entropy_with_integer_labels(z, targets.argmax(-1))
            return (values * weights[: len(z), None]).sum() / 5

        return total

    ours, plain = loss_of(curvature.losses), loss_of(optax.losses)

    def loss_fn(p, x, targets):
        return ours(model(p, x), targets)

    registry = curvature.register(loss_fn, params, x, targets)
    # Loss and gradients are those of the same model with optax's loss.
    value, grads = jax.value_and_grad(loss_fn)(params, x, targets)
    other, expected = jax.value_and_grad(lambda p: plain(model(p, x), targets))(params)
    np.testing.assert_allclose(value, other, rtol=1e-13)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-13), grads, expected)
    # Kronecker factors are those of recorded inputs and exact output Jacobians.
    kind = curvature.GaussNewton()
    blocks = curvature.Estimator(registry, kind)(params, x, targets).blocks
    total = lambda z: plain(z, targets)  # noqa: E731
    found = factors(model, total, params, x, biased, compiled=lambda f: f)
    kronecker = {n: b for n, b in blocks.items() if isinstance(b, curvature.Kronecker)}
    blocks = {name.partition("/")[0]: block for name, block in kronecker.items()}
    for name, (a, b) in grouped(found).items():
        np.testing.assert_allclose(blocks[name].input, a, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(blocks[name].output, b, rtol=1e-9, atol=1e-12)
    # Diagonal blocks are squared per-example gradients of the exact square root.
    diagonal = curvature.Estimator(registry.override("*", block="diagonal"), kind)
    squares = diagonal(params, x, targets).diagonal()
    z = model(params, x)
    hessian = jax.hessian(lambda flat: total(flat.reshape(z.shape)))(z.ravel())
    jacobian = jax.jacrev(lambda p: model(p, x).ravel())(params)
    exact = jax.tree.map(lambda j: jnp.einsum("i...,ij,j...->...", j, hessian, j), jacobian)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), squares, exact
    )
