"""A loss inside `shard_map`: the layers are found, the statistics are those of the whole batch."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from jax.sharding import Mesh, PartitionSpec

import curvature

P = PartitionSpec
X, Y = normal(0, 8, 3), normal(1, 8, 2)
PARAMS = {
    "w": normal(2, 3, 4),
    "b": normal(3, 4),
    "gain": normal(4, 4),
    "again": normal(5, 4, 4),
    "head": normal(6, 4, 2),
    "odd": normal(7, 2),
}
EXACT = curvature.GaussNewton()


def net(p, x):
    h = jnp.tanh(x @ p["w"] + p["b"]) * p["gain"]
    h = jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["again"]), None), h, None, length=2)[0]
    return h @ p["head"] + jnp.cumsum(p["odd"])


def loss_fn(p, x, y):
    return curvature.losses.l2_loss(net(p, x), y).mean()


def mesh():
    return Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))


def sharded(check_vma=True):
    """The same loss on a mesh of 2 x 2 devices, the batch divided over one of its axes."""
    return jax.shard_map(
        lambda p, x, y: jax.lax.pmean(loss_fn(p, x, y), "data"),
        mesh=mesh(),
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )


@pytest.mark.parametrize("check_vma", [True, False])
def test_blocks_of_every_kind_are_those_of_the_whole_batch(check_vma):
    """EKFAC's corrections are in the basis of all devices' factors."""
    one = curvature.register(loss_fn, PARAMS, X, Y)
    many = curvature.register(sharded(check_vma), PARAMS, X, Y)
    kinds = ("ekfac", "kronecker_reduce", "kronecker_weighted", "foof", "identity")
    kind, key = curvature.EmpiricalFisher(), jax.random.key(0)

    @jax.jit
    def matrices(params, x, y):
        found = [
            [curvature.Estimator(r.with_blocks(b), kind)(params, x, y, key=key) for b in kinds]
            for r in (one, many)
        ]
        # "again" is shared: its per-example sums are those of both devices, as if of one example.
        return [
            [op.blocks[name].to_dense() for op in ops for name in ("w", "head")] for ops in found
        ]

    for expected, found in zip(*matrices(PARAMS, X, Y), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("kind", [EXACT, curvature.EmpiricalFisher()], ids=str)
def test_statistics_are_those_of_the_whole_batch(kind, check_vma):
    one = curvature.register(loss_fn, PARAMS, X, Y)
    many = curvature.register(sharded(check_vma), PARAMS, X, Y)
    assert many.batch_found
    assert [(x.name, x.kind) for x in many.layers] == [(x.name, x.kind) for x in one.layers]
    one, many = (r.override("head", block="diagonal") for r in (one, many))
    expected = jax.jit(curvature.Estimator(one, kind))(PARAMS, X, Y, key=jax.random.key(0))
    found = jax.jit(curvature.Estimator(many, kind))(PARAMS, X, Y, key=jax.random.key(0))
    for name in ("w", "gain", "again", "head"):  # "odd" is generic: random
        pairs = zip(
            jax.tree.leaves(found.blocks[name]), jax.tree.leaves(expected.blocks[name]), strict=True
        )
        for a, b in pairs:
            np.testing.assert_allclose(a, b, rtol=1e-10)


@pytest.mark.parametrize("check_vma", [True, False])
def test_what_is_summed_over_examples_is_unbiased(check_vma):
    """Devices draw signs of their own: 400 draws against the exact diagonal."""
    registry = curvature.register(sharded(check_vma), PARAMS, X, Y)
    registry = registry.override("again", block="diagonal")
    estimator = curvature.Estimator(registry, EXACT)

    def draw(key):
        statistics = estimator.statistics(PARAMS, X, Y, key=key)
        return {name: statistics[name]["values"] for name in ("odd", "again")}

    keys = jax.random.split(jax.random.key(0), 400)
    draws = jax.jit(lambda keys: jax.lax.map(draw, keys))(keys)
    jacobian = jax.jit(jax.jacrev(lambda p: net(p, X).ravel()))(PARAMS)
    for name, values in draws.items():
        exact = jnp.square(jacobian[name]).sum(0) / 16
        error = values.std(0) / np.sqrt(len(keys))
        assert np.all(np.abs(values.mean(0) - exact) < 4 * error + 1e-12)
        assert np.any(error > 0)


def test_gains_of_divided_nodes_are_squared_once_they_are_summed_over_devices():
    """Two graphs in nodes without a batch axis: a draw is the square of one sum or difference."""
    params = {"gain": PARAMS["gain"][:3], "t": jnp.asarray(0.8)}
    pooling, devices = normal(8, 8, 2), Mesh(np.array(jax.devices()), ("data",))

    def parts(p, nodes, pooling):
        h = jnp.sin(nodes * jnp.exp(p["gain"]) * p["t"])
        return jax.lax.psum(jnp.einsum("nd,ng->gd", h, pooling), "data")

    def per_graph(p, nodes, pooling):
        specs = (P(), P("data"), P("data"))
        z = jax.shard_map(parts, mesh=devices, in_specs=specs, out_specs=P())(p, nodes, pooling)
        return curvature.losses.squared_error(z, jnp.full_like(z, 0.3)).sum(-1)

    registry = curvature.register(lambda *a: per_graph(*a).sum(), params, X, pooling)
    assert {layer.kind for layer in registry.layers} == {"scale"}
    estimator = curvature.Estimator(registry, curvature.EmpiricalFisher())
    draw = jax.jit(lambda key: estimator.statistics(params, X, pooling, key=key))
    drawn = [draw(key) for key in jax.random.split(jax.random.key(0), 8)]
    each = jax.jit(jax.jacobian(per_graph))(params, X, pooling)
    for name in params:
        one, two = each[name]
        squares = jnp.stack([(one + two) ** 2, (one - two) ** 2])
        found = jnp.stack([d[name]["values"] for d in drawn])
        which = jnp.isclose(found[:, None], squares, rtol=1e-8).reshape(8, 2, -1).all(-1)
        assert which.any(0).all() and which.any(1).all()


def positions(examples):
    """Pooled positions, divided over devices, and examples over other ones where they are named."""
    params = {name: PARAMS[name] for name in ("w", "b", "gain", "head")}
    params["shift"] = normal(10, 4)
    devices = mesh()

    def pooled(p, x):
        h = jnp.tanh(x @ p["w"] + p["b"]) * p["gain"] + p["shift"] * x[..., :1]
        return h.sum(1)

    def divided(p, x):
        parts = lambda p, x: jax.lax.psum(pooled(p, x), "data")  # noqa: E731
        specs = (P(), P(examples, "data"))
        return jax.shard_map(parts, mesh=devices, in_specs=specs, out_specs=P(examples))(p, x)

    def per_example(net):
        def losses(p, x):
            z = net(p, x) @ p["head"]
            return curvature.losses.squared_error(z, jnp.zeros_like(z)).sum(-1)

        return losses

    return per_example(pooled), per_example(divided), params, normal(9, 4, 6, 3)


@pytest.mark.parametrize("block", ["diagonal", "kronecker", "kronecker_reduce", "ekfac"])
def test_positions_of_an_example_divided_over_devices(block):
    """Sequence parallelism: an example's gradient is the sum of what devices have of it."""
    *both, params, x = positions(None)

    def operator(losses):
        registry = curvature.register(lambda *a: losses(*a).mean(), params, x).with_blocks(block)
        return jax.jit(curvature.Estimator(registry, curvature.EmpiricalFisher()))(params, x)

    expected, found = map(operator, both)
    for name, one in expected.blocks.items():
        np.testing.assert_allclose(found.blocks[name].to_dense(), one.to_dense(), rtol=1e-9)


