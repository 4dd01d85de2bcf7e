"""Weights that are computed from parameters: the curvature of one spelling is that of the other.

Every case is a function as it is published and as the registry has always known it. Dense and
diagonal blocks are held to brute force over per-example gradients in float64, Kronecker factors to
those of the other spelling, and through it to tests/test_statistics.py.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import N, normal

import curvature

MASK = jnp.asarray(np.tril(np.ones((3, 4))), jnp.float64)
FROZEN = normal(50, 3, 4)


@jax.custom_vjp
def rounded(w):
    """A rounded weight whose derivative is one, and zero where it is cut off."""
    return jnp.clip(jnp.round(w * 8) / 8, -1, 1)


rounded.defvjp(lambda w: (rounded(w), w), lambda w, g: (jnp.where(jnp.abs(w) < 1, g, 0),))


def parts(x):
    return jax.lax.complex(x[:, :3], x[:, 3:])


def imaginary(x):
    return jnp.asarray(1j) * x.astype(complex)


def inside(w):
    return (jnp.abs(w) < 1).astype(w.dtype)


def complex_product(p, x):
    a, b = x[:, :3], x[:, 3:]
    return jnp.concatenate([a @ p["re"] - b @ p["im"], a @ p["im"] + b @ p["re"]], 1)


def both(z):
    return jnp.concatenate([z.real, z.imag], 1)


def rows_of(x):
    """Indices made of the data."""
    return (10 * jnp.abs(x[:, 0])).astype(int) % 5


# (as published, as it was always known, shapes, inputs): both are of the same parameters.
PAIRS = {
    "low rank": (
        lambda p, x: x @ (p["a"] @ p["b"]),
        lambda p, x: (x @ p["a"]) @ p["b"],
        {"a": (3, 2), "b": (2, 4)},
    ),
    "LoRA": (
        lambda p, x: x @ (FROZEN + 0.5 * p["a"] @ p["b"]),
        lambda p, x: x @ FROZEN + ((x @ p["a"]) @ p["b"]) * 0.5,
        {"a": (3, 2), "b": (2, 4)},
    ),
    "three factors": (
        lambda p, x: x @ ((p["a"] * p["s"]) @ p["b"]),
        lambda p, x: ((x @ p["a"]) * p["s"]) @ p["b"],
        {"a": (3, 2), "s": (2,), "b": (2, 4)},
    ),
    "gain of outputs": (
        lambda p, x: x @ (p["w"] * p["g"]),
        lambda p, x: (x @ p["w"]) * p["g"],
        {"w": (3, 4), "g": (4,)},
    ),
    "gain of outputs, transposed": (
        lambda p, x: x @ (p["g"][:, None] * p["w"]).T,
        lambda p, x: (x @ p["w"].T) * p["g"],
        {"w": (4, 3), "g": (4,)},
    ),
    "gain of inputs": (
        lambda p, x: x @ (p["w"] * p["g"][:, None]),
        lambda p, x: (x * p["g"]) @ p["w"],
        {"w": (3, 4), "g": (3,)},
    ),
    "gains of heads": (
        lambda p, x: jnp.einsum("bi,ihk->bhk", x, p["w"] * p["g"][:, None]).reshape(len(x), -1),
        lambda p, x: (jnp.einsum("bi,ihk->bhk", x, p["w"]) * p["g"][:, None]).reshape(len(x), -1),
        {"w": (3, 2, 2), "g": (2,)},
    ),
    "number": (
        lambda p, x: x @ (jnp.exp(p["s"]) * p["w"]),
        lambda p, x: (jnp.exp(p["s"]) * x) @ p["w"],
        {"w": (3, 4), "s": ()},
    ),
    "divided": (
        lambda p, x: x @ (p["w"] / jnp.exp(p["g"])),
        lambda p, x: (x @ p["w"]) * (1 / jnp.exp(p["g"])),
        {"w": (3, 4), "g": (4,)},
    ),
    "sum": (
        lambda p, x: x @ (p["w"] - p["u"]),
        lambda p, x: x @ p["w"] - x @ p["u"],
        {"w": (3, 4), "u": (3, 4)},
    ),
    "sum over an axis": (
        lambda p, x: x @ p["w"].sum(0),
        lambda p, x: jnp.concatenate([x, x], 1) @ p["w"].reshape(6, 4),
        {"w": (2, 3, 4)},
    ),
    "repeated outputs": (
        lambda p, x: x @ jnp.repeat(p["w"], 2, 1),
        lambda p, x: jnp.repeat(x @ p["w"], 2, 1),
        {"w": (3, 2)},
    ),
    "repeated inputs": (
        lambda p, x: jnp.concatenate([x, 2 * x], 1) @ jnp.tile(p["w"], (2, 1)),
        lambda p, x: (3 * x) @ p["w"],
        {"w": (3, 4)},
    ),
    "complex": (
        lambda p, x: both(parts(x) @ (p["re"].astype(complex) + imaginary(p["im"]))),
        complex_product,
        {"re": (3, 2), "im": (3, 2)},
        6,
    ),
    "complex, of two parts": (
        lambda p, x: both(parts(x) @ jax.lax.complex(p["re"], p["im"])),
        complex_product,
        {"re": (3, 2), "im": (3, 2)},
        6,
    ),
    "scale of a product": (
        lambda p, x: x * (p["g"] * p["s"]),
        lambda p, x: (x * p["g"]) * p["s"],
        {"g": (3,), "s": ()},
    ),
    "offset of a sum": (
        lambda p, x: jnp.tanh(x) + (p["b"] + p["c"]),
        lambda p, x: (jnp.tanh(x) + p["b"]) + p["c"],
        {"b": (3,), "c": (3,)},
    ),
    "rounded by a rule": (
        lambda p, x: x @ rounded(p["w"]),
        lambda p, x: (
            x
            @ (
                p["w"] * inside(p["w"])
                + jax.lax.stop_gradient(rounded(p["w"]) - p["w"] * inside(p["w"]))
            )
        ),
        {"w": (3, 4)},
    ),
    "table of a low rank": (
        lambda p, x: (p["e"] + p["a"] @ p["b"])[rows_of(x)],
        lambda p, x: p["e"][rows_of(x)] + p["a"][rows_of(x)] @ p["b"],
        {"e": (5, 4), "a": (5, 2), "b": (2, 4)},
    ),
    "table with a gain": (
        lambda p, x: (p["e"] * p["g"])[rows_of(x)],
        lambda p, x: p["e"][rows_of(x)] * p["g"],
        {"e": (5, 4), "g": (4,)},
    ),
    "mask": (lambda p, x: x @ (p["w"] * MASK), None, {"w": (3, 4)}),
    "mask and gain": (
        lambda p, x: x @ (p["w"] * MASK * p["g"]),
        lambda p, x: (x @ (p["w"] * MASK)) * p["g"],
        {"w": (3, 4), "g": (4,)},
    ),
    "product, entry by entry": (
        lambda p, x: x @ (p["w"] * p["u"] * p["g"]),
        lambda p, x: (
            (
                x @ (p["w"] * jax.lax.stop_gradient(p["u"]))
                + x @ (jax.lax.stop_gradient(p["w"]) * p["u"])
                - x @ jax.lax.stop_gradient(p["w"] * p["u"])
            )
            * p["g"]
        ),
        {"w": (3, 4), "u": (3, 4), "g": (4,)},
    ),
    "positive": (lambda p, x: x @ jax.nn.softplus(p["w"]), None, {"w": (3, 4)}),
    "positive, with a gain": (
        lambda p, x: x @ (jnp.exp(p["w"]) * p["g"]),
        lambda p, x: (x @ jnp.exp(p["w"])) * p["g"],
        {"w": (3, 4), "g": (4,)},
    ),
}


def problem(model, shapes, features=3):
    """A loss of one hidden layer made by the model, its parameters, and the data."""
    shapes = dict(shapes, v=(jax.eval_shape(model, *arguments(shapes, features)).shape[1], 2))
    params, x = arguments(shapes, features)
    y = normal(9, N, 2)

    def losses(p, x, y):
        return curvature.losses.squared_error(jnp.tanh(model(p, x)) @ p["v"], y).sum(-1)

    def loss_fn(p, x, y):
        return losses(p, x, y).mean()

    return loss_fn, losses, params, (x, y)


def arguments(shapes, features):
    params = {name: 0.5 * normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    return params, normal(8, N, features)


def operator(loss_fn, params, data, block=None):
    registry = curvature.register(loss_fn, params, *data)
    if block is not None:
        registry = registry.with_blocks(block)
    estimate = jax.jit(curvature.Estimator(registry, curvature.EmpiricalFisher()))
    return registry, estimate(params, *data)


def matrix(op, params, name):
    """The rows and columns of a parameter in the operator's matrix."""
    zero = jax.tree.map(jnp.zeros_like, params)
    eye = jnp.eye(params[name].size).reshape(-1, *params[name].shape)
    return jax.vmap(lambda e: (op @ (zero | {name: e}))[name].ravel())(eye)


