"""What a whole step costs, counted by the compiler: no more than the sum of what it has to do."""

import jax
import jax.numpy as jnp
import optax
import pytest

import curvature

ROWS, WIDTH, LAYERS, SHARE = 512, 128, 6, 4
LATER = 59 * 17  # a step with statistics, after the first ones
NAMES = [str(i) for i in range(LAYERS)]


def normal(i, *shape):
    return jax.random.normal(jax.random.key(i), shape, jnp.float32)


PARAMS = {name: normal(i, WIDTH, WIDTH) / WIDTH**0.5 for i, name in enumerate(NAMES)}
BATCH = normal(10, ROWS, WIDTH), jnp.arange(ROWS) % WIDTH


def loss_fn(params, x, labels, offsets=None):
    for name in NAMES:
        x = jnp.tanh(x) @ params[name] + (0 if offsets is None else offsets[name])
    return curvature.losses.softmax_cross_entropy_with_integer_labels(x, labels).mean()


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def gradient(params, batch):
    return jax.value_and_grad(loss_fn)(params, *batch)


def passes(params, batch):
    """Forward, and backward to the outputs of every layer."""
    zeros = {name: jnp.zeros((len(batch[0]), WIDTH), jnp.float32) for name in NAMES}
    return jax.grad(lambda offsets: loss_fn(params, *batch, offsets))(zeros)


def on_both_sides(params, matrices):
    return {k: matrices[k] @ v @ matrices[k].T for k, v in params.items()}


def flops_of_step(tx, number):
    """A step whose number and flags are constants, so that what is not due is not compiled."""

    def constant(x):
        return jnp.asarray(number, x.dtype) if x.shape == () and x.dtype != jnp.float32 else x

    def step(params, state, key):
        loss, grads = gradient(params, BATCH)
        state = jax.tree.map(constant, state)
        updates, state = tx.update(grads, state, params, loss_args=BATCH, key=key, value=loss)
        return optax.apply_updates(params, updates), state, loss

    return flops(step, PARAMS, jax.eval_shape(tx.init, PARAMS), jax.random.key(0))


@pytest.mark.parametrize(
    ("recipe", "products"), [(curvature.kfac, 1), (curvature.eigen_adam, 2)], ids=["kfac", "adam"]
)
def test_a_step_with_statistics_costs_its_parts(recipe, products, standard_promotion):
    registry = curvature.register(loss_fn, PARAMS, *BATCH)
    part = jax.tree.map(lambda x: x[: ROWS // SHARE], BATCH)
    grams = 2 * flops(lambda x: [x[k].T @ x[k] for k in NAMES], passes(PARAMS, part))
    always = flops(gradient, PARAMS, BATCH) + products * flops(on_both_sides, PARAMS, PARAMS)
    now_and_then = flops(passes, PARAMS, part) + grams
    tx = recipe(
        registry,
        0.1,
        statistics_batch=1 / SHARE,
        statistics_every=17,
        refresh_every=1000,
        spread=False,
    )
    assert flops_of_step(tx, LATER + 1) <= 1.05 * always
    assert flops_of_step(tx, LATER) <= 1.05 * (always + now_and_then)
    assert now_and_then > 0.1 * always
