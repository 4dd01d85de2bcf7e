"""`LevenbergMarquardt` stays where factors can be inverted in their precision."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal

import curvature

pytestmark = pytest.mark.usefixtures("standard_promotion")
# Inputs of rank two in 40 dimensions: all other eigenvalues of the input factor are rounding.
X = (normal(0, 64, 2) @ normal(1, 2, 40) * 30).astype(jnp.float32)
Y = (X[:, :3] / 30).astype(jnp.float32)
W = jnp.zeros((40, 3), jnp.float32)


def loss_fn(w, x, y):
    return curvature.losses.squared_error(x @ w, y).sum(-1).mean()


def train(damping, steps=40, **options):
    registry = curvature.register(loss_fn, W, X, Y)
    tx = curvature.kfac(registry, curvature.QuadraticModel(), damping=damping, **options)

    @jax.jit
    def step(w, state, key):
        value, grad = jax.value_and_grad(loss_fn)(w, X, Y)
        updates, state = tx.update(grad, state, w, loss_args=(X, Y), key=key, value=value)
        return optax.apply_updates(w, updates), state

    w, state, dampings = W, tx.init(W), []
    for i in range(steps):
        w, state = step(w, state, jax.random.key(i))
        dampings.append(float(state.stats.damping))
    return loss_fn(w, X, Y), state, dampings


@pytest.mark.parametrize("refresh", [curvature.Cholesky(), curvature.NewtonSchulz()])
def test_no_refresh_fails_however_far_the_damping_could_fall(refresh):
    damping = curvature.LevenbergMarquardt(1e-3, every=1, factor=0.2, minimum=1e-30)
    loss, state, dampings = train(damping, refresh=refresh)
    assert loss < 1e-6
    assert state.stats.failed_refreshes == 0
    # The damped factor is told from a singular one: a float64 of its eigenvalues says so.
    least = min(dampings)
    assert 1e-16 < least < 1e-5
    factors = jax.tree.map(lambda x: x[0], curvature.factors(state)["statistics"]["parameters"])
    a = np.asarray(factors["input"] / factors["rows"], np.float64)
    b = np.asarray(factors["output"] / factors["rows"] * 64, np.float64)
    pi = np.sqrt((np.trace(a) / 40) / (np.trace(b) / 3))
    rounding = np.finfo(np.float32).eps * np.linalg.norm(a)
    assert np.sqrt(least) * pi > 5 * rounding


def test_without_the_floor_refreshes_fail_there():
    """So that the test above can fail: the same damping, given as a number."""
    _, state, _ = train(1e-18, steps=10)
    assert state.stats.failed_refreshes > 0


def test_a_failed_refresh_raises_the_damping(monkeypatch):
    """Without the floor, it climbs to where refreshes succeed."""
    inverses = curvature.optimizer.preconditioner.Inverses
    monkeypatch.setattr(inverses, "smallest_damping", lambda self, s, weight: 0 * weight)
    rule = curvature.LevenbergMarquardt(1e-18, every=5, minimum=1e-30)
    loss, state, dampings = train(rule, steps=60, warmup_steps=0, refresh_every=1)
    assert 0 < state.stats.failed_refreshes < 30
    assert max(dampings) > 1e4 * dampings[0]
    assert loss < 1e-3


def test_the_damping_after_a_failure_is_four_times_as_high_and_bounded():
    rule = curvature.LevenbergMarquardt(1.0, maximum=10.0)
    for after, damping, failed, expected in [
        (0.5, 1.0, True, 4.0),
        (0.5, 1.0, False, 0.5),
        (8.0, 1.0, True, 8.0),
        (4.0, 5.0, True, 10.0),
    ]:
        found = rule.recovered(jnp.asarray(after), jnp.asarray(damping), jnp.asarray(failed))
        assert found == expected
