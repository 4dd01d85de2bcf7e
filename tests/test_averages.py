"""Statistics are linear in the data: their averages over batches are those of all the data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature

KEYS = jax.random.split(jax.random.key(0), 6)
TIED = {
    "e": jax.random.normal(KEYS[0], (7, 4)),
    "w": jax.random.normal(KEYS[1], (4, 4)),
    "b": jnp.zeros(4),
}
TOKENS = jax.random.randint(KEYS[2], (12, 5), 0, 7)
LABELS = jax.random.randint(KEYS[3], (12, 5), 0, 7)
LENGTHS = jnp.asarray([5, 3, 2, 5, 1, 4, 5, 5, 2, 3, 1, 5])
BLOCKS = ["kronecker", "kronecker_weighted", "kronecker_reduce", "ekfac", "foof", "diagonal"]


def loss_fn(p, tokens, labels, lengths):
    """A language model with one table at both ends; padding is left out, the scale is fixed."""
    h = jnp.tanh(p["e"][tokens] @ p["w"] + p["b"])
    losses = curvature.losses.softmax_cross_entropy_with_integer_labels(h @ p["e"].T, labels)
    here = jnp.arange(tokens.shape[1]) < lengths[:, None]
    return (losses * here.astype(losses.dtype)).sum() / 20


def part(start, stop):
    return TOKENS[start:stop], LABELS[start:stop], LENGTHS[start:stop]


REGISTRY = curvature.register(loss_fn, TIED, *part(0, 4))


@pytest.mark.parametrize("block", BLOCKS)
def test_the_average_of_batches_is_that_of_their_union(block):
    """A tied embedding, batches of other sizes and with other padding: their sum, exactly."""
    estimator = curvature.Estimator(REGISTRY.with_blocks(block), curvature.Fisher(None))
    statistics = functools.partial(jax.jit(estimator.statistics), TIED, key=KEYS[4])
    whole = statistics(*part(0, 12))
    parts = [statistics(*part(a, b), bases=whole) for a, b in ((0, 4), (4, 9), (9, 12))]
    total = jax.tree.map(lambda *xs: sum(xs), *parts)
    bases = {n: {k: x for k, x in s.items() if "basis" in k} for n, s in whole.items()}
    total = {name: found | bases[name] for name, found in total.items()}
    one, two = (estimator.operator(s) @ TIED for s in (total, whole))
    for name in TIED:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("block", ["kronecker"])
def test_micro_batches_make_the_step_of_the_whole_batch(block):
    """`accumulate=3` is one step with the mean of the losses, also for a tied embedding."""
    options = {"kind": curvature.Fisher(None), "damping": 0.1}
    registry = REGISTRY.with_blocks(block)

    def mean_loss(p, tokens, labels, lengths):
        return loss_fn(p, tokens, labels, lengths) / 3

    whole = curvature.register(mean_loss, TIED, *part(0, 12)).with_blocks(block)
    one = curvature.scale_by_curvature(whole, **options)
    grads = jax.grad(mean_loss)(TIED, *part(0, 12))
    expected, _ = jax.jit(one.update)(
        grads, one.init(TIED), TIED, loss_args=part(0, 12), key=KEYS[4]
    )
    many = curvature.scale_by_curvature(registry, accumulate=3, **options)
    state, update = many.init(TIED), jax.jit(many.update)
    for start in (0, 4, 8):
        args = part(start, start + 4)
        grads = jax.grad(loss_fn)(TIED, *args)
        found, state = update(grads, state, TIED, loss_args=args, key=KEYS[4])
    for name in TIED:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("count", [256, 1024])
def test_many_micro_batches_of_few_bits_add_up(dtype, count):
    """Every micro-batch has gradient -1 and curvature 1: the step does not depend on how many."""
    params, x, y = (
        {"w": jnp.zeros((1, 1), dtype)},
        jnp.ones((1, 1), dtype),
        jnp.ones((1, 1), jnp.float32),
    )

    def loss(p, x, y):
        return curvature.losses.l2_loss((x @ p["w"]).astype(jnp.float32), y).mean()

    registry = curvature.register(loss, params, x, y)
    kind = curvature.GaussNewton()
    tx = curvature.scale_by_curvature(registry, kind, damping=1.0, accumulate=count)

    def body(state, _):
        updates, state = tx.update(jax.grad(loss)(params, x, y), state, params, loss_args=(x, y))
        return state, updates["w"][0, 0]

    _, updates = jax.lax.scan(body, tx.init(params), None, length=count)
    np.testing.assert_allclose(np.asarray(updates[-1], np.float32), -0.25)
    assert not np.any(np.asarray(updates[:-1], np.float32))