def check_exact(model, shapes, features=3):
    """Dense and diagonal blocks against per-example gradients."""
    loss_fn, losses, params, data = problem(model, shapes, features)
    one = jax.grad(lambda p, x, y: losses(p, x[None], y[None])[0])
    each = jax.jit(jax.vmap(one, in_axes=(None, 0, 0)))(params, *data)
    registry, dense = operator(loss_fn, params, data, "dense")
    assert registry.coverage == 1
    assert {layer.kind for layer in registry.layers} <= {
        "dense",
        "conv",
        "embedding",
        "scale",
        "shift",
    }
    _, diagonal = operator(loss_fn, params, data, "diagonal")
    for name in params:
        flat = each[name].reshape(N, -1)
        expected = flat.T @ flat / N
        np.testing.assert_allclose(matrix(dense, params, name), expected, rtol=1e-9, atol=1e-12)
        found = matrix(diagonal, params, name)
        np.testing.assert_allclose(found, np.diag(np.diag(expected)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_dense_and_diagonal_blocks_equal_brute_force(name):
    """Whatever is done to a weight before it meets the data."""
    model, _, shapes, *features = PAIRS[name]
    check_exact(model, shapes, *features)


REST = ("ekfac", "kronecker_reduce", "kronecker_weighted")
SLOW = [pytest.param(block, marks=pytest.mark.slow) for block in REST]


@pytest.mark.parametrize("block", ["kronecker", *SLOW])
@pytest.mark.parametrize("name", [name for name, pair in PAIRS.items() if pair[1] is not None])
def test_factors_are_those_of_the_other_spelling(name, block):
    """Kronecker factors and EKFAC's corrections are the same."""
    model, other, shapes, *features = PAIRS[name]
    found, expected = (
        operator(*_without_losses(m, shapes, features), block)[1] for m in (model, other)
    )
    params = problem(model, shapes, *features)[2]
    for leaf in params:
        np.testing.assert_allclose(
            matrix(found, params, leaf), matrix(expected, params, leaf), rtol=1e-9, atol=1e-12
        )


def _without_losses(model, shapes, features):
    loss_fn, _, params, data = problem(model, shapes, *features)
    return loss_fn, params, data


# Norms ------------------------------------------------------------------------------------------


def standardised(w):
    axes = tuple(range(w.ndim - 1))
    centred = w - w.mean(axes)
    return centred / jnp.sqrt((centred**2).mean(axes) + 1e-5)


def convolved(x, w, groups=1):
    """Images of three by three with two channels, from flat ones."""
    images = x.reshape(-1, 3, 3, 2)
    numbers = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
        images, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )
    return jnp.tanh(y).sum((1, 2))


def held(w, name):
    """A normalised weight with what normalises it held constant."""
    stop, axes = jax.lax.stop_gradient, tuple(range(w.ndim - 1))
    if name == "norm":
        return w / stop(jnp.sqrt((w**2).sum(axes)))
    mean, deviation = w.mean(axes), jnp.sqrt(((w - w.mean(axes)) ** 2).mean(axes) + 1e-5)
    return (w - stop(mean)) / stop(deviation)


def directed(w, g, hold=lambda norm: norm):
    """DoRA: columns of length g."""
    return g * w / hold(jnp.linalg.norm(w, axis=0))


NORMS = {
    "norm of a sum (DoRA)": (
        lambda p, x: x @ directed(p["w"] + p["a"] @ p["b"], p["g"]),
        lambda p, x: x @ directed(p["w"] + p["a"] @ p["b"], p["g"], jax.lax.stop_gradient),
        {"w": (3, 4), "a": (3, 2), "b": (2, 4), "g": (4,)},
    ),
    "norm of a sum with a frozen part": (
        lambda p, x: x @ directed(FROZEN + p["a"] @ p["b"], p["g"]),
        lambda p, x: x @ directed(FROZEN + p["a"] @ p["b"], p["g"], jax.lax.stop_gradient),
        {"a": (3, 2), "b": (2, 4), "g": (4,)},
    ),
    "detached": (
        lambda p, x: x @ directed(FROZEN + p["a"] @ p["b"], p["g"], jax.lax.stop_gradient),
        lambda p, x: x @ directed(FROZEN + p["a"] @ p["b"], p["g"], jax.lax.stop_gradient),
        {"a": (3, 2), "b": (2, 4), "g": (4,)},
    ),
    "rows of a table, norm": (
        lambda p, x: (p["e"] / jnp.linalg.norm(p["e"], axis=1, keepdims=True))[rows_of(x)],
        lambda p, x: (
            p["e"] / jax.lax.stop_gradient(jnp.linalg.norm(p["e"], axis=1, keepdims=True))
        )[rows_of(x)],
        {"e": (5, 4)},
    ),
    "norm": (
        lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0) * p["g"]),
        lambda p, x: x @ (held(p["w"], "norm") * p["g"]),
        {"w": (3, 4), "g": (4,)},
    ),
    "standardised": (
        lambda p, x: x @ (standardised(p["w"]) * p["g"]),
        lambda p, x: x @ (held(p["w"], "std") * p["g"]),
        {"w": (3, 4), "g": (4,)},
    ),
    "convolution, gain": (
        lambda p, x: convolved(x, p["w"] * p["g"]),
        lambda p, x: convolved(x, p["w"] * p["g"]),
        {"w": (2, 2, 2, 3), "g": (3,)},
        18,
    ),
    "convolution, norm": (
        lambda p, x: convolved(x, p["w"] / jnp.sqrt((p["w"] ** 2).sum((0, 1, 2))) * p["g"]),
        lambda p, x: convolved(x, held(p["w"], "norm") * p["g"]),
        {"w": (2, 2, 2, 3), "g": (3,)},
        18,
    ),
    "convolution, standardised": (
        lambda p, x: convolved(x, standardised(p["w"]) * p["g"]),
        lambda p, x: convolved(x, held(p["w"], "std") * p["g"]),
        {"w": (2, 2, 2, 3), "g": (3,)},
        18,
    ),
    "convolution in groups, masked": (
        lambda p, x: convolved(x, p["w"] * (p["w"] > 0).astype(float), groups=2),
        lambda p, x: convolved(x, p["w"] * (p["w"] > 0).astype(float), groups=2),
        {"w": (2, 2, 1, 4)},
        18,
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_are_held_constant_and_the_table_says_so(name):
    """The block of a normalised weight is the one that it has given its norm."""
    model, expected, shapes, *features = NORMS[name]
    loss_fn, _, params, data = problem(model, shapes, *features)
    _, losses, *_ = problem(expected, shapes, *features)
    registry, found = operator(loss_fn, params, data, "diagonal")
    assert registry.coverage == 1
    one = jax.grad(lambda p, x, y: losses(p, x[None], y[None])[0])
    each = jax.vmap(one, in_axes=(None, 0, 0))(params, *data)
    for leaf in params:
        expected = (each[leaf].reshape(N, -1) ** 2).mean(0)
        values = jnp.diag(matrix(found, params, leaf))
        np.testing.assert_allclose(values, expected, rtol=1e-9, atol=1e-12)
    normed = "norm" in name or "standard" in name
    assert ("held constant" in str(registry)) == normed


@pytest.mark.parametrize("stopped", [False, True])
def test_a_gain_for_each_position_of_a_kernel(stopped):
    """Two kernels, entry by entry: the larger is a layer, which has been given its gain."""
    shapes = {"w": (2, 2, 2, 3), "g": (2, 2, 1, 1)}

    def model(p, x, hold=lambda norm: norm):
        w = p["w"] / hold(jnp.sqrt((p["w"] ** 2).sum((2, 3), keepdims=True)))
        gain = jax.lax.stop_gradient(p["g"]) if stopped else p["g"]
        return convolved(x, w * gain)

    loss_fn, _, params, data = problem(model, shapes, 18)
    _, losses, *_ = problem(functools.partial(model, hold=jax.lax.stop_gradient), shapes, 18)
    registry = curvature.register(loss_fn, params, *data).override("w", block="diagonal")
    kinds = {layer.name: layer.kind for layer in registry.layers}
    assert kinds == {"w": "conv", "g": "generic", "v": "dense"}
    estimator = curvature.Estimator(registry, curvature.EmpiricalFisher())
    found = jax.jit(estimator)(params, *data, key=jax.random.key(0))
    one = jax.grad(lambda p, x, y: losses(p, x[None], y[None])[0])
    each = jax.jit(jax.vmap(one, in_axes=(None, 0, 0)))(params, *data)["w"]
    values = found.diagonal()["w"]
    np.testing.assert_allclose(values, (each**2).mean(0), rtol=1e-9, atol=1e-12)


# Where the weights are --------------------------------------------------------------------------


def scanned(p, x):
    def body(h, layer):
        return jnp.tanh(h @ (layer["w"] * layer["g"])), None

    return jax.lax.scan(body, x, {"w": p["w"], "g": p["g"]})[0]


def scanned_spelled(p, x):
    def body(h, layer):
        return jnp.tanh((h @ layer["w"]) * layer["g"]), None

    return jax.lax.scan(body, x, {"w": p["w"], "g": p["g"]})[0]


STACK = {"w": (3, 3, 3), "g": (3, 3)}


def looped(p, x):
    return jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh((h @ p["w"][i]) * p["g"][i]), x)


