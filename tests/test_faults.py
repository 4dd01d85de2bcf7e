"""Whatever a batch brings, parameters stay finite and the state says what happened."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvature

KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {"w": jax.random.normal(KEYS[0], (3, 4)), "b": jnp.zeros(4)}
X, Y = jax.random.normal(KEYS[1], (6, 3)), jax.random.normal(KEYS[2], (6, 4))


def loss_fn(p, x, y):
    return curvature.losses.l2_loss(x @ p["w"] + p["b"], y).sum(-1).mean()


METHODS = {
    "cholesky": curvature.Cholesky(),
    "newton_schulz": curvature.NewtonSchulz(),
    "eigh": curvature.Eigh(),
    "qr": curvature.QR(),
}
RECIPES = {
    **{name: (curvature.kfac, {"refresh": method}) for name, method in METHODS.items()},
    "ekfac": (curvature.ekfac, {}),
    "foof": (curvature.foof, {}),
    "adaptive": (curvature.kfac, {"damping": curvature.LevenbergMarquardt(every=1)}),
}
LARGE = 1e200
SLOW = ("newton_schulz", "qr", "foof")  # the same code as others' but for a few lines
EACH = [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in RECIPES]

# What happens to (parameters, x, y); whether steps are skipped for it.
FAULTS = {
    "nan in the batch": (lambda p, x, y: (p, x.at[0, 0].set(jnp.nan), y), True),
    "inf in the batch": (lambda p, x, y: (p, x.at[0, 0].set(jnp.inf), y), True),
    "nan in the targets": (lambda p, x, y: (p, x, y.at[0, 0].set(jnp.nan)), True),
    "an exploding loss": (lambda p, x, y: (p, x * LARGE, y), True),
    "a batch of zeros": (lambda p, x, y: (p, x * 0, y), False),
    "rank-one factors": (lambda p, x, y: (p, jnp.ones_like(x), y), False),
    "a batch of one": (lambda p, x, y: (p, x[:1], y[:1]), False),
    "zero gradients": (lambda p, x, y: (p, x, x @ p["w"] + p["b"]), False),
}


def train(recipe, fault, steps=4, dtype=None, **options):
    """Good, bad, good, good steps; the parameters and state after each."""
    make, given = RECIPES[recipe]
    params, x, y = jax.tree.map(lambda a: a if dtype is None else a.astype(dtype), (PARAMS, X, Y))
    registry = curvature.register(loss_fn, params, x, y)
    rate = curvature.QuadraticModel() if recipe == "adaptive" else 0.1
    tx = make(
        registry, **{"learning_rate": rate, **given, **options}, statistics_every=1, refresh_every=1
    )
    update, state, out = jax.jit(tx.update), tx.init(params), []
    for t in range(steps):
        _, x_t, y_t = fault(params, x, y) if t == 1 else (params, x, y)
        grads = jax.grad(loss_fn)(params, x_t, y_t)
        updates, state = update(grads, state, params, loss_args=(x_t, y_t), key=jax.random.key(t))
        params = optax.apply_updates(params, updates)
        assert all(np.isfinite(np.asarray(p, float)).all() for p in jax.tree.leaves(params))
        out.append((params, updates, state))
    return out


@pytest.mark.parametrize("recipe", EACH)
@pytest.mark.parametrize("fault", FAULTS)
def test_parameters_stay_finite(fault, recipe):
    spoil, skips = FAULTS[fault]
    history = train(recipe, spoil)
    stats = [state.stats for *_, state in history]
    assert [int(s.skipped) for s in stats] == [0, skips, skips, skips]
    if skips:
        assert not any(np.any(u) for u in jax.tree.leaves(history[1][1]))
    assert all(np.any(u) for u in jax.tree.leaves(history[2][1]))  # training goes on
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(history[-1][2]))


@pytest.mark.parametrize("recipe", [name for name in EACH if name != "adaptive"])
def test_a_learning_rate_of_zero_changes_nothing(recipe):
    for params, updates, state in train(recipe, lambda *args: args, learning_rate=0.0):
        assert not any(np.any(u) for u in jax.tree.leaves(updates))
        np.testing.assert_array_equal(params["w"], PARAMS["w"])
        assert state.stats.skipped == 0 and state.stats.update_norm == 0


@pytest.mark.parametrize("recipe", ["cholesky", "eigh", "ekfac", "adaptive"])
def test_no_damping_and_singular_factors(recipe, standard_promotion):
    """A constant input: its factor has rank one, and nothing is added to it."""
    options = {} if recipe == "adaptive" else {"damping": 0.0}
    ones = lambda p, x, y: (p, jnp.ones_like(x), y)  # noqa: E731
    history = train(recipe, ones, decay=0.0, **options)
    failed = int(history[1][2].stats.failed_refreshes)
    assert failed == (recipe == "cholesky")  # eigenbases have a pseudo-inverse


@pytest.mark.parametrize("recipe", EACH)
def test_float16_overflow_is_skipped(recipe, standard_promotion):
    """What is above 65,504 is infinite in the gradient's dtype; statistics are in float32."""
    spoil = lambda p, x, y: (p, x * jnp.float16(6e4), y)  # noqa: E731
    history = train(
        recipe,
        spoil,
        dtype=jnp.float16,
        damping=0.1 if recipe != "adaptive" else curvature.LevenbergMarquardt(every=1),
    )
    stats = history[-1][2].stats
    assert stats.skipped == 1
    assert all(p.dtype == jnp.float16 for p in jax.tree.leaves(history[-1][0]))


def test_a_long_step_in_float16_is_no_overflow(standard_promotion):
    """Its square would be one."""
    keep = lambda *args: args  # noqa: E731
    ((_, updates, state),) = train(
        "cholesky", keep, 1, dtype=jnp.float16, damping=0.1, learning_rate=1e3, kl_clip=None
    )
    assert state.stats.skipped == 0 and 256 < state.stats.update_norm < 6e4
    assert all(np.isfinite(np.asarray(u, float)).all() for u in jax.tree.leaves(updates))
