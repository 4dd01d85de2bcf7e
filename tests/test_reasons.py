"""A generic parameter's reason: what was done to it, and the spelling that is structured."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / 2


X, Y, W, V = normal(0, 8, 6), normal(1, 8, 3), normal(2, 6, 4), normal(3, 4, 3)
MASK = jnp.arange(24.0).reshape(6, 4) % 2
EXPERT = jnp.array([0, 0, 0, 0, 0, 1, 1, 1])


@jax.custom_vjp
def rounded(w):
    return jnp.round(w * 8) / 8


rounded.defvjp(lambda w: (rounded(w), None), lambda _, g: (g,))


def straight_through(w):
    return w + jax.lax.stop_gradient(rounded(w) - w)


def complex_product(p, x):
    z = jnp.fft.rfft(x)[:, :3] @ jax.lax.complex(p["re"], p["im"])
    return jnp.concatenate([z.real, z.imag], 1)


def real_products(p, x):
    z = jnp.fft.rfft(x)[:, :3]
    a, b = z.real, z.imag
    return jnp.concatenate([a @ p["re"] - b @ p["im"], a @ p["im"] + b @ p["re"]], 1)


def indexed(p, x):
    return jax.lax.scan(lambda h, i: (jnp.tanh(h @ p["q"][i]), None), x, jnp.arange(3))[0] @ W


def scanned(p, x):
    return jax.lax.scan(lambda h, q: (jnp.tanh(h @ q), None), x, p["q"])[0] @ W


def ragged(p, x):
    return jax.lax.ragged_dot(x, p["w"], jnp.array([5, 3], jnp.int32))


def one_hot(p, x):
    return jnp.einsum("bi,eio,be->bo", x, p["w"], jax.nn.one_hot(EXPERT, 2))


def norm(w):
    return jnp.sqrt((w**2).sum(0))


# (as it is published, another spelling, its parameters, what the reason of the first says)
PAIRS = {
    "low rank": (
        lambda p, x: x @ (p["a"] @ p["b"]),
        lambda p, x: (x @ p["a"]) @ p["b"],
        {"a": normal(4, 6, 2), "b": normal(5, 2, 4)},
        "multiplied as a matrix (dot_general) with another parameter",
    ),
    "LoRA": (
        lambda p, x: x @ (W + p["a"] @ p["b"]),
        lambda p, x: x @ W + (x @ p["a"]) @ p["b"],
        {"a": normal(4, 6, 2), "b": normal(5, 2, 4)},
        "multiplied as a matrix (dot_general) with another parameter",
    ),
    "gain": (
        lambda p, x: x @ (p["w"] * p["g"]),
        lambda p, x: (x @ p["w"]) * p["g"],
        {"w": W, "g": jnp.ones(4)},
        "multiplied (mul) with another parameter",
    ),
    "sum of weights": (
        lambda p, x: x @ (p["w"] + p["u"]),
        lambda p, x: x @ p["w"] + x @ p["u"],
        {"w": W, "u": normal(4, 6, 4)},
        "added (add) with another parameter",
    ),
    "sum over an axis": (
        lambda p, x: x @ p["w"].sum(0),
        lambda p, x: jnp.concatenate([x, x], 1) @ p["w"].reshape(12, 4),
        {"w": normal(4, 2, 6, 4)},
        "summed over an axis (reduce_sum)",
    ),
    "repeated": (
        lambda p, x: x @ jnp.repeat(p["w"], 2, 1),
        lambda p, x: jnp.repeat(x @ p["w"], 2, 1),
        {"w": normal(4, 6, 2)},
        "repeated (reshape)",
    ),
    "indexed in a loop": (
        indexed,
        scanned,
        {"q": normal(4, 3, 6, 6)},
        "sliced where a value says (dynamic_slice)",
    ),
    "complex": (
        complex_product,
        real_products,
        {"re": normal(4, 3, 2), "im": normal(5, 3, 2)},
        "made complex (complex)",
    ),
    "ragged": (ragged, one_hot, {"w": normal(4, 2, 6, 4)}, "used in a ragged product"),
    "fake quantisation": (
        lambda p, x: x @ rounded(p["w"]),
        lambda p, x: x @ straight_through(p["w"]),
        {"w": W},
        "passed through a custom_vjp (custom_vjp_call)",
    ),
    "mask": (
        lambda p, x: x @ (p["w"] * MASK),
        None,
        {"w": W},
        "multiplied (mul) at test_reasons.py",
    ),
    "weight norm": (
        lambda p, x: x @ (p["w"] / norm(p["w"])),
        None,
        {"w": W},
        "integer_pow at test_reasons.py",
    ),
    "an elementwise function": (
        lambda p, x: x @ jax.nn.softplus(p["w"]),
        None,
        {"w": W},
        "then multiplied as a matrix (dot_general) at test_reasons.py",
    ),
}


def registered(model, params):
    def loss_fn(p, x, y):
        return curvature.losses.squared_error(jnp.tanh(model(p, x)) @ p["v"], y).mean()

    return curvature.register(loss_fn, params | {"v": V}, X, Y)


@pytest.mark.parametrize("name", PAIRS)
def test_a_reason_says_what_was_done_and_what_is_structured(name, standard_promotion):
    published, other, params, words = PAIRS[name]
    registry = registered(published, params)
    reasons = [layer.reason for layer in registry.layers if not layer.structured]
    assert reasons and all(words in reason for reason in reasons), reasons
    assert all("; structured: " in reason for reason in reasons), reasons
    if other is not None:
        assert registered(other, params).coverage == 1
        np.testing.assert_allclose(published(params, X), other(params, X), atol=1e-12)


@pytest.mark.parametrize(
    "identity", [jax.lax.optimization_barrier, jax.device_put], ids=lambda f: f.__name__
)
def test_what_leaves_values_as_they_are_leaves_layers_as_they_are(identity):
    def model(p, x):
        p = identity(p)
        return (x @ p["w"] + p["b"]) * p["g"]

    def loss_fn(p, x, y, *, model=model):
        return curvature.losses.squared_error(model(p, x), y).mean()

    plain = lambda p, x, y: loss_fn(  # noqa: E731
        p, x, y, model=lambda p, x: (x @ p["w"] + p["b"]) * p["g"]
    )
    params = {"w": normal(4, 6, 3), "b": normal(5, 3), "g": normal(6, 3)}
    found = []
    for loss in (loss_fn, plain):
        registry = curvature.register(loss, params, X, Y)
        assert registry.coverage == 1
        op = curvature.Estimator(registry, curvature.GaussNewton())(params, X, Y)
        found.append({name: block.to_dense() for name, block in op.blocks.items()})
    jax.tree.map(np.testing.assert_allclose, *found)