def backwards(p, x):
    def body(h, i):
        w = jax.lax.dynamic_index_in_dim(p["w"], i, 0, keepdims=False)
        return jnp.tanh(h @ w * p["g"][i]), None

    return jax.lax.scan(body, x, jnp.arange(3)[::-1])[0]


def downwards(p, x):
    for i in (2, 1, 0):
        x = jnp.tanh((x @ p["w"][i]) * p["g"][i])
    return x


def every_other(p, x):
    """Copies 0 and 2, and 0 once more; 1 is not used."""
    order = jnp.array([0, 2, 0])
    return jax.lax.scan(lambda h, i: (jnp.tanh((h @ p["w"][i]) * p["g"][i]), None), x, order)[0]


PLACES = {
    "scan": (scanned, scanned_spelled, STACK),
    "remat": (
        lambda p, x: jax.checkpoint(lambda p: jnp.tanh(x @ (p["w"] * p["g"])))(p),
        lambda p, x: jnp.tanh((x @ p["w"]) * p["g"]),
        {"w": (3, 4), "g": (4,)},
    ),
    "cond": (
        lambda p, x: jax.lax.cond(x[0, 0] > 9, lambda: x @ p["w"], lambda: x @ (p["w"] * p["g"])),
        lambda p, x: jax.lax.cond(x[0, 0] > 9, lambda: x @ p["w"], lambda: (x @ p["w"]) * p["g"]),
        {"w": (3, 4), "g": (4,)},
    ),
    "jit": (
        jax.jit(lambda p, x: x @ jax.jit(lambda w, g: w * g)(p["w"], p["g"])),
        lambda p, x: (x @ p["w"]) * p["g"],
        {"w": (3, 4), "g": (4,)},
    ),
    "fori_loop": (looped, scanned_spelled, STACK),
    "loop backwards": (
        backwards,
        lambda p, x: scanned_spelled(jax.tree.map(lambda w: w[::-1], p), x),
        STACK,
    ),
}


