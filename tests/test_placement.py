"""Where an optimizer's state lives on a mesh, how large it is, and that a step compiles once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import curvature

KEY = jax.random.key(0)


def problem():
    """Two layers on 2 x 2 devices, their weights and the batch divided."""
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    mesh = jax.sharding.Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params = {"w": jax.random.normal(KEY, (6, 8)), "b": jnp.zeros(8), "v": jnp.ones((8, 4))}
    specs = {"w": P("data", "model"), "b": P(), "v": P("model")}
    params = {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in params.items()}
    x, y = jax.random.normal(KEY, (8, 6)), jnp.arange(8) % 4

    def loss(p, x, y):
        z = jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]
        return curvature.losses.softmax_cross_entropy_with_integer_labels(z, y).mean()

    batch = jax.device_put((x, y), NamedSharding(mesh, P("data")))
    return loss, params, batch, mesh


def recipes(registry, mesh):
    over = NamedSharding(mesh, P(("data", "model")))
    inner = optax.chain(optax.trace(0.9), optax.scale_by_rms(eps=1e-3))
    return {
        "kfac": curvature.kfac(registry, 0.1, refresh_over=over),
        "apart": curvature.kfac(registry, 0.1, refresh_over=over, gather="updates"),
        "ekfac": curvature.ekfac(registry, 0.1, accumulate=2),
        "adaptive": curvature.kfac(
            registry, curvature.QuadraticModel(), damping=curvature.LevenbergMarquardt()
        ),
        "in_eigenbasis": curvature.in_eigenbasis(registry, inner, refresh_over=over),
        "bases apart": curvature.in_eigenbasis(
            registry, inner, refresh_over=over, gather="updates"
        ),
        "chain": optax.chain(curvature.scale_by_curvature(registry), optax.trace(0.9)),
    }


RECIPES = ("kfac", "apart", "ekfac", "adaptive", "in_eigenbasis", "bases apart", "chain")


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_compiles_once_and_leaves_the_state_where_it_is(name):
    loss, params, batch, mesh = problem()
    tx = recipes(curvature.register(loss, params, *batch), mesh)[name]
    places = curvature.state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=places)(params)

    def step(params, state, key):
        value, grads = jax.value_and_grad(loss)(params, *batch)
        updates, state = tx.update(grads, state, params, loss_args=batch, key=key, value=value)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, out_shardings=(jax.tree.map(lambda x: x.sharding, params), places))
    for i in range(3):
        params, state = step(params, state, jax.random.fold_in(KEY, i))
    assert step._cache_size() == 1
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


def test_what_is_like_the_parameters_is_divided_as_they_are():
    loss, params, batch, mesh = problem()
    tx = recipes(curvature.register(loss, params, *batch), mesh)["kfac"]
    places = curvature.state_shardings(tx, params)
    assert {k: s.spec for k, s in places.previous.items()} == {
        "w": P("data", "model"),
        "b": P(),
        "v": P("model"),
    }
    rest = jax.tree.leaves(places.curvature)
    assert all(s.spec == P() for s in rest)
    assert all(s.mesh == mesh for s in rest)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("make", [curvature.kfac, curvature.ekfac, curvature.eigen_adam])
def test_every_device_has_its_share_of_the_state(make):
    """Of a deep net's; what there is of copies beyond the layers is not much."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    params = {f"w{i}": jnp.ones((4, 4)) for i in range(20)}
    params = jax.device_put(params, NamedSharding(mesh, P()))

    def loss(p, x):
        for w in p.values():
            x = jnp.tanh(x @ w)
        return curvature.losses.l2_loss(x).mean()

    x = jax.device_put(jnp.ones((16, 4)), NamedSharding(mesh, P("data")))
    over = NamedSharding(mesh, P("data"))
    registry = curvature.register(loss, params, x)
    tx = make(registry, 0.1, refresh_over=over, gather="updates")
    state = jax.jit(tx.init, out_shardings=curvature.state_shardings(tx, params))(params)
    found = curvature.state_memory(tx, params)
    alone = curvature.state_memory(make(registry, 0.1), params)
    assert alone["statistics"] > 20 * 2 * 4 * 4 * 8
    for part in ("statistics", "inverse", "bases", "inner"):
        assert found.get(part, 0) <= 1.3 * alone.get(part, 0) / 4
    device = jax.devices()[0]
    there = [s for x in jax.tree.leaves(state) for s in x.addressable_shards if s.device == device]
    assert sum(s.data.nbytes for s in there) == found["total"]
    if make is curvature.kfac:  # every device takes its share of what is there: nothing moves

        def step(params, state, x):
            grads = jax.grad(loss)(params, x)
            return tx.update(grads, state, params, loss_args=(x,), key=KEY)

        assert "all-to-all" not in jax.jit(step).lower(params, state, x).compile().as_text()


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("make", [curvature.kfac, curvature.eigen_adam])
def test_statistics_of_every_step_gather_divided_parameters_no_second_time(make):
    """They are in the same pass as the gradient; Adam's program gathers each parameter once."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    over = NamedSharding(mesh, P("data"))
    shapes = {"w": (8, 12), "v": (12, 20), "u": (20, 16)}
    params = {k: jax.random.normal(KEY, shape) for k, shape in shapes.items()}
    params = jax.device_put(params, over)

    def loss(p, x):
        return curvature.losses.l2_loss(jnp.tanh(jnp.tanh(x @ p["w"]) @ p["v"]) @ p["u"]).mean()

    x = jax.device_put(jnp.ones((16, 8)), over)
    registry = curvature.register(loss, params, x)

    def gathered(tx, **extra):
        def step(params, state, x):
            grads = jax.grad(loss)(params, x)
            return tx.update(grads, state, params, **extra)

        places = curvature.state_shardings(tx, params)
        out = jax.tree.map(lambda p: p.sharding, params), places
        state = jax.eval_shape(tx.init, params)
        text = jax.jit(step, out_shardings=out).lower(params, state, x).compile().as_text()
        lines = [
            line.split("all-gather(")[0] for line in text.splitlines() if "all-gather(" in line
        ]
        return {k: sum(f"[{a},{b}]" in line for line in lines) for k, (a, b) in shapes.items()}

    tx = make(registry, 0.1, statistics_every=1, refresh_over=over, gather="updates")
    found = gathered(tx, loss_args=(x,), key=KEY)
    assert found == gathered(optax.adamw(1e-3))
    assert max(found.values()) == 1


@pytest.mark.usefixtures("standard_promotion")
def test_factors_that_devices_cannot_divide_equally_move_no_more_than_whole():
    """Filled up they are dealt without a word between devices; only results are gathered."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    places = NamedSharding(mesh, P("data"))
    params = {f"w{i}": jnp.ones(shape) for i, shape in enumerate([(8, 16), (16, 8)] * 3)}

    def loss(p, x):
        for w in p.values():
            x = jnp.tanh(x @ w)
        return curvature.losses.l2_loss(x).mean()

    params, x = jax.device_put((params, jnp.ones((16, 8))), places)
    tx = curvature.kfac(curvature.register(loss, params, x), 0.1, refresh_over=places)
    out = curvature.state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=out)(params)

    def step(params, state, x):
        return tx.update(jax.grad(loss)(params, x), state, params, loss_args=(x,), key=KEY)

    text = jax.jit(step, out_shardings=(places, out)).lower(params, state, x).compile().as_text()
    assert "cholesky" in text
    assert "all-to-all" not in text and "collective-permute" not in text


