"""Examples a few at a time: sums and results are those of all of them, also over devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, normal
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import curvature
from curvature.statistics import rows
from curvature.statistics.chunks import map_over_examples, sum_over_examples

BLOCKS = ("kronecker", "kronecker_reduce", "kronecker_weighted", "ekfac", "diagonal")


@pytest.mark.parametrize("examples", [1, 7, 12, 13])
@pytest.mark.parametrize("most", [0, 1, 4, 5, 100])
def test_results_are_those_of_all_examples(examples, most):
    x, y, sizes = normal(0, examples, 3), normal(1, examples, 2), []

    def outer(x, y):
        sizes.append(len(x))
        return jnp.einsum("ni,nj->nij", x, y)

    whole = outer(x, y)
    np.testing.assert_array_equal(map_over_examples(outer, most, x, y), whole)
    found = sum_over_examples(lambda x, y: outer(x, y).sum(axis=0), most, x, y)
    np.testing.assert_allclose(found, whole.sum(axis=0), rtol=1e-12)
    assert max(sizes[1:]) <= max(1, min(most, examples))


@pytest.mark.parametrize(("examples", "most", "size"), [(32, 7, 4), (96, 10, 8), (1797, 199, 199)])
def test_chunks_are_even_where_that_does_not_make_them_much_smaller(examples, most, size):
    sizes = []

    def total(x):
        sizes.append(len(x))
        return x.sum(axis=0)

    sum_over_examples(total, most, jnp.ones((examples, 1)))
    assert sizes[0] == size


@pytest.mark.parametrize("name", ["conv 2d grouped", "shared conv"])
def test_convolutions_in_chunks_have_the_statistics_of_all_images(name, monkeypatch):
    loss_fn, params, x = shared_conv() if name == "shared conv" else of_case(name)
    registry = curvature.register(loss_fn, params, x)

    def statistics():
        found = {}
        for block in BLOCKS:
            blocked = registry.with_blocks(lambda layer, b=block: b)
            estimator = curvature.Estimator(blocked, curvature.EmpiricalFisher())
            found[block] = estimator(params, x) @ params
        return found

    expected = statistics()
    monkeypatch.setattr(rows, "_CACHED", 0)
    for block, product in statistics().items():
        for name, found in product.items():
            np.testing.assert_allclose(found, expected[block][name], 1e-8, 1e-11, err_msg=block)


def of_case(name):
    params, x, model, *_ = CASES[name]()
    targets = normal(9, *model(params, x).shape)
    return lambda p, x: curvature.losses.l2_loss(model(p, x), targets).mean(), params, x


def shared_conv():
    """A convolution of two frames of every example, with the same kernel."""
    params = {"w": normal(0, 2, 2, 2, 3)}

    def loss_fn(p, x):
        z = convolved(x.reshape((-1, *x.shape[2:])), p["w"])
        return curvature.losses.l2_loss(z.reshape((len(x), -1)), None).mean()

    return loss_fn, params, normal(1, 6, 2, 4, 4, 2)


def convolved(x, w):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)


@pytest.mark.parametrize("entries", [0, rows._CACHED])
@pytest.mark.parametrize("block", ["kronecker", "kronecker_reduce"])
def test_devices_keep_their_images(block, entries, monkeypatch):
    """Data-parallel, factors are sums over devices: no image and no patch goes to another."""
    monkeypatch.setattr(rows, "_CACHED", entries)
    params = {"first": normal(0, 2, 2, 3, 4), "last": normal(1, 4, 2)}

    def loss_fn(p, x):
        h = jnp.tanh(convolved(x, p["first"])).mean(axis=(1, 2))
        return curvature.losses.l2_loss(h @ p["last"], None).mean()

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.device_put(normal(2, 32, 6, 6, 3), NamedSharding(mesh, PartitionSpec("data")))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    registry = curvature.register(loss_fn, params, x).with_blocks(lambda layer: block)
    estimator = curvature.Estimator(registry, curvature.EmpiricalFisher())
    text = jax.jit(estimator.statistics).lower(params, x).compile().as_text()
    assert "all-reduce" in text
    assert not re.findall(r"all-gather|all-to-all|collective-permute", text)


@pytest.mark.parametrize("block", ["kronecker", "ekfac"])
def test_chunks_inside_shard_map(block, monkeypatch):
    params = {"w": normal(0, 2, 2, 3, 4)}
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def mean(p, x):
        z = jnp.tanh(convolved(x, p["w"])).mean(axis=(1, 2))
        return jax.lax.pmean(curvature.losses.l2_loss(z, None).mean(), "data")

    specs = PartitionSpec(), PartitionSpec("data")
    loss_fn = jax.shard_map(mean, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    x = normal(1, 32, 4, 4, 3)
    registry = curvature.register(loss_fn, params, x).with_blocks(lambda layer: block)
    estimator = curvature.Estimator(registry, curvature.EmpiricalFisher())
    expected = estimator(params, x) @ params
    monkeypatch.setattr(rows, "_CACHED", 0)
    found = estimator(params, x) @ params
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-8, atol=1e-11)
