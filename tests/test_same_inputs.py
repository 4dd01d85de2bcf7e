"""Layers with one input have one input factor: made once, and summed over devices once."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import curvature
from curvature.statistics import same_inputs as where

KEY = jax.random.key(0)


def attention(p, x):
    """Queries, keys and values of one input; the output has its own."""
    z = jnp.tanh(x)
    q, k, v = (z @ p[name] for name in "qkv")
    scores = jax.nn.softmax(jnp.einsum("nsi,nti->nst", q, k))
    return curvature.losses.l2_loss(jnp.einsum("nst,nti->nsi", scores, v) @ p["o"]).mean()


def scanned(p, x):
    def body(x, p):
        return x + jnp.tanh(x @ p["a"]) * (x @ p["b"]), None

    return curvature.losses.l2_loss(jax.lax.scan(body, x, p)[0]).mean()


def gates(p, x):
    """A recurrent cell: both see the state of every step."""

    def body(h, x):
        return jnp.tanh(h @ p["a"]) * jax.nn.sigmoid(h @ p["b"] + x), None

    h, _ = jax.lax.scan(body, x[:, 0], jnp.moveaxis(x, 1, 0))
    return curvature.losses.l2_loss(h).mean()


def cast(p, x):
    """Modules that cast their input do it once each."""
    a, b = (x.astype(jnp.bfloat16) @ p[n].astype(jnp.bfloat16) for n in "ab")
    return curvature.losses.l2_loss((jnp.tanh(a) * b).astype(jnp.float32)).mean()


def images(p, x):
    y = [
        jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))
        for w in p.values()
    ]
    return curvature.losses.l2_loss(jnp.tanh(y[0]) * y[1]).mean()


def square(*names):
    return {name: normal(i, 4, 4) for i, name in enumerate(names)}


CASES = {
    "attention": (attention, square(*"kqvo"), {"k": "q", "v": "q"}),
    "scanned": (scanned, {k: normal(i, 3, 4, 4) for i, k in enumerate("ab")}, {"b": "a"}),
    "gates": (gates, square(*"ab"), {"b": "a"}),
    "cast": (cast, square(*"ab"), {"b": "a"}),
    "images": (images, {k: normal(i, 3, 4, 4) for i, k in enumerate("ab")}, {"b": "a"}),
}
X = normal(9, 6, 5, 4)


def both(monkeypatch, loss, params, x, block):
    """Statistics as they are, those of every layer on its own, and who shares with whom."""
    registry = curvature.register(loss, params, x).with_blocks(block)
    estimator, shared = curvature.Estimator(registry), {}

    @jax.jit
    def statistics(params):
        return estimator.statistics(params, x, key=KEY)

    find = where.same_inputs
    monkeypatch.setattr(where, "same_inputs", lambda *a: shared.update(find(*a)) or find(*a))
    found = statistics(params)
    statistics.clear_cache()  # to be traced anew
    monkeypatch.setattr(where, "same_inputs", lambda *_: {})
    return found, statistics(params), shared


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("block", ["kronecker", "ekfac", "foof"])
@pytest.mark.parametrize("name", CASES)
def test_statistics_are_those_of_every_layer_on_its_own(monkeypatch, name, block):
    loss, params, expected = CASES[name]
    found, alone, shared = both(monkeypatch, loss, params, X, block)
    assert shared == expected
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-9), found, alone)


def with_bias(p, x):
    return curvature.losses.l2_loss(jnp.tanh(x @ p["a"] + p["c"]) * (x @ p["b"])).mean()


def strides(p, x):
    y = [
        jax.lax.conv_general_dilated(x, p[n], (1,), pad, dimension_numbers=("NHC", "HIO", "NHC"))
        for n, pad in (("a", "SAME"), ("b", "VALID"))
    ]
    return curvature.losses.l2_loss(jnp.tanh(y[0][:, 1:-1]) * y[1]).mean()


def twice(p, x):
    return curvature.losses.l2_loss(jnp.tanh(x @ p["a"]) @ p["a"] + x @ p["b"]).mean()


def masked(p, x):
    z = jnp.tanh(x @ p["a"]) * (x @ p["b"])
    return (curvature.losses.l2_loss(z).sum(-1) * (x[..., 0] > 0)).mean()


def tied(p, x):
    return curvature.losses.l2_loss(jnp.tanh(x @ p["a"]) @ p["a"].T + x @ p["b"]).mean()


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("loss", "params", "block"),
    [
        (with_bias, square(*"ab") | {"c": normal(5, 4)}, "kronecker"),
        (strides, {k: normal(i, 3, 4, 4) for i, k in enumerate("ab")}, "kronecker"),
        (twice, square(*"ab"), "kronecker"),
        (masked, square(*"ab"), "kronecker"),
        (tied, square(*"ab"), "kronecker"),
        (attention, square(*"kqvo"), "kronecker_weighted"),
        (attention, square(*"kqvo"), "kronecker_reduce"),
    ],
    ids=["bias", "padding", "twice", "masked", "tied", "weighted", "reduce"],
)
def test_what_depends_on_more_than_the_input_is_not_shared(monkeypatch, loss, params, block):
    found, alone, shared = both(monkeypatch, loss, params, X, block)
    assert shared == {}
    jax.tree.map(np.testing.assert_array_equal, found, alone)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("first", [True, False])
def test_a_layer_that_no_gradient_reaches_owns_nothing(monkeypatch, first):
    """The rule that would make the factor is not asked behind `sign`."""

    def loss(p, x):
        gate, z = (x @ p["a"], x @ p["b"]) if first else (x @ p["a"], x @ p["b"])[::-1]
        return curvature.losses.l2_loss(jnp.sign(gate) * z * (x @ p["c"])).mean()

    found, alone, shared = both(monkeypatch, loss, square(*"abc"), X, "kronecker")
    assert shared
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-9), found, alone)


def test_devices_sum_one_factor_of_one_input():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    params = jax.device_put(square(*"qkvo"), NamedSharding(mesh, P()))
    x = jax.device_put(normal(9, 8, 5, 4), NamedSharding(mesh, P("data")))
    estimator = curvature.Estimator(curvature.register(attention, params, x))
    step = jax.jit(lambda p, x: estimator.statistics(p, x, key=KEY))
    text = step.lower(params, x).compile().as_text()
    sums = re.findall(r"= (.*) all-reduce\(", text)
    matrices = sum(line.count("[4,4]") for line in sums)
    assert matrices == 4 + 2  # of four outputs; of two inputs
