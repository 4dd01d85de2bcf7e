"""Whole steps inside `shard_map`, `pmap` and `vmap`: with `axis_name`, what one device would do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import half, normal
from jax.sharding import AxisType, PartitionSpec
from test_block_kinds import KINDS

import curvature
from curvature.statistics.factors import factors_of

P = PartitionSpec
N, DEVICES = 8, 4
PARAMS = {
    "w": normal(2, 3, 4),
    "b": normal(3, 4),
    "gain": normal(4, 4),
    "again": normal(5, 4, 4),
    "head": normal(6, 4, 3),
}
X, Y = normal(0, N, 2, 3), jax.random.randint(jax.random.key(1), (N, 2), 0, 3)
MASK = jnp.asarray(np.arange(2 * N).reshape(N, 2) % 5 != 0, float)  # other rows on each device
EMPIRICAL = curvature.EmpiricalFisher()


def loss_fn(p, x, y, mask):
    h = jnp.tanh(x @ p["w"] + p["b"]) * p["gain"]
    h = jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["again"]), None), h, None, length=2)[0]
    losses = curvature.losses.softmax_cross_entropy_with_integer_labels(h @ p["head"], y)
    return (losses * mask).sum(-1).mean()


def averaged_loss(p, x, y, mask):
    """The loss of all devices, as it is written where JAX tracks what varies."""
    return jax.lax.pmean(loss_fn(p, x, y, mask), "i")


BATCH = (X, Y, MASK)
MATRICES = ("w", "again", "head")


def manual_mesh():
    return jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), ("i",))


def explicit_mesh():
    mesh = manual_mesh()
    return jax.sharding.Mesh(mesh.devices, ("i",), axis_types=(AxisType.Explicit,))


def by_shard_map(function, check_vma, mesh=None):
    def run(replicated, batch):
        mapped = jax.shard_map(
            function,
            mesh=mesh or manual_mesh(),
            in_specs=(P(), P("i")),
            out_specs=P(),
            check_vma=check_vma,
        )
        return jax.jit(mapped)(replicated, batch)

    return run


def split(batch):
    return jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), batch)


def first_of_equal(tree):
    """One of the devices' results, which are one."""
    for leaf in jax.tree.leaves(tree):
        np.testing.assert_allclose(leaf, np.broadcast_to(leaf[:1], leaf.shape), rtol=1e-12)
    return jax.tree.map(lambda x: x[0], tree)


def by_pmap(function):
    def run(replicated, batch):
        mapped = jax.pmap(function, axis_name="i", in_axes=(None, 0))
        return first_of_equal(mapped(replicated, split(batch)))

    return run


def by_vmap(function):
    def run(replicated, batch):
        mapped = jax.vmap(function, axis_name="i", in_axes=(None, 0))
        return first_of_equal(jax.jit(mapped)(replicated, split(batch)))

    return run


WAYS = {
    "shard_map": functools.partial(by_shard_map, check_vma=True),
    "shard_map, unchecked": functools.partial(by_shard_map, check_vma=False),
    "pmap": by_pmap,
    "vmap": by_vmap,
}


def close(found, expected, tolerance=1e-8):
    def one(a, b):
        scale = np.abs(np.asarray(b)).max(initial=1e-300)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale)

    jax.tree.map(one, found, expected)


def without_bases(statistics):
    return {
        name: {k: v for k, v in arrays.items() if not k.endswith("basis")}
        for name, arrays in statistics.items()
    }


def run_statistics(loss, kind, blocks, axis_name, params, batch):
    """Of the layers that have a block of the kind; `again` is shared, its factors alone."""
    registry = curvature.register(loss, params, *batch)
    found = {}
    for block in blocks:
        chosen = registry.with_blocks(lambda layer, b=block: b if layer.name in MATRICES else None)
        estimator = curvature.Estimator(chosen, kind, axis_name=axis_name)
        statistics = estimator.statistics(params, *batch, key=jax.random.key(0))
        factors = {x.name: factors_of(x, statistics[x.name]) for x in estimator.layers}
        found[block] = without_bases(factors)
    return found


@functools.cache
def one_device(kind, blocks):
    return jax.jit(lambda p, b: run_statistics(loss_fn, kind, blocks, None, p, b))(PARAMS, BATCH)


