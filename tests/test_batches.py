"""Several batches in one loss: points inside and on a boundary, labelled data and unlabelled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal

import curvature

INSIDE, EDGE = normal(0, 6, 2), normal(1, 4, 2)
PARAMS = {
    "w": normal(2, 2, 5),
    "b": normal(3, 5),
    "v": normal(4, 5, 1),
    "c": normal(5, 1),
}


def net(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] + p["c"]


def laplacian(p, x):
    one = lambda x: net(p, x[None])[0, 0]  # noqa: E731
    return jax.vmap(lambda x: jnp.trace(jax.hessian(one)(x)))(x)[:, None]


def value(p, inside, edge):
    """One net on two batches: squares of what it is inside, and on the boundary."""
    first = curvature.losses.squared_error(net(p, inside) - 1.0).sum(-1)
    second = curvature.losses.squared_error(net(p, edge)).sum(-1)
    return first.mean() + 10.0 * second.mean()


def each(p, inside, edge):
    """The loss of every example of both batches, times the root of its weight."""
    first = 0.5 * (net(p, inside) - 1.0) ** 2
    second = 0.5 * net(p, edge) ** 2
    return first[:, 0] * np.sqrt(1 / 6), second[:, 0] * np.sqrt(10 / 4)


def gradients(p):
    """(examples of both batches, parameters), scaled so that G' G is the empirical Fisher."""
    flat = jax.jacrev(lambda p: jnp.concatenate(each(p, INSIDE, EDGE)))(p)
    return {name: 2 * g.reshape(10, -1) for name, g in flat.items()}


def matrix(op, name):
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    eye = jnp.eye(PARAMS[name].size).reshape(-1, *PARAMS[name].shape)
    return jax.vmap(lambda e: (op @ (zero | {name: e}))[name].ravel())(eye)


def test_every_loss_has_its_batch():
    registry = curvature.register(value, PARAMS, INSIDE, EDGE)
    assert registry.coverage == 1, str(registry)
    assert [loss.examples for loss in registry.losses] == [6, 4]
    assert {layer.batches for layer in registry.layers} == {(6, 4)}


@pytest.mark.parametrize("block", ["dense", "diagonal"])
def test_gradients_of_examples_of_both_batches(block):
    """Exact, though the layers see both: examples of one batch are not those of the other."""
    registry = curvature.register(value, PARAMS, INSIDE, EDGE).with_blocks(block)
    estimate = jax.jit(curvature.Estimator(registry, curvature.EmpiricalFisher()))
    op = estimate(PARAMS, INSIDE, EDGE)
    for name, g in gradients(PARAMS).items():
        expected = g.T @ g
        expected = expected if block == "dense" else np.diag(np.diag(expected))
        np.testing.assert_allclose(matrix(op, name), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("block", ["kronecker", "kronecker_reduce", "ekfac"])
def test_factors_are_sums_over_both_batches(block):
    """Two layers that do not share, one for each batch, have factors that add up to these."""
    registry = curvature.register(value, PARAMS, INSIDE, EDGE).with_blocks(block)
    statistics = jax.jit(curvature.Estimator(registry, curvature.GaussNewton()).statistics)
    found = statistics(PARAMS, INSIDE, EDGE)

    def apart(p, inside, edge):
        first = curvature.losses.squared_error(net(p[0], inside) - 1.0).sum(-1)
        second = curvature.losses.squared_error(net(p[1], edge)).sum(-1)
        return first.mean() + 10.0 * second.mean()

    both = [PARAMS, PARAMS]
    other = curvature.register(apart, both, INSIDE, EDGE).with_blocks(block)
    statistics = jax.jit(curvature.Estimator(other, curvature.GaussNewton()).statistics)
    parts = statistics(both, INSIDE, EDGE)
    for name, arrays in found.items():
        for key in ("input", "output", "rows"):
            expected = sum(x[key] for n, x in parts.items() if n in (f"0/{name}", f"1/{name}"))
            np.testing.assert_allclose(arrays[key], expected, rtol=1e-9, atol=1e-12)


def test_exact_kinds_take_as_many_passes_as_an_example_has_outputs():
    """The boundary is no single example of as many entries as it has points."""
    registry = curvature.register(value, PARAMS, INSIDE, EDGE)
    assert [loss.columns for loss in registry.losses] == [1, 1]


def test_other_sizes_and_shares_of_both_batches():
    registry = curvature.register(value, PARAMS, INSIDE, EDGE)
    estimator = curvature.Estimator(registry, curvature.EmpiricalFisher())
    twice = [jnp.repeat(x, 2, axis=0) for x in (INSIDE, EDGE)]
    whole = jax.jit(estimator.statistics)(PARAMS, INSIDE, EDGE)
    for found in (
        jax.jit(estimator.statistics)(PARAMS, *twice),
        jax.jit(lambda *args: estimator.statistics(*args, share=0.5))(PARAMS, *twice),
    ):
        op, expected = estimator.operator(found), estimator.operator(whole)
        for name in PARAMS:
            np.testing.assert_allclose(
                matrix(op, name), matrix(expected, name), rtol=1e-9, atol=1e-12
            )


@pytest.mark.parametrize("sizes", [(6, 4), (4, 6), (8, 2), (5, 1)])
def test_laplacians_and_values(sizes):
    """A physics-informed net, whose layers are met through second derivatives as well."""
    inside, edge = normal(0, sizes[0], 2), normal(1, sizes[1], 2)

    def loss_fn(p, inside, edge):
        first = curvature.losses.squared_error(laplacian(p, inside) - 1.0).sum(-1)
        return first.mean() + curvature.losses.squared_error(net(p, edge)).sum(-1).mean()

    registry = curvature.register(loss_fn, PARAMS, inside, edge)
    assert registry.coverage == 1, str(registry)
    assert sorted(loss.examples for loss in registry.losses) == sorted(sizes)


def test_three_batches_and_what_is_none():
    """Labelled and unlabelled data, and pairs; weights of classes have no examples."""
    x, u, pairs = normal(0, 6, 2), normal(1, 10, 2), normal(2, 4, 2, 2)
    scale = jnp.ones(3)

    def loss_fn(p, x, u, pairs, scale):
        z = net(p, x) * scale[0]
        difference = net(p, pairs[:, 0]) - net(p, pairs[:, 1])
        return sum(
            curvature.losses.squared_error(out).sum(-1).mean() for out in (z, net(p, u), difference)
        )

    registry = curvature.register(loss_fn, PARAMS, x, u, pairs, scale)
    assert registry.coverage == 1, str(registry)
    assert sorted(loss.examples for loss in registry.losses) == [4, 6, 10]
    assert [b is not None for b in registry.batch] == [True, True, True, False]


def test_batches_that_must_grow_by_as_many_as_they_are():
    """Micro-batches of four: one example more does not divide."""

    def loss_fn(p, inside, edge):
        total = 0.0
        for x in (inside, edge):
            losses = jax.vmap(lambda x: curvature.losses.squared_error(net(p, x)).sum(-1))(
                x.reshape(-1, 2, 2)
            )
            total = total + losses.mean()
        return total

    registry = curvature.register(loss_fn, PARAMS, INSIDE, EDGE)
    assert registry.coverage == 1
    assert all(loss.batch is not None for loss in registry.losses), str(registry)