@pytest.mark.parametrize("block", ["kronecker", "dense"])
@pytest.mark.parametrize("name", PLACES)
def test_in_loops_and_calls(name, block):
    """Wherever the product is written: in a loop, its body, a branch, a call."""
    model, other, shapes = PLACES[name]
    (found_of, found), (expected_of, expected) = (
        operator(*_without_losses(m, shapes, ()), block) for m in (model, other)
    )
    assert found_of.coverage == expected_of.coverage == 1
    assert {x.shape for x in found_of.layers} == {x.shape for x in expected_of.layers}
    params = problem(model, shapes)[2]
    for leaf in params:
        np.testing.assert_allclose(
            matrix(found, params, leaf), matrix(expected, params, leaf), rtol=1e-9, atol=1e-12
        )


def test_ragged_products_are_experts():
    """`ragged_dot`: each expert has factors of its own, of the rows that are its own."""
    sizes = jnp.array([2, 0, 3])

    def model(p, x):
        return jax.lax.ragged_dot(x, p["w"], sizes)

    def other(p, x):
        rest = jnp.zeros((1, 4))
        return jnp.concatenate([x[:2] @ p["w"][0], x[2:5] @ p["w"][2], rest])

    shapes = {"w": (3, 3, 4)}
    (registry, found), (_, expected) = (
        operator(*_without_losses(m, shapes, ()), "kronecker") for m in (model, other)
    )
    assert registry.coverage == 1
    assert next(x.stack for x in registry.layers if "w" in x.name) == (3,)
    params = problem(model, shapes)[2]
    values = matrix(found, params, "w")
    kept = np.r_[:12, 24:36]
    np.testing.assert_allclose(
        values[kept][:, kept], matrix(expected, params, "w")[kept][:, kept], rtol=1e-9, atol=1e-12
    )
    assert not values[12:24].any()


