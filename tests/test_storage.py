"""Inverses and bases kept in half of the memory."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvature

pytestmark = pytest.mark.usefixtures("library_defaults")
EIGEN = ("eigen_adam", "in_eigenbasis")
SIZES = (6, 8, 5, 3)


def loss_fn(params, x, y):
    for w in params[:-1]:
        x = jnp.tanh(x @ w)
    return curvature.losses.softmax_cross_entropy_with_integer_labels(x @ params[-1], y).mean()


def problem():
    keys = jax.random.split(jax.random.key(0), 5)
    params = [
        jax.random.normal(k, s) / s[0] ** 0.5
        for k, s in zip(keys, itertools.pairwise(SIZES), strict=False)
    ]
    x = jax.random.normal(keys[3], (64, SIZES[0]))
    return params, (x, jax.random.randint(keys[4], (64,), 0, SIZES[-1]))


def trained(make, steps, **options):
    """Parameters, state, and the first update."""
    params, args = problem()
    tx = make(curvature.register(loss_fn, params, *args), **options)

    @jax.jit
    def step(params, state, key):
        grads = jax.grad(loss_fn)(params, *args)
        updates, state = tx.update(grads, state, params, loss_args=args, key=key)
        return optax.apply_updates(params, updates), state, updates

    state, first = jax.jit(tx.init)(params), None
    for i in range(steps):
        params, state, updates = step(params, state, jax.random.key(i))
        first = updates if first is None else first
    return params, state, first


RECIPES = {
    "kfac": lambda r, **o: curvature.kfac(r, 0.1, **o),
    "ekfac": lambda r, **o: curvature.ekfac(r, 0.1, **o),
    "Eigh": lambda r, **o: curvature.kfac(r, 0.1, refresh=curvature.Eigh(), **o),
    "NewtonSchulz": lambda r, **o: curvature.kfac(r, 0.1, refresh=curvature.NewtonSchulz(), **o),
    "scale_by_curvature": lambda r, **o: optax.chain(
        curvature.scale_by_curvature(r, **o), optax.scale(-0.1)
    ),
    "eigen_adam": lambda r, **o: curvature.eigen_adam(r, 0.03, **o),
    "in_eigenbasis": lambda r, **o: optax.chain(
        curvature.in_eigenbasis(r, optax.scale_by_adam(), **o), optax.scale(-0.03)
    ),
}


def kept(state, name):
    """What is in bfloat16, and what should be."""
    found = optax.tree_utils.tree_get(state, "bases" if name in EIGEN else "inverse")
    return jax.tree.leaves(found)


@pytest.mark.parametrize("name", RECIPES)
def test_training_is_about_the_same_and_the_state_is_half(name):
    make, (_, args) = RECIPES[name], problem()
    full, state, first = trained(make, 30)
    half, small, rounded = trained(make, 30, storage_dtype=jnp.bfloat16)
    assert {x.dtype.name for x in kept(small, name)} == {"bfloat16"}
    assert sum(x.nbytes for x in kept(small, name)) * 2 == sum(x.nbytes for x in kept(state, name))
    statistics = optax.tree_utils.tree_get(small, "statistics")
    assert {x.dtype.name for x in jax.tree.leaves(statistics)} == {"float32"}
    apart, size = (
        optax.tree_utils.tree_norm(x) for x in (jax.tree.map(jnp.subtract, rounded, first), first)
    )
    most = 0.2 if name in EIGEN else 0.02  # Adam's first step is as long wherever it goes
    assert 1e-5 < apart / size < most
    before, a, b = (float(loss_fn(p, *args)) for p in (problem()[0], full, half))
    assert a < 0.8 * before and abs(a - b) < 0.1 * a


def test_what_is_applied_is_the_rounded_inverse():
    """Against numpy: the two inverses of the damped factors of one layer, rounded."""
    x = jax.random.normal(jax.random.key(1), (32, 4)) * jnp.array([1.0, 2.0, 0.5, 3.0])
    y, params = jnp.ones((32, 2)), {"w": jnp.ones((4, 2)) / 3}

    def squares(params, x, y):
        return curvature.losses.l2_loss(x @ params["w"], y).mean(0).sum()

    registry = curvature.register(squares, params, x, y)
    how = {"damping": 0.1, "decay": 0.0, "storage_dtype": jnp.bfloat16}
    tx = curvature.scale_by_curvature(registry, curvature.GaussNewton(), **how)
    gradient = jax.grad(squares)(params, x, y)
    update, _ = jax.jit(tx.update)(gradient, tx.init(params), params, loss_args=(x, y))
    a, b = np.asarray(x, np.float64).T @ np.asarray(x, np.float64) / 32, np.eye(2)
    pi = np.sqrt((np.trace(a) / 4) / (np.trace(b) / 2))
    inverses = [
        jnp.asarray(np.linalg.inv(m + s * np.sqrt(0.1) * np.eye(len(m)))).astype(jnp.bfloat16)
        for m, s in ((a, pi), (b, 1 / pi))
    ]
    left, right = (np.asarray(m, np.float64) for m in inverses)
    expected = left @ np.asarray(gradient["w"], np.float64) @ right
    np.testing.assert_allclose(update["w"], expected, rtol=1e-5)


def test_bases_do_not_drift_from_orthogonal_ones():
    _, state, _ = trained(RECIPES["eigen_adam"], 60, storage_dtype=jnp.bfloat16, refresh_every=1)
    for basis in kept(state, "eigen_adam"):
        q = np.asarray(basis, np.float32)
        np.testing.assert_allclose(q.swapaxes(1, 2) @ q, np.eye(q.shape[-1])[None], atol=2e-2)


def test_memory_is_known_before():
    params, args = problem()
    registry = curvature.register(loss_fn, params, *args)
    tx = curvature.kfac(registry, 0.1, storage_dtype=jnp.bfloat16)
    state = tx.init(params)
    inverse = jax.tree.leaves(optax.tree_utils.tree_get(state, "inverse"))
    assert curvature.state_memory(tx, params)["inverse"] == sum(x.nbytes for x in inverse)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.int32, "half a float"])
@pytest.mark.parametrize("name", ["kfac", "eigen_adam"])
def test_what_cannot_keep_an_inverse_is_refused(name, dtype):
    params, args = problem()
    with pytest.raises(ValueError, match=r"storage_dtype is .* expected None"):
        RECIPES[name](curvature.register(loss_fn, params, *args), storage_dtype=dtype)
