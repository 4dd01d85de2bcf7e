"""How often the user's loss function is traced."""

import jax
import jax.numpy as jnp
import pytest

import curvature
from curvature import losses

SIZE = 8
PARAMS = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 3))}
BATCH = (jnp.ones((SIZE, 3)), jnp.zeros(SIZE, jnp.int32))
STATE = {"mean": jnp.zeros(4), "as many as examples": jnp.ones(SIZE)}
MOST = 3  # traces beyond the user's own: the loss, a larger batch, the loss after the step


def traced(*, fixed):
    """A loss with model state and a key, perhaps for one size of batch, and how often it ran."""
    calls = []

    def loss(params, state, x, y, key):
        calls.append(x.shape)
        x = x.reshape(SIZE, 3) if fixed else x
        h = jnp.tanh(x @ params["w"] - state["mean"]) * state["as many as examples"].mean()
        h = h * jax.random.bernoulli(key, 0.9, h.shape).astype(h.dtype)
        z = h @ params["v"] + (state["as many as examples"] @ jnp.ones(SIZE))
        return losses.softmax_cross_entropy_with_integer_labels(z, y).mean()

    return loss, calls


RECIPES = {
    "kfac": lambda registry: curvature.kfac(registry, 0.1),
    "adaptive": lambda registry: curvature.kfac(
        registry, curvature.QuadraticModel(), damping=curvature.LevenbergMarquardt(1.0)
    ),
    "eigen_adam": lambda registry: curvature.eigen_adam(registry, 0.1),
    "share": lambda registry: curvature.kfac(registry, 0.1, statistics_batch=0.5),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("fixed", "recipe"),
    [*((False, name) for name in RECIPES), (True, "kfac"), (True, "adaptive")],
)
def test_a_step_traces_the_loss_at_most_three_times_more(fixed, recipe):
    loss, calls = traced(fixed=fixed)
    args = (STATE, *BATCH, jax.random.key(0))
    registry = curvature.register(loss, PARAMS, *args)
    tx = RECIPES[recipe](registry)
    state = tx.init(PARAMS)

    def step(params, state, key):
        value, grads = jax.value_and_grad(loss)(params, *args)
        return tx.update(grads, state, params, loss_args=args, key=key, value=value)

    jax.clear_caches()  # of the traces for registering
    calls.clear()
    jax.jit(step).lower(PARAMS, state, jax.random.key(1))
    assert len(calls) - 1 <= MOST, calls
