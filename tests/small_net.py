"""A net of two layers for tests of optimizers, its data, and comparisons of trees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvature

EXAMPLES = 7
EXACT = curvature.GaussNewton()


def close(actual, expected, tolerance=1e-10):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def all_close(actual, expected, tolerance=1e-10):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(functools.partial(close, tolerance=tolerance), actual, expected)


def equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def net(params, x):
    h = jnp.tanh(x @ params["a"]["w"] + params["a"]["b"])
    return (h * jnp.cumsum(params["s"]) if "s" in params else h) @ params["c"]


def loss_fn(params, batch):
    return curvature.losses.l2_loss(net(params, batch["x"]), batch["y"]).sum(-1).mean()


def parameters(dtype=jnp.float64, generic=False):
    rng = np.random.default_rng(0)
    params = {
        "a": {"w": rng.normal(size=(3, 4)), "b": rng.normal(size=4)},
        "c": rng.normal(size=(4, 2)),
    }
    if generic:
        params["s"] = rng.normal(size=4)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def batch(seed=0, examples=EXAMPLES, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(examples, 3)), rng.normal(size=(examples, 2))
    return {"x": jnp.asarray(x, dtype), "y": jnp.asarray(y, dtype)}


def registered(dtype=jnp.float64, generic=False):
    return curvature.register(loss_fn, parameters(dtype, generic), batch(dtype=dtype))


REGISTRY = registered()
gradient = jax.jit(jax.grad(loss_fn))


def stepper(tx, loss=loss_fn):
    """A jitted training step: (params, state, batch, key) -> (params, state, updates)."""

    @jax.jit
    def step(params, state, batch, key):
        grads = jax.grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params, loss_args=(batch,), key=key)
        return optax.apply_updates(params, updates), state, updates

    return step


def poison(tree, value=np.nan):
    """The tree with one entry of each leaf replaced."""
    return jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(value), tree)
