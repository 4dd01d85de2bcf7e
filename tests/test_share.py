"""Statistics of a share of the examples stand for those of all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import curvature
from curvature import losses
from curvature.statistics.share import examples_of
from curvature.trace.layouts import Batch

KEY = jax.random.key(0)
PARAMS = {
    "w": jax.random.normal(KEY, (3, 4)),
    "b": jnp.zeros(4),
    "v": jax.random.normal(KEY, (4, 3)),
    "scale": jnp.ones(3),
}
FEW = (
    jax.random.normal(KEY, (5, 2, 3)),
    jnp.arange(10).reshape(5, 2) % 3,
    jnp.array([1.0, 0.0, 1.0, 1.0, 1.0]),
)
TIMES = 4  # how often each example is in the batch: every share of a quarter is FEW
MANY = [jnp.repeat(x, TIMES, axis=0) for x in FEW]


def logits(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] * p["scale"]


def each(p, x, y):
    return losses.softmax_cross_entropy_with_integer_labels(logits(p, x), y).sum(-1)


def scanned(p, x, y, mask):
    def one(total, time):
        x, y = time
        z = jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] * p["scale"]
        return total + losses.softmax_cross_entropy_with_integer_labels(z, y).sum(), None

    return jax.lax.scan(one, jnp.zeros(()), (jnp.swapaxes(x, 0, 1), y.T))[0]


LOSSES = {
    "mean": lambda p, x, y, mask: each(p, x, y).mean(),
    "sum": lambda p, x, y, mask: each(p, x, y).sum(),
    "masked mean": lambda p, x, y, mask: (each(p, x, y) * mask).sum() / mask.sum(),
    "masked sum": lambda p, x, y, mask: (each(p, x, y) * mask).sum(),
    "not linear": lambda p, x, y, mask: jnp.exp(each(p, x, y).mean() / 10),
    "a mean and a sum": lambda p, x, y, mask: (
        each(p, x, y).mean() + losses.l2_loss(logits(p, x), jnp.ones((*x.shape[:2], 3))).sum()
    ),
    "scanned": scanned,
}


@pytest.mark.parametrize("block", ["kronecker", "ekfac", "diagonal"])
@pytest.mark.parametrize("loss", LOSSES)
def test_of_a_batch_of_copies_one_of_each_is_enough(loss, block):
    registry = curvature.register(LOSSES[loss], PARAMS, *MANY).with_blocks(block)
    estimator = curvature.Estimator(registry, curvature.GaussNewton())
    whole = jax.jit(estimator)(PARAMS, *MANY)
    part = estimator.operator(
        jax.jit(lambda p, args: estimator.statistics(p, *args, share=1 / TIMES))(PARAMS, MANY)
    )
    for found, expected in zip(whole.blocks.values(), part.blocks.values(), strict=True):
        expected, found = (np.asarray(x.to_dense()) for x in (expected, found))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("loss", ["masked mean", "masked sum"])
def test_a_share_that_has_no_weight_adds_nothing(loss):
    """The masked mean of nothing is not a number."""
    mask = jnp.zeros(20).at[1].set(1.0)
    args = (*MANY[:2], mask)
    registry = curvature.register(LOSSES[loss], PARAMS, *args)
    estimator = curvature.Estimator(registry, curvature.GaussNewton())
    found = estimator.operator(estimator.statistics(PARAMS, *args, share=1 / TIMES))
    assert float(found.trace()) == 0


@pytest.mark.parametrize(
    ("share", "indices"), [(0.5, [0, 2, 4]), (2 / 3, [0, 1, 3, 4]), (0.01, [0])]
)
@pytest.mark.parametrize("axis", [0, 1])
def test_examples_are_evenly_spaced(share, indices, axis):
    x, state = jnp.moveaxis(jnp.arange(12).reshape(6, 2), 0, axis), jnp.ones(6)
    keys = jax.random.split(KEY, 6)
    found, size = examples_of((x, state, keys), [Batch(axis), None, Batch(0)], share)
    assert size == 6
    np.testing.assert_array_equal(found[0], jnp.take(x, np.array(indices), axis=axis))
    assert found[1] is state
    np.testing.assert_array_equal(
        jax.random.key_data(found[2]), jax.random.key_data(keys[np.array(indices)])
    )


def test_an_example_may_have_several_entries():
    x = jnp.arange(12)
    for share, expected in ((0.5, [0, 1, 4, 5, 8, 9]), (2 / 3, [0, 1, 2, 3, 6, 7, 8, 9])):
        (found,), _ = examples_of((x,), [Batch(0, 2)], share)
        np.testing.assert_array_equal(found, expected)


def test_the_registry_knows_which_axis_has_the_examples():
    def loss(p, batch, step):
        return scanned(p, jnp.swapaxes(batch["x"], 0, 1), batch["y"].T, None) * step

    batch = {"x": jnp.swapaxes(MANY[0], 0, 1), "y": MANY[1].T}
    registry = curvature.register(loss, PARAMS, batch, jnp.ones(()))
    assert registry.batch == (Batch(1), Batch(1), None)


def trained(tx, steps=4):
    loss, params = LOSSES["mean"], PARAMS
    state = tx.init(params)

    @jax.jit
    def step(params, state, key):
        grads = jax.grad(loss)(params, *MANY)
        return tx.update(grads, state, params, loss_args=tuple(MANY), key=key)

    for i in range(steps):
        updates, state = step(params, state, jax.random.fold_in(KEY, i))
        params = jax.tree.map(jnp.add, params, updates)
    return params


@pytest.mark.parametrize("recipe", [curvature.kfac, curvature.ekfac])
def test_training_on_copies_is_the_same_with_a_share(recipe):
    registry = curvature.register(LOSSES["mean"], PARAMS, *MANY)
    options = {"kind": curvature.GaussNewton(), "damping": 0.1}
    expected = trained(recipe(registry, 0.1, **options))
    found = trained(recipe(registry, 0.1, statistics_batch=1 / TIMES, **options))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("loss", ["mean", "masked sum"])
def test_a_share_costs_its_share(loss):
    """No second pass, over the whole batch, to know the weights: they need none."""
    wide = {"w": jnp.ones((3, 64)), "b": jnp.ones(64), "v": jnp.ones((64, 3)), "scale": jnp.ones(3)}
    registry = curvature.register(LOSSES[loss], wide, *MANY)
    estimator = curvature.Estimator(registry, curvature.EmpiricalFisher())
    whole, part = (
        flops(lambda p, args, share=share: estimator.statistics(p, *args, share=share), wide, MANY)
        for share in (None, 1 / TIMES)
    )
    few = flops(lambda p, args: estimator.statistics(p, *args), wide, list(FEW))
    assert part <= 1.02 * few + 200
    assert part < whole / 3


def test_a_share_of_a_divided_batch_stays_where_it_is():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, P("data"))
    args = tuple(jax.device_put(jnp.repeat(x, 2, axis=0), rows) for x in MANY)
    batch = [Batch(0)] * 3
    compiled = jax.jit(lambda *a: examples_of(a, batch, 1 / TIMES)[0]).lower(*args).compile()
    text = compiled.as_text()
    assert not any(x in text for x in ("all-to-all", "all-gather", "collective-permute"))
    assert all(s.spec == P("data") for s in compiled.output_shardings)


def test_what_cannot_be_done_is_refused():
    registry = curvature.register(LOSSES["mean"], PARAMS, *MANY)
    for share in (0, -0.5, 1.5, True, "half"):
        with pytest.raises(ValueError, match="statistics_batch"):
            curvature.kfac(registry, 0.1, statistics_batch=share)
    inner = optax.scale(1.0)
    with pytest.raises(ValueError, match="Shampoo"):
        curvature.in_eigenbasis(registry, inner, curvature.Shampoo(), statistics_batch=0.5)
    closed = curvature.register(lambda p: LOSSES["mean"](p, *MANY), PARAMS)
    with pytest.raises(ValueError, match="axis of examples"):
        curvature.kfac(closed, 0.1, statistics_batch=0.5)
    taken, size = examples_of((jnp.arange(4), jnp.arange(6)), [Batch(0), Batch(0)], 0.5)
    assert [x.tolist() for x in taken] == [[0, 2], [0, 2, 4]] and size is None