def test_positions_and_examples_divided_over_devices():
    """A draw is the square of the sum over examples, with a sign for each."""
    losses, divided, params, x = positions("model")
    registry = curvature.register(lambda *a: divided(*a).sum(), params, x)
    estimator = curvature.Estimator(registry, curvature.EmpiricalFisher())
    draw = jax.jit(lambda key: estimator.statistics(params, x, key=key))
    signs = jnp.array([[1.0, *s] for s in itertools.product((1, -1), repeat=3)])
    each = jax.jit(jax.jacobian(losses))(params, x)
    for key in jax.random.split(jax.random.key(0), 4):
        found = draw(key)
        for name in ("gain", "shift"):
            sums = jnp.square(signs @ each[name])
            assert jnp.isclose(found[name]["values"], sums, rtol=1e-9).all(-1).any()


@pytest.mark.parametrize("fixed", [True, False])
def test_devices_that_take_their_examples_from_the_whole_batch(fixed):
    """Not by the mesh, but by their index: examples of different devices are not added up."""
    devices, params = Mesh(np.array(jax.devices()[:2]), ("data",)), {"gain": PARAMS["gain"][:3]}
    x = normal(9, 4, 5, 3)

    def losses(p, x):
        z = jnp.sin(x * p["gain"]).sum(1)
        return curvature.losses.squared_error(z, jnp.zeros_like(z)).sum(-1)

    def part(p, x):
        number = 2 if fixed else x.shape[0] // 2
        mine = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("data") * number, number)
        return jax.lax.psum(losses(p, mine).sum(), "data")

    loss_fn = jax.shard_map(part, mesh=devices, in_specs=(P(), P()), out_specs=P())
    estimator = curvature.Estimator(
        curvature.register(loss_fn, params, x), curvature.EmpiricalFisher()
    )
    draw = jax.jit(lambda key: estimator.statistics(params, x, key=key)["gain"]["values"])
    signs = jnp.array([[1.0, *s] for s in itertools.product((1, -1), repeat=3)])
    each = jax.jit(jax.jacobian(losses))(params, x)["gain"]
    sums = jnp.square(signs @ each)
    drawn = jnp.stack([draw(key) for key in jax.random.split(jax.random.key(0), 8)])
    signed = jnp.isclose(drawn[:, None], sums, rtol=1e-9).all(-1).any(1)
    exact = jnp.isclose(drawn, jnp.square(each).sum(0), rtol=1e-9).all(-1)
    assert (signed | exact).all()