@pytest.mark.usefixtures("standard_promotion")
def test_gathering_updates_needs_devices():
    loss, params, batch, _ = problem()
    registry = curvature.register(loss, params, *batch)
    for make in (curvature.kfac, curvature.eigen_adam):
        with pytest.raises(ValueError, match="say over which"):
            make(registry, 0.1, gather="updates")
        with pytest.raises(ValueError, match="expected 'inverses' or 'updates'"):
            make(registry, 0.1, gather="state")


def test_parameters_on_no_mesh_are_refused():
    with pytest.raises(ValueError, match="on no mesh"):
        curvature.state_shardings(optax.adam(0.1), {"w": jnp.ones(2)})


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("divided", [False, True])
def test_memory_is_what_the_state_takes(name, divided):
    loss, params, batch, mesh = problem()
    if not divided:
        params = {k: jnp.asarray(np.asarray(x)) for k, x in params.items()}
    tx = recipes(curvature.register(loss, params, *batch), mesh)[name]
    found = curvature.state_memory(tx, params)
    places = curvature.state_shardings(tx, params) if divided else None
    state = jax.jit(tx.init, out_shardings=places)(params)
    device = jax.devices()[0]
    expected = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(state)
        for shard in leaf.addressable_shards
        if shard.device == device
    )
    assert found.pop("total") == expected
    assert sum(found.values()) == expected
    assert "statistics" in found
