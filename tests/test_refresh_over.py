"""Inverses dealt to the devices of a mesh: the update of one device, and a share of the work."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import MODES, entered, make_mesh, put

import curvature
from curvature import _jax
from curvature.optimizer.refresh.schedule import Unit, dealt

DEPTH, WIDTH, STEPS = 5, 4, 3
KEY = jax.random.key(0)


def net():
    """Equal layers, not in a loop, and others of sizes that occur once."""
    keys = iter(jax.random.split(KEY, DEPTH + 4))
    params = {f"w{i}": jax.random.normal(next(keys), (WIDTH, WIDTH)) for i in range(DEPTH)}
    params |= {"first": jax.random.normal(next(keys), (3, WIDTH)), "b": jnp.ones(WIDTH)}
    params["last"] = jax.random.normal(next(keys), (WIDTH, 2))

    def loss(p, x, y):
        h = jnp.tanh(x @ p["first"] + p["b"])
        for i in range(DEPTH):
            h = h + jnp.tanh(h @ p[f"w{i}"])
        return curvature.losses.l2_loss(h @ p["last"], y).mean()

    args = (jax.random.normal(next(keys), (8, 3)), jax.random.normal(next(keys), (8, 2)))
    return loss, params, args


EMPIRICAL = {"kind": curvature.EmpiricalFisher()}
GIVEN = EMPIRICAL | {"damping": 0.1, "warmup_steps": 1, "refresh_every": 2}
INNER = optax.chain(optax.trace(0.9), optax.scale_by_rms(eps=1e-3))
RECIPES = {
    "cholesky": lambda r, **o: curvature.kfac(r, 0.1, **GIVEN, **o),
    "newton-schulz": lambda r, **o: curvature.kfac(
        r, 0.1, **GIVEN, refresh=curvature.NewtonSchulz(), **o
    ),
    "ekfac": lambda r, **o: curvature.ekfac(r, 0.1, **GIVEN, **o),
    "qr": lambda r, **o: curvature.kfac(r, 0.1, **GIVEN, refresh=curvature.QR(), **o),
    # Linear, so that it does not depend on what a basis of a null space is.
    "shampoo": lambda r, **o: optax.chain(
        curvature.in_eigenbasis(r, optax.trace(0.9), curvature.Shampoo(), **o), optax.scale(-0.1)
    ),
    "in_eigenbasis": lambda r, **o: optax.chain(
        curvature.in_eigenbasis(r, INNER, EMPIRICAL["kind"], warmup_steps=1, **o), optax.scale(-0.1)
    ),
}


def trained(recipe, loss, params, args, **options):
    tx = RECIPES[recipe](curvature.register(loss, params, *args), **options)

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss)(params, *args)
        return tx.update(grads, state, params, loss_args=args)

    state = tx.init(params)
    for _ in range(STEPS):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    return params


def marks(i, j, gather):
    """Two of all are quick; of the rest a third is not exhaustive, each recipe among it."""
    if (i, j) == (0, 0):
        return ()
    usual = i % 3 == j and (gather == "updates" or i < 3)
    return pytest.mark.slow if usual else (pytest.mark.slow, pytest.mark.exhaustive)


@pytest.mark.parametrize(
    ("recipe", "mode", "gather"),
    [
        pytest.param(recipe, mode, gather, marks=marks(i, j, gather))
        for i, recipe in enumerate(RECIPES)
        for j, mode in enumerate(MODES)
        for gather in ("inverses", "updates")
    ],
)
def test_training_is_that_of_one_device(recipe, mode, gather):
    loss, params, args = net()
    expected = trained(recipe, loss, params, args)
    mesh = make_mesh(mode)
    over = NamedSharding(mesh, P(("data", "model")))
    params, args = put(mesh, (params, args), (P(), P("data")))
    with entered(mode, mesh):
        found = trained(recipe, loss, params, args, refresh_over=over, gather=gather)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)


def factorised(jaxpr):
    """The batches of matrices that go through Cholesky, by their size.

    A CPU does one after the other, in a loop that is an alternative to the batched call.
    """
    found = []
    for equation in jaxpr.equations:
        if equation.primitive.name == "scan":
            continue
        if equation.primitive.name == "cholesky":
            *batch, size, _ = equation.invars[0].aval.shape
            found.append((size, math.prod(batch)))
        for inner in _jax.nested(equation):
            found += factorised(inner)
    return found


@pytest.mark.parametrize(("axes", "devices"), [("data", 2), (("data", "model"), 4)])
@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("gather", ["inverses", "updates"])
def test_each_device_factorises_its_share(axes, devices, turns, gather):
    loss, params, args = net()
    registry = curvature.register(loss, params, *args)
    over = NamedSharding(make_mesh("auto"), P(axes))
    gradient = jax.grad(loss)(params, *args)

    def calls(**options):
        tx = curvature.scale_by_curvature(registry, refresh_every=turns, **EMPIRICAL, **options)

        def update(state):
            return tx.update(gradient, state, params, loss_args=args)

        jaxpr, _ = _jax.trace(update, tx.init(params))
        sizes = {}
        for size, count in factorised(jaxpr):
            sizes[size] = sizes.get(size, 0) + count
        return sizes

    for size, count in calls().items():
        assert calls(refresh_over=over, gather=gather)[size] <= math.ceil(count / devices) + 1


def test_a_window_has_something_for_every_device():
    layer = curvature.register(*net()[:2], *net()[2]).layers[0]
    for copies, turns, devices in [(3, 3, 4), (5, 3, 4), (9, 2, 4), (48, 10, 8), (100, 3, 8)]:
        (window,) = dealt([Unit(layer, ("input",), copies, 8)], turns, devices)
        assert window.size == copies or window.size % devices == 0
        starts = [start for start in window.starts if start >= 0]
        seen = {start + i for start in starts for i in range(window.size)}
        assert seen == set(range(copies))
        each = math.ceil(window.size / devices)
        assert len(starts) * each <= math.ceil(copies / devices) + each


@pytest.mark.parametrize("over", ["data", P("data"), "unsharded"])
def test_what_is_no_sharding_is_refused_at_once(over):
    loss, params, args = net()
    registry = curvature.register(loss, params, *args)
    over = NamedSharding(make_mesh("auto"), P()) if over == "unsharded" else over
    for recipe in (RECIPES["cholesky"], RECIPES["in_eigenbasis"]):
        with pytest.raises(ValueError, match="refresh_over"):
            recipe(registry, refresh_over=over)
