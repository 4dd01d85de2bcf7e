"""A generic parameter's reason: what was done to it, and the spelling that is structured."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 2)


X, Y, W, V = normal(0, 8, 6), normal(1, 8, 3), normal(2, 6, 4), normal(3, 4, 3)
SQUARE = normal(4, 6, 6)


def looped(p, x):
    """A `while` whose length depends on the data has no derivative but one of its own."""

    def iterate(w, x):
        more = lambda state: state[1] < x[0, 0]  # noqa: E731
        return jax.lax.while_loop(more, lambda s: (jnp.tanh(s[0] @ w), s[1] + 1), (x, 0.0))[0]

    solve = jax.custom_vjp(iterate)
    solve.defvjp(lambda w, x: (iterate(w, x), (w, x)), lambda kept, g: kept)
    return solve(p["q"], x) @ W


# (how it is published, another spelling, its parameters, what the reason of the first says)
PAIRS = {
    "sliced by data": (
        lambda p, x: x @ p["q"][jnp.argmax(x[0])],
        None,
        {"q": normal(5, 6, 6, 4)},
        "sliced where a value says (dynamic_slice)",
    ),
    "summed up": (
        lambda p, x: x @ jnp.cumsum(p["w"], 0),
        lambda p, x: jnp.cumsum(x[:, ::-1], 1)[:, ::-1] @ p["w"],
        {"w": W},
        "cumsum at test_reasons.py",
    ),
    "inverted": (
        lambda p, x: x @ jnp.linalg.inv(p["q"]) @ W,
        None,
        {"q": SQUARE},
        "at test_reasons.py",
    ),
    "divided by its sum": (
        lambda p, x: x @ jax.nn.softmax(p["w"], 0),
        None,
        {"w": W},
        "then summed over an axis (reduce_sum) at test_reasons.py",
    ),
    "transformed": (
        lambda p, x: jnp.fft.irfft(jnp.fft.rfft(x) * jnp.fft.rfft(p["u"])) @ W,
        None,
        {"u": normal(5, 6)},
        "fft at test_reasons.py",
    ),
    "in a loop with a rule of its own": (
        looped,
        None,
        {"q": SQUARE},
        "passed through a custom_vjp (custom_vjp_call)",
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