def test_models_of_known_spelling_are_not_traced_again(monkeypatch):
    """Nothing is written anew where all parameters are in layers anyway."""
    calls = []
    monkeypatch.setattr(
        "curvature.trace.analysis.respelled", lambda *args: calls.append(args) or None
    )
    for name, written in (("gain of outputs", 0), ("gain of outputs", 1)):
        model, other, shapes = PAIRS[name]
        loss_fn, _, params, data = problem((model, other)[written], shapes)
        curvature.register(loss_fn, params, *data)
        assert len(calls) == 1


def test_other_batch_sizes_and_the_lines_of_the_user():
    """The estimator takes another number of examples; the table has the user's line."""
    model, _, shapes = PAIRS["low rank"]
    loss_fn, _, params, data = problem(model, shapes)
    registry = curvature.register(loss_fn, params, *data)
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), data)
    estimate = curvature.Estimator(registry, curvature.EmpiricalFisher())
    once, again = estimate(params, *data), estimate(params, *twice)
    for leaf in params:
        np.testing.assert_allclose(matrix(once, params, leaf), matrix(again, params, leaf))
    assert all("test_respell.py" in layer.reason for layer in registry.layers)


def test_training_with_a_weight_normalised_net():
    """K-FAC on flax's WeightNorm, by the documentation's own settings."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for width in (8, 2):
                x = nn.WeightNorm(nn.Dense(width, param_dtype=x.dtype))(jnp.tanh(x))
            return x

    x, y = (normal(i, 32, n).astype(jnp.float32) for i, n in enumerate((3, 2)))
    net = Net()
    params = net.init(jax.random.key(0), x)["params"]

    def loss_fn(params, x, y):
        return curvature.losses.squared_error(net.apply({"params": params}, x), y).sum(-1).mean()

    registry = curvature.register(loss_fn, params, x, y)
    assert registry.coverage == 1, str(registry)
    tx = curvature.kfac(registry, 0.1)

    @jax.jit
    def step(params, state, key):
        value, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params, loss_args=(x, y), key=key)
        return jax.tree.map(jnp.add, params, updates), state, value

    state = tx.init(params)
    values = []
    for i in range(30):
        params, state, value = step(params, state, jax.random.key(i))
        values.append(float(value))
    assert values[-1] < 0.8 * values[0]


def test_on_a_mesh_with_explicit_axes():
    """A sum over an axis that data and weight divide has no type of its own."""
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=kinds)
    spec = jax.sharding.PartitionSpec
    shapes = {"w": (4, 4), "g": (4,), "a": (4, 2), "b": (2, 4), "v": (4, 2)}
    params = {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    x, y = normal(8, 8, 4), normal(9, 8, 2)
    specs = {name: spec() for name in params} | {"w": spec("model", None)}

    def loss_fn(p, x, y, out=None):
        w = p["w"] * p["g"] + p["a"] @ p["b"]
        h = jnp.tanh(jnp.einsum("bi,io->bo", x, w, out_sharding=out))
        return curvature.losses.squared_error(h @ p["v"], y).mean()

    _, expected = operator(loss_fn, params, (x, y))
    with jax.set_mesh(mesh):
        put = jax.tree.map(
            lambda x, s: jax.device_put(x, s), (params, x, y), (specs, *2 * [spec("data")])
        )
        put = (put[0], jax.device_put(x, spec("data", "model")), put[2])
        registry, found = operator(
            lambda *args: loss_fn(*args, out=spec("data", None)), put[0], put[1:]
        )
        assert registry.coverage == 1
        dense = {name: block.to_dense() for name, block in found.blocks.items()}
    for name, block in expected.blocks.items():
        np.testing.assert_allclose(dense[name], block.to_dense(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "model",
    [
        lambda p, x: x * p["w"].sum(),
        lambda p, x: x + p["w"].sum(0),
        lambda p, x: x - p["w"].sum() * p["g"],
        lambda p, x: x * (p["w"] @ p["w"].T).sum(),
        lambda p, x: x @ jnp.cumsum(p["w"], 0),
    ],
)
def test_what_has_no_other_spelling_is_registered_as_ever(model):
    params = {"w": normal(0, 3, 3), "g": normal(1, 3)}
    x, y = normal(8, N, 3), normal(9, N, 3)

    def loss_fn(p, x, y):
        return curvature.losses.squared_error(model(p, x), y).mean()

    registry = curvature.register(loss_fn, params, x, y)
    estimator = curvature.Estimator(registry, curvature.EmpiricalFisher())
    found = estimator.statistics(params, x, y, key=jax.random.key(0))
    assert all(np.isfinite(s).all() for s in jax.tree.leaves(found))
