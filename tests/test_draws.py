"""Classes that are drawn from the model's own distribution: right, and in little memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from curvature import losses
from curvature.losses.categorical import _drawn, _first_beyond


@pytest.mark.parametrize("classes", [1, 2, 7, 12, 100])  # 7 and 2 are dealt to unequal groups
def test_classes_are_drawn_as_often_as_they_are_probable(classes):
    q = jax.nn.softmax(jax.random.normal(jax.random.key(classes), (classes,)))
    q = jnp.where(jnp.arange(classes) % 3 == 1, 0, q) if classes > 2 else q  # masked classes
    q, count = q / q.sum(), 100_000
    drawn = np.asarray(_drawn(jax.random.key(1), jnp.broadcast_to(q, (count, classes))))
    found = np.bincount(drawn, minlength=classes) / count
    assert found.shape == (classes,)
    np.testing.assert_array_equal(found[np.asarray(q) == 0], 0)
    np.testing.assert_allclose(found, q, atol=4 * (0.25 / count) ** 0.5)


def test_a_class_without_weight_is_never_drawn_whatever_rounding_leaves():
    """The largest random numbers, times a sum that is rounded up, are beyond the last class."""
    weights = jnp.array([[0.0, 0.3, 0.0, 0.7, 0.0, 0.0], [0.0] * 5 + [1.0]])
    for left in (0.0, 0.999999, 1.0, 1.1):
        found, _ = _first_beyond(weights, jnp.full(2, left))
        assert bool(jnp.all(jnp.take_along_axis(weights, found[:, None], axis=1) > 0))


def test_a_draw_from_many_classes_needs_no_array_of_them():
    """Statistics with sampled targets have three arrays as large as the logits; a gradient two."""
    x, y = jnp.ones((64, 8), jnp.float32), jnp.zeros(64, jnp.int32)
    params = {"w": jax.random.normal(jax.random.key(0), (8, 50304), jnp.float32)}

    def loss(params, x, y):
        return losses.softmax_cross_entropy_with_integer_labels(x @ params["w"], y).mean()

    estimator = curvature.Estimator(curvature.register(loss, params, x, y))

    def statistics(params, key):
        return estimator.statistics(params, x, y, key=key)

    compiled = jax.jit(statistics).lower(params, jax.random.key(0)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 3.1 * 64 * 50304 * 4
