"""Robust regression: Laplace and Huber, whose Fisher and Gauss-Newton matrices differ."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from curvature.losses.output import Elementwise, Targets, floating, positive, shaped_like, tag


@dataclasses.dataclass(frozen=True)
class Laplace(Elementwise):
    """Laplace of scale one in its location: l = |z - t|, H_z = 0 almost everywhere, F_z = 1."""

    fisher_is_hessian = False

    @property
    def name(self) -> str:
        """See `OutputLoss`."""
        return "absolute_error"

    def value(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        return jnp.abs(z - targets[0].astype(z.dtype))

    def score(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        return jnp.sign(z - targets[0].astype(z.dtype))

    def sampled_score(self, key: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        del targets
        return jax.random.rademacher(key, z.shape, z.dtype)

    def second_derivative(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `Elementwise`."""
        del targets
        return jnp.zeros_like(z)

    def fisher_information(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `Elementwise`."""
        del targets
        return jnp.ones_like(z)


@dataclasses.dataclass(frozen=True)
class Huber(Elementwise):
    """Huber's density, proportional to exp(-l); the targets are `(t, delta)`.

    With r = t - z: H_z = 1 where |r| < delta and 0 elsewhere, F_z = P(|r| < delta) = E[H_z].
    """

    fisher_is_hessian = False

    @property
    def name(self) -> str:
        """See `OutputLoss`."""
        return "huber_loss"

    def value(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        t, delta = (x.astype(z.dtype) for x in targets)
        return optax.losses.huber_loss(z, t, delta=delta)

    def score(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        t, delta = (x.astype(z.dtype) for x in targets)
        return jnp.clip(z - t, -delta, delta)

    def sampled_score(self, key: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        # The density is a Gaussian cut at +-delta with exponential tails, where the score is delta.
        delta = targets[1].astype(z.dtype)
        which, inner, outer = jax.random.split(key, 3)
        near = jax.random.bernoulli(which, self.fisher_information(z, targets))
        core = jax.random.truncated_normal(inner, -delta, delta, z.shape, z.dtype)
        return jnp.where(near, core, delta * jax.random.rademacher(outer, z.shape, z.dtype))

    def second_derivative(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `Elementwise`."""
        t, delta = (x.astype(z.dtype) for x in targets)
        return (jnp.abs(z - t) < delta).astype(z.dtype)

    def fisher_information(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `Elementwise`."""
        # Up to one factor, the mass of the core is sqrt(2 pi) erf(delta / sqrt 2), that of the two
        # tails 2 exp(-delta^2 / 2) / delta.
        delta = targets[1].astype(z.dtype)
        core = (2 * jnp.pi) ** 0.5 * jax.lax.erf(delta * 0.5**0.5)
        return core / (core + 2 * jnp.exp(-(delta**2) / 2) / delta)


def absolute_error(predictions: ArrayLike, targets: ArrayLike | None = None) -> jax.Array:
    """Elementwise |prediction - target|: a Laplace distribution of scale one.

    The loss is piecewise linear: its Gauss-Newton matrix is zero, while F_z = 1. Use a Fisher (or
    `GaussNewton` with a metric). The scale is that of the residuals' units; a factor c on the loss
    weights F_z by c, whereas a Laplace distribution of scale 1/c would have F_z = c^2.

    Args:
      predictions: any shape.
      targets: same shape; zero where None.

    Returns:
      Elementwise losses.

    Raises:
      TypeError: `predictions` is not floating point.
      ValueError: the shapes differ.

    >>> import jax.numpy as jnp, curvature
    >>> curvature.losses.absolute_error(jnp.array([3.0]), jnp.array([1.0]))
    Array([2.], dtype=float32)
    """
    z = floating(predictions, "predictions")
    return tag(Laplace(), z, shaped_like(z, targets, "predictions"))


def huber_loss(
    predictions: ArrayLike, targets: ArrayLike | None = None, *, delta: ArrayLike = 1.0
) -> jax.Array:
    """Elementwise Huber loss: quadratic within `delta`, linear outside (Huber 1964).

    H_z is 1 within delta and 0 outside, so outliers have no Gauss-Newton curvature. F_z is the same
    for all residuals: the probability of being within delta under the density of the loss, which is
    0.80 for delta = 1. The two agree in the mean over that density.

    Args:
      predictions: any shape.
      targets: same shape; zero where None.
      delta: positive, broadcastable to `predictions`, in the same units.

    Returns:
      Elementwise losses, as `optax.huber_loss`.

    Raises:
      TypeError: `predictions` is not floating point.
      ValueError: the shapes do not fit, or delta is a number that is not positive.

    >>> import jax.numpy as jnp, curvature
    >>> curvature.losses.huber_loss(jnp.array([3.0]), jnp.array([1.0]))
    Array([1.5], dtype=float32)
    """
    z = floating(predictions, "predictions")
    t = shaped_like(z, targets, "predictions")
    return tag(Huber(), z, t, positive(delta, "delta", z))
