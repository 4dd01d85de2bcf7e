"""What a comparison says of the model: against numbers by hand, of losses summed over units."""

import jax.numpy as jnp
import numpy as np

import curvature
from curvature.comparison.state import Prediction
from curvature.losses import (
    sigmoid_binary_cross_entropy,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
    squared_error,
)

LOG2, LOG3 = np.log(2.0), np.log(3.0)
QUARTER = 2 * LOG2 - 0.75 * LOG3  # the entropy of (1/4, 3/4)


def state(loss_fn, *batches, outputs):
    """Of a model whose outputs are its inputs."""
    params = jnp.eye(outputs)
    predicted = Prediction(curvature.register(loss_fn, params, *batches[0]))
    for batch in batches:
        predicted.add(params, batch)
    found = predicted.state(2, 7.0)
    assert (found.examples, found.loss) == (2, 7.0)
    return found.wrong, found.nll, found.entropy


def test_pixels_summed_over_an_example():
    def loss_fn(w, x, y):
        return sigmoid_binary_cross_entropy(x @ w, y).sum(-1).mean()

    # Odds of 3, 1/3, 1 and 3; what is given has the probabilities 3/4, 1/4, 1/2 and 3/4.
    z, y = jnp.array([[LOG3, -LOG3], [0.0, LOG3]]), jnp.array([[1.0, 1.0], [0.0, 1.0]])
    nll = (2 * (2 * LOG2 - LOG3) + 2 * LOG2 + LOG2) / 4
    np.testing.assert_allclose(
        state(loss_fn, (z, y), outputs=2), (1 / 4, nll, (3 * QUARTER + LOG2) / 4), rtol=1e-12
    )


def test_tokens_count_alike_whatever_their_batch_and_weight():
    def loss_fn(w, x, y, weights):
        losses = softmax_cross_entropy_with_integer_labels(x @ w, y)
        return (losses * weights).sum()

    odds = jnp.array([[[LOG3, 0.0], [0.0, 0.0], [9.0, 0.0]]])  # (3/4, 1/4), even, padding
    first = odds, jnp.array([[1, 0, 1]]), jnp.array([[5.0, 1.0, 0.0]])
    second = odds, jnp.array([[0, 0, 1]]), jnp.array([[1.0, 0.0, 0.0]])
    nll = (2 * LOG2 + LOG2 + (2 * LOG2 - LOG3)) / 3
    np.testing.assert_allclose(
        state(loss_fn, first, second, outputs=2), (1 / 3, nll, (2 * QUARTER + LOG2) / 3), rtol=1e-12
    )


def test_targets_of_some_mass_and_units_without_classes():
    def loss_fn(w, x, y, where):
        return softmax_cross_entropy(x @ w, y, where=where).sum()

    z = jnp.array([[LOG3, 0.0, 9.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    y = jnp.array([[0.5, 1.5, 0.0], [0.0, 0.5, 0.5], [1.0, 0.0, 0.0]])
    where = jnp.array([[True, True, False], [True, True, True], [False, False, False]])
    nll = (0.5 * (2 * LOG2 - LOG3) + 1.5 * 2 * LOG2 + LOG3) / 3
    wrong = (2.0 + 1.0) / 3  # the first unit's mass is 2, the second's 1
    np.testing.assert_allclose(
        state(loss_fn, (z, y, where), outputs=3), (wrong, nll, (2 * QUARTER + LOG3) / 3), rtol=1e-12
    )


def test_other_losses_have_none_of_it():
    def loss_fn(w, x, y):
        return squared_error(x @ w, y).mean()

    assert state(loss_fn, (jnp.eye(2), jnp.ones((2, 2))), outputs=2) == (None, None, None)