def compare_statistics(way, loss, kind, blocks):
    found = WAYS[way](lambda p, b: run_statistics(loss, kind, blocks, "i", p, b))(PARAMS, BATCH)
    close(found, one_device(kind, blocks))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss", [loss_fn, averaged_loss])
def test_statistics_are_those_of_the_whole_batch(loss, way):
    compare_statistics(way, loss, EMPIRICAL, ("kronecker",))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "way", "kind"),
    half([loss_fn, averaged_loss], list(WAYS), [EMPIRICAL, curvature.GaussNewton()]),
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)
def test_statistics_of_all_blocks_are_those_of_the_whole_batch(loss, way, kind):
    compare_statistics(way, loss, kind, KINDS)


VARIANTS = {
    "kfac": functools.partial(curvature.kfac, learning_rate=0.1, damping=0.1, kind=EMPIRICAL),
    "ekfac": functools.partial(curvature.ekfac, learning_rate=0.1, damping=0.1, kind=EMPIRICAL),
    "foof": functools.partial(curvature.foof, learning_rate=0.1, damping=0.1, kind=EMPIRICAL),
    "quadratic model": functools.partial(
        curvature.kfac,
        learning_rate=curvature.QuadraticModel(),
        damping=curvature.LevenbergMarquardt(every=1),
        kind=curvature.GaussNewton(),
        l2=1e-2,
    ),
    "scale_by_curvature": functools.partial(
        curvature.scale_by_curvature, kind=EMPIRICAL, damping=0.1, accumulate=2
    ),
}


def train(make, gradient, axis_name, registry, params, batch):
    tx = make(registry, axis_name=axis_name)
    state = tx.init(params)
    for i in range(3):
        grads = gradient(params, *batch)
        updates, state = tx.update(grads, state, params, loss_args=batch, key=jax.random.key(i))
        params = optax.apply_updates(params, updates)
    return params, state.stats._asdict()


def gradient_of(way, loss):
    """The gradient of the mean loss over devices: for all but `vmap` as the recipe has it."""
    if way == "vmap":
        return lambda *args: jax.lax.pmean(jax.grad(loss)(*args), "i")
    return lambda *args: jax.lax.pmean(jax.grad(averaged_loss)(*args), "i")


@pytest.mark.slow
@pytest.mark.parametrize(("way", "variant"), half(list(WAYS), list(VARIANTS)))
def test_training_is_that_of_one_device(way, variant):
    compare_training(way, variant)


@pytest.mark.parametrize("way", ["shard_map, unchecked"])
def test_kfac_is_that_of_one_device(way):
    compare_training(way, "kfac")


def compare_training(way, variant):
    registry = curvature.register(loss_fn, PARAMS, *BATCH)
    make = VARIANTS[variant]
    expected = jax.jit(functools.partial(train, make, jax.grad(loss_fn), None, registry))
    step = functools.partial(train, make, gradient_of(way, loss_fn), "i", registry)
    found, stats = WAYS[way](step)(PARAMS, BATCH)
    params, there = expected(PARAMS, BATCH)
    close(found, params, 1e-7)
    close(stats["damping"], there["damping"])


# Draws -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_devices_draw_targets_of_their_own(way):
    """Equal examples everywhere: with equal draws the mean over devices would be one of them."""
    batch = jax.tree.map(lambda x: jnp.concatenate([x[:1]] * DEVICES), BATCH)
    registry = curvature.register(loss_fn, PARAMS, *batch)

    def run(axis_name, params, batch):
        estimator = curvature.Estimator(registry, curvature.Fisher(1), axis_name=axis_name)

        def one(key):
            return jnp.trace(estimator.statistics(params, *batch, key=key)["head"]["output"])

        return jax.lax.map(one, jax.random.split(jax.random.key(0), 60))

    one = jax.tree.map(lambda x: x[:1], batch)
    single = jax.jit(functools.partial(run, None))(PARAMS, one)
    found = WAYS[way](functools.partial(run, "i"))(PARAMS, batch)
    np.testing.assert_allclose(found.mean(), single.mean(), rtol=0.3)
    assert found.var() < 0.6 * single.var()  # a quarter of it, on average


# What has to be said ------------------------------------------------------------------------------


def one_step(axis_name, params, batch):
    registry = curvature.register(loss_fn, PARAMS, *BATCH)
    tx = curvature.kfac(registry, 0.1, damping=0.1, kind=EMPIRICAL, axis_name=axis_name)
    grads = jax.lax.pmean(jax.grad(loss_fn)(params, *batch), "i")
    updates, _ = tx.update(grads, tx.init(params), params, loss_args=batch, key=jax.random.key(0))
    return updates


