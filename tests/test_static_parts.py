"""What is static in an operator: the same for every registration of a function, and small."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from curvature import losses

X, Y = jax.random.normal(jax.random.key(0), (8, 4)), jnp.zeros((8, 4))


def scanned(p, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p)[0]


def nested(p, x):
    """A scan in a scan, used in two iterations of a third."""
    body = lambda h, w: (scanned(w, h), None)  # noqa: E731
    twice = lambda h, _: jax.lax.scan(body, h, p.reshape(2, 2, 4, 4))  # noqa: E731
    return jax.lax.scan(twice, x, None, length=2)[0]


def branches(p, x):
    return jax.lax.cond(x.sum() > 0, scanned, lambda p, x: scanned(p, 2 * x), p, x)


def joined(p, x):
    return scanned(jnp.stack([p[0], p[1]]), x)


MODELS = {f.__name__: f for f in (scanned, nested, branches, joined)}


def operator(model, p):
    def loss_fn(p, x, y):
        return losses.l2_loss(model(p, x), y).mean()

    jax.clear_caches()
    registry = curvature.register(loss_fn, p, X, Y)
    return curvature.Estimator(registry, curvature.Fisher(samples=None))(p, X, Y)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_operators_of_two_registrations_are_one_kind_of_tree(model):
    p = jnp.stack([jnp.eye(4) * (1 + i / 4) for i in range(4)])
    one, two = operator(model, p), operator(model, p)
    doubled = jax.tree.map(jnp.add, one, two)
    np.testing.assert_allclose(doubled.trace(), 4 * one.trace())  # both factors
    assert hash(one.layers) == hash(two.layers)
    traces = []

    @jax.jit
    def use(op):
        traces.append(op)
        return op.trace()

    use(one), use(two)
    assert len(traces) == 1
    again = pickle.loads(pickle.dumps(one))
    np.testing.assert_array_equal(use(again), use(one))
    assert len(traces) == 1