def test_samples_of_different_devices_differ():
    """Equal examples on both devices: equal samples would double the variance of the mean."""
    x, y = (jnp.concatenate([a[:1]] * 2) for a in (X, Y))
    registry = curvature.register(sharded(), PARAMS, x, y)
    estimator = curvature.Estimator(registry, curvature.Fisher(1))
    keys = jax.random.split(jax.random.key(0), 200)

    def trace(key):
        return jnp.trace(estimator.statistics(PARAMS, x, y, key=key)["head"]["output"])

    traces = jax.jit(lambda keys: jax.lax.map(trace, keys))(keys)
    # A mean over 4 units of chi-square variables: variance 2/4 each way, 1 if pairs were equal.
    np.testing.assert_allclose(traces.mean(), 1, atol=0.2)
    assert 0.3 < traces.var() < 0.75


def test_one_step_of_kfac_with_a_mesh():
    registry = curvature.register(sharded(), PARAMS, X, Y)
    tx = curvature.kfac(registry, 0.1)

    @jax.jit
    def step(params, key):
        grads = jax.grad(sharded())(params, X, Y)
        return tx.update(grads, tx.init(params), params, loss_args=(X, Y), key=key)[0]

    updates = step(PARAMS, jax.random.key(0))
    assert all(bool(jnp.all(jnp.isfinite(u)) & jnp.any(u != 0)) for u in jax.tree.leaves(updates))


def test_parameters_that_are_divided_have_a_block_for_each_part():
    specs = dict.fromkeys(PARAMS, P()) | {
        "w": P(None, "model"),
        "b": P("model"),
        "gain": P("model"),
    }

    def local(p, x, y):
        h = jnp.tanh(x @ p["w"] + p["b"]) * p["gain"]
        h = jax.lax.all_gather(h, "model", axis=1, tiled=True)
        losses = curvature.losses.l2_loss(h @ p["head"], y)
        return jax.lax.pmean(losses.mean(), ("data", "model"))

    loss = jax.shard_map(local, mesh=mesh(), in_specs=(specs, P("data"), P("data")), out_specs=P())
    registry = curvature.register(loss, PARAMS, X, Y)
    stacks = {layer.name: layer.stack for layer in registry.layers}
    assert stacks["head"] == () and stacks["w"] == stacks["gain"] == (2,), registry
    estimator = curvature.Estimator(registry)
    statistics = jax.jit(estimator.statistics)(PARAMS, X, Y, key=jax.random.key(0))
    assert all(bool(jnp.all(jnp.isfinite(s))) for s in jax.tree.leaves(statistics))
