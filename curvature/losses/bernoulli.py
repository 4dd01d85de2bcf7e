"""Bernoulli outputs: the sigmoid cross entropy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from curvature.losses.output import Elementwise, Targets, floating, tag


@dataclasses.dataclass(frozen=True)
class Bernoulli(Elementwise):
    """Bernoulli in its logit: H_z = F_z = q (1 - q), whatever the (possibly soft) label.

    >>> import jax.numpy as jnp, curvature
    >>> curvature.losses.Bernoulli().fisher_information(jnp.zeros(1), ())
    Array([0.25], dtype=float32)
    """

    @property
    def name(self) -> str:
        """See `OutputLoss`."""
        return "sigmoid_binary_cross_entropy"

    def value(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        return optax.losses.sigmoid_binary_cross_entropy(z, targets[0])

    def score(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        return jax.nn.sigmoid(z) - targets[0].astype(z.dtype)

    def sampled_score(self, key: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        del targets
        q = jax.nn.sigmoid(z)
        return q - jax.random.bernoulli(key, q).astype(z.dtype)

    def second_derivative(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `Elementwise`."""
        del targets
        # sigmoid(-z) rather than 1 - sigmoid(z): no cancellation for large z.
        return jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)


def sigmoid_binary_cross_entropy(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Elementwise cross entropy of Bernoulli variables given by logits.

    Args:
      logits: log odds, any shape.
      labels: 0, 1, or probabilities; the shape of `logits`, or one is broadcast to the other's.

    Returns:
      Elementwise losses, as `optax.sigmoid_binary_cross_entropy`.

    Raises:
      TypeError: `logits` are not floating point.
      ValueError: the shapes would be broadcast to a third, as those of (n, 1) and (n,) are.

    >>> import jax.numpy as jnp, curvature
    >>> curvature.losses.sigmoid_binary_cross_entropy(jnp.zeros(2), jnp.array([0, 1]))
    Array([0.6931472, 0.6931472], dtype=float32)
    """
    z, labels = floating(logits, "logits"), jnp.asarray(labels)
    if jnp.broadcast_shapes(z.shape, labels.shape) not in (z.shape, labels.shape):
        raise ValueError(
            f"labels have shape {labels.shape} and logits {z.shape}: every one would meet every "
            "other. Expected one shape for both."
        )
    z, labels = jnp.broadcast_arrays(z, labels)
    return tag(Bernoulli(), z, labels)
