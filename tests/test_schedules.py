"""Averages and periods may be schedules, as rates and damping may."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal

import curvature

pytestmark = pytest.mark.usefixtures("standard_promotion")
PARAMS = {"w": normal(0, 3, 4) / 2, "v": normal(1, 4, 2)}
X, Y = normal(2, 8, 3), normal(3, 8, 2)
RECIPES = {"kfac": curvature.kfac, "eigen_adam": curvature.eigen_adam}
RECIPE = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def loss_fn(params, x, y):
    return curvature.losses.squared_error(jnp.tanh(x @ params["w"]) @ params["v"], y).sum(-1).mean()


REGISTRY = curvature.register(loss_fn, PARAMS, X, Y)


def run(recipe, steps=7, **options):
    """The parameters at the end, and the weight of the averages after every step."""
    tx = recipe(REGISTRY, 0.01, warmup_steps=0, **options)

    @jax.jit
    def step(params, state, key):
        grads = jax.grad(loss_fn)(params, X, Y)
        updates, state = tx.update(grads, state, params, loss_args=(X, Y), key=key)
        return optax.apply_updates(params, updates), state

    params, state, weights = PARAMS, tx.init(PARAMS), []
    for i in range(steps):
        params, state = step(params, state, jax.random.key(i))
        weights.append(curvature.factors(state)["weight"])
    return params, weights


@RECIPE
def test_a_constant_schedule_is_a_number(recipe):
    numbers = {"decay": 0.8, "statistics_every": 2, "refresh_every": 3}
    schedules = {k: optax.constant_schedule(float(v)) for k, v in numbers.items()}
    expected, _ = run(recipe, spread=False, **numbers)
    found, _ = run(recipe, spread=False, **schedules)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), found, expected)


@RECIPE
def test_schedules_are_followed(recipe):
    """Statistics in steps 0, 1, 2 and then every third; the past counts less and less."""
    period = optax.piecewise_constant_schedule(1.0, {3: 3.0})
    decay = optax.piecewise_constant_schedule(0.9, {2: 0.5})
    _, weights = run(recipe, statistics_every=period, decay=decay)
    expected, weight = [], 0.0
    for t in range(7):
        past = 0.9 if t < 2 else 0.45
        if t in (0, 1, 2, 3, 6):
            weight = past * weight + 1 - past
        expected.append(weight)
    np.testing.assert_allclose(weights, expected)


def test_what_cannot_change_is_refused():
    schedule = optax.constant_schedule(3)
    with pytest.raises(ValueError, match=r"refresh_every is a schedule.*spread=False"):
        curvature.kfac(REGISTRY, 0.1, refresh_every=schedule)
    with pytest.raises(ValueError, match=r"refresh_every is a schedule.*spread=False"):
        curvature.eigen_adam(REGISTRY, 0.1, refresh_every=schedule)
    with pytest.raises(ValueError, match=r"accumulate is .*expected a positive integer"):
        curvature.kfac(REGISTRY, 0.1, accumulate=schedule)