@pytest.mark.parametrize("way", ["shard_map", "shard_map, unchecked", "pmap"])
def test_devices_that_would_drift_apart_are_an_error(way):
    with pytest.raises(ValueError, match=r"inside shard_map or pmap over 'i'.*axis_name='i'"):
        WAYS[way](functools.partial(one_step, None))(PARAMS, BATCH)

    def statistics(params, batch):
        registry = curvature.register(loss_fn, params, *batch)
        return curvature.Estimator(registry, EMPIRICAL)(params, *batch, key=jax.random.key(0))

    with pytest.raises(ValueError, match="drift apart"):
        WAYS[way](statistics)(PARAMS, BATCH)


def test_a_pmap_without_a_name_is_an_error_too():
    registry = curvature.register(loss_fn, PARAMS, *BATCH)
    estimator = curvature.Estimator(registry, EMPIRICAL)

    def statistics(batch):
        return estimator.statistics(PARAMS, *batch, key=jax.random.key(0))

    with pytest.raises(ValueError, match=r"over an axis without a name.*axis_name=\(\)"):
        jax.pmap(statistics)(split(BATCH))


@pytest.mark.parametrize("axis_name", [None, ()])
def test_an_ensemble_stays_apart(axis_name):
    """Seeds under `vmap`, named or not, need no word; under `pmap` there is one for it."""
    registry = curvature.register(loss_fn, PARAMS, *BATCH)
    kind = curvature.Estimator(registry, EMPIRICAL, axis_name=axis_name)

    def trace(params):
        return kind(params, *BATCH, key=jax.random.key(0)).trace()

    seeds = jax.tree.map(lambda x: jnp.stack([x * (1 + i) for i in range(DEVICES)]), PARAMS)
    mapped = jax.pmap(trace, axis_name="i") if axis_name == () else jax.vmap(trace, axis_name="i")
    expected = jax.jit(lambda seeds: jax.lax.map(trace, seeds))(seeds)
    np.testing.assert_allclose(jax.jit(mapped)(seeds), expected, rtol=1e-8)


def test_what_is_the_same_on_all_devices_needs_no_word():
    """The batch is on every device, and JAX knows it."""
    registry = curvature.register(loss_fn, PARAMS, *BATCH)

    def trace(params, batch):
        return curvature.Estimator(registry, EMPIRICAL)(
            params, *batch, key=jax.random.key(0)
        ).trace()

    mapped = jax.shard_map(trace, mesh=manual_mesh(), in_specs=P(), out_specs=P())
    found = jax.jit(mapped)(PARAMS, BATCH)
    np.testing.assert_allclose(found, jax.jit(trace)(PARAMS, BATCH), rtol=1e-10)


def test_an_axis_along_which_the_batch_is_whole_changes_nothing():
    """Two axes, the batch divided over one of them."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("i", "model"))

    def run(axis_name, params, batch):
        return run_statistics(averaged_loss, EMPIRICAL, ("kronecker",), axis_name, params, batch)

    for check_vma in (True, False):
        for axis_name in ("i", ("i", "model")):
            step = functools.partial(run, axis_name)
            found = by_shard_map(step, check_vma, mesh)(PARAMS, BATCH)
            close(found, one_device(EMPIRICAL, ("kronecker",)))


def test_explicit_axes_become_manual_ones():
    mesh = explicit_mesh()
    batch = jax.device_put(BATCH, jax.sharding.NamedSharding(mesh, P("i")))
    params = jax.device_put(PARAMS, jax.sharding.NamedSharding(mesh, P()))
    step = lambda p, b: run_statistics(loss_fn, EMPIRICAL, ("kronecker",), "i", p, b)  # noqa: E731
    found = by_shard_map(step, True, mesh)(params, batch)
    close(found, one_device(EMPIRICAL, ("kronecker",)))


def test_a_name_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match=r"axis_name is \('j',\).*no axis 'j' is in scope"):
        by_vmap(functools.partial(one_step, "j"))(PARAMS, BATCH)
    registry = curvature.register(loss_fn, PARAMS, *BATCH)
    with pytest.raises(TypeError, match=r"axis_name is 3, expected the name of an axis"):
        curvature.kfac(registry, 0.1, axis_name=3)
