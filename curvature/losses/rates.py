"""Outputs that are the logarithm of a rate: Poisson counts; exponential and gamma times."""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from curvature.losses.output import Elementwise, Targets, floating, positive, shaped_like, tag


@dataclasses.dataclass(frozen=True)
class Poisson(Elementwise):
    """Poisson in its log rate, the natural parameter: H_z = F_z = exp(z), whatever the count."""

    @property
    def name(self) -> str:
        """See `OutputLoss`."""
        return "poisson_nll"

    def value(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        return jnp.exp(z) - targets[0].astype(z.dtype) * z

    def score(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        return jnp.exp(z) - targets[0].astype(z.dtype)

    def sampled_score(self, key: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        del targets
        # Large counts are normal to within their skewness, and overflow the sampler's integers.
        rate, large = jnp.exp(z), 1e5
        counted = jax.random.poisson(key, jnp.minimum(rate, large), z.shape).astype(z.dtype)
        normal = jnp.sqrt(rate) * jax.random.normal(key, z.shape, z.dtype)
        return jnp.where(rate > large, normal, rate - counted)

    def second_derivative(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `Elementwise`."""
        del targets
        return jnp.exp(z)


class _Waiting(Elementwise):
    """Gamma of shape k in its log rate: l = t exp(z) - k z, H_z = t exp(z), F_z = E[H_z] = k.

    The natural parameter is the rate, not its logarithm, so H_z depends on the target.
    """

    fisher_is_hessian = False

    @abc.abstractmethod
    def _shape(self, z: jax.Array, targets: Targets) -> jax.Array:
        """k, shape of `z`."""

    def value(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        return self.second_derivative(z, targets) - self._shape(z, targets) * z

    def score(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        return self.second_derivative(z, targets) - self._shape(z, targets)

    def sampled_score(self, key: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        shape = self._shape(z, targets)
        return jax.random.gamma(key, shape, z.shape, z.dtype) - shape  # t exp(z) has rate one

    def second_derivative(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `Elementwise`."""
        return targets[0].astype(z.dtype) * jnp.exp(z)

    def fisher_information(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `Elementwise`."""
        return self._shape(z, targets)


@dataclasses.dataclass(frozen=True)
class Exponential(_Waiting):
    """Exponential in its log rate: H_z = t exp(z), F_z = 1."""

    @property
    def name(self) -> str:
        """See `OutputLoss`."""
        return "exponential_nll"

    def _shape(self, z: jax.Array, targets: Targets) -> jax.Array:
        return jnp.ones_like(z)


@dataclasses.dataclass(frozen=True)
class Gamma(_Waiting):
    """Gamma in its log rate, the targets being `(t, shape)`: H_z = t exp(z), F_z = shape."""

    @property
    def name(self) -> str:
        """See `OutputLoss`."""
        return "gamma_nll"

    def _shape(self, z: jax.Array, targets: Targets) -> jax.Array:
        return targets[1].astype(z.dtype)


def poisson_nll(log_rate: ArrayLike, targets: ArrayLike) -> jax.Array:
    """Elementwise negative log-likelihood of Poisson counts: exp(z) - t z, without log t!.

    F_z = H_z = exp(z). Drawing counts needs a key of the default kind (threefry).

    Args:
      log_rate: z, the log of the expected count, any shape.
      targets: counts, shape of `log_rate`.

    Returns:
      Elementwise losses, shape of `log_rate`.

    Raises:
      TypeError: `log_rate` is not floating point.
      ValueError: the shapes differ.

    >>> import jax.numpy as jnp, curvature
    >>> curvature.losses.poisson_nll(jnp.array([0.0]), jnp.array([3]))
    Array([1.], dtype=float32)
    """
    z = floating(log_rate, "log_rate")
    return tag(Poisson(), z, shaped_like(z, targets, "log_rate"))


def exponential_nll(log_rate: ArrayLike, targets: ArrayLike) -> jax.Array:
    """Elementwise negative log-likelihood of exponential waiting times: t exp(z) - z.

    F_z = 1 and H_z = t exp(z) differ: the Fisher is the same everywhere, the Gauss-Newton matrix
    is large where an observed time was longer than expected. They agree in the mean over targets.

    Args:
      log_rate: z, minus the log of the expected time, any shape.
      targets: times, not negative, shape of `log_rate`.

    Returns:
      Elementwise losses, shape of `log_rate`.

    Raises:
      TypeError: `log_rate` is not floating point.
      ValueError: the shapes differ.

    >>> import jax.numpy as jnp, curvature
    >>> curvature.losses.exponential_nll(jnp.array([0.0]), jnp.array([2.0]))
    Array([2.], dtype=float32)
    """
    z = floating(log_rate, "log_rate")
    return tag(Exponential(), z, shaped_like(z, targets, "log_rate"))


def gamma_nll(log_rate: ArrayLike, targets: ArrayLike, *, shape: ArrayLike = 1.0) -> jax.Array:
    """Elementwise negative log-likelihood of gamma variables of known shape k: t exp(z) - k z.

    Terms without z, (1 - k) log t + log Gamma(k), are left out. F_z = k and H_z = t exp(z) differ
    as for `exponential_nll`, which is this with k = 1.

    Args:
      log_rate: z, any shape; the mean is k exp(-z).
      targets: not negative, shape of `log_rate`.
      shape: k, positive, broadcastable to `log_rate`; data, not parameters.

    Returns:
      Elementwise losses, shape of `log_rate`.

    Raises:
      TypeError: `log_rate` is not floating point.
      ValueError: the shapes do not fit, or k is a number that is not positive.

    >>> import jax.numpy as jnp, curvature
    >>> curvature.losses.gamma_nll(jnp.array([0.0]), jnp.array([2.0]), shape=3.0)
    Array([2.], dtype=float32)
    """
    z = floating(log_rate, "log_rate")
    t = shaped_like(z, targets, "log_rate")
    return tag(Gamma(), z, t, positive(shape, "shape", z))
