"""Steps that are not finite are skipped, refreshes that are not keep the previous inverse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_net import EXACT, REGISTRY, all_close, batch, equal, gradient, parameters, poison

import curvature


def as_large_as_can_be(tree):
    """Finite, but multiplied by anything above 1.1 it is not."""
    largest = max(np.abs(x).max() for x in jax.tree.leaves(tree))
    return jax.tree.map(lambda x: x / largest * 1.7e308, tree)


POISONED = {
    "gradient nan": lambda grads, data: (poison(grads), data),
    "one leaf of the gradient nan": lambda grads, data: ({**grads, "c": poison(grads["c"])}, data),
    "gradient inf": lambda grads, data: (poison(grads, np.inf), data),
    "batch and gradient nan": lambda grads, data: (poison(grads), poison(data)),
    "statistics nan": lambda grads, data: (grads, poison(data)),
    "statistics inf": lambda grads, data: (grads, poison(data, 1e200)),
    "update inf": lambda grads, data: (as_large_as_can_be(grads), data),
}
OPTIMIZERS = {
    "scale_by_curvature": lambda **kwargs: curvature.scale_by_curvature(REGISTRY, EXACT, **kwargs),
    "kfac": lambda **kwargs: curvature.kfac(REGISTRY, 0.01, kind=EXACT, **kwargs),
}


@functools.cache
def optimizer(name, every):
    periods = {"statistics_every": every, "refresh_every": every, "warmup_steps": 0}
    tx = OPTIMIZERS[name](damping=1e-3, **periods)
    return tx, jax.jit(tx.update)


def without_skipped(state):
    curvature_state = getattr(state, "curvature", state)
    stats = curvature_state.stats._replace(skipped=0, idle=0)
    curvature_state = curvature_state._replace(stats=stats)
    if hasattr(state, "curvature"):
        return state._replace(curvature=curvature_state)
    return curvature_state


@pytest.mark.parametrize(
    ("name", "every"), [("scale_by_curvature", 1), ("scale_by_curvature", 2), ("kfac", 2)]
)
@pytest.mark.parametrize("what", POISONED)
def test_a_step_that_is_not_finite_is_skipped(what, name, every):
    """The update is zero, the state as before but for the count; training goes on unharmed."""
    tx, update = optimizer(name, every)

    def run(bad_steps):
        params, out = parameters(), []
        state = tx.init(params)
        for t in range(4):
            data = batch(t)
            grads = gradient(params, data)
            if t in bad_steps:
                bad_grads, bad_data = POISONED[what](grads, data)
                for _ in range(2):
                    zeros, after = update(bad_grads, state, params, loss_args=(bad_data,))
                    assert all(np.all(np.asarray(z) == 0) for z in jax.tree.leaves(zeros))
                    if what != "update inf":  # its statistics are averaged all the same
                        equal(without_skipped(after), without_skipped(state))
                    assert after.stats.skipped == state.stats.skipped + 1
                    state = after
            updates, state = update(grads, state, params, loss_args=(data,))
            params = optax.apply_updates(params, updates)
            assert all(np.any(np.asarray(u) != 0) for u in jax.tree.leaves(updates))
            out.append((params, without_skipped(state)))
        return out, state.stats.skipped

    # Steps 0 and 2 are those in which statistics are taken in either period.
    disturbed, skipped = run({0, 2})
    undisturbed, none = run(set())
    assert (skipped, none) == (4, 0)
    if what != "update inf":
        equal(disturbed, undisturbed)


def test_what_is_finite_is_not_skipped_because_of_its_size():
    """The control: huge but finite gradients and tiny ones pass."""
    tx, update = optimizer("scale_by_curvature", 1)
    params, data = parameters(), batch()
    grads = gradient(params, data)
    plain, _ = update(grads, tx.init(params), params, loss_args=(data,))
    for scale in (1e150, 1e-150):
        scaled = jax.tree.map(lambda g, s=scale: g * s, grads)
        updates, state = update(scaled, tx.init(params), params, loss_args=(data,))
        assert state.stats.skipped == 0
        all_close(jax.tree.map(lambda u, s=scale: u / s, updates), plain)


def test_a_refresh_that_is_not_finite_keeps_the_previous_inverse():
    """Singular factors and no damping at the second step: its Cholesky factor does not exist."""

    def damping(t):
        return jnp.where(t == 1, 0.0, 0.1)

    tx = curvature.scale_by_curvature(REGISTRY, EXACT, damping=damping)
    params, data = parameters(), batch()
    data["x"] = data["x"].at[:, 1].set(0)
    grads = gradient(params, data)
    update = jax.jit(tx.update)
    states, updates = [tx.init(params)], []
    for _ in range(3):
        u, s = update(grads, states[-1], params, loss_args=(data,))
        states.append(s)
        updates.append(u)
    singular = REGISTRY.layers[0].name
    equal(states[2].inverse[singular], states[1].inverse[singular])
    equal(updates[1]["a"], updates[0]["a"])
    assert [s.stats.failed_refreshes for s in states] == [0, 0, 1, 1]
    assert [s.stats.skipped for s in states] == [0, 0, 0, 0]
    assert [s.step for s in states] == [0, 1, 2, 3]
    all_close(updates[2], updates[0])
