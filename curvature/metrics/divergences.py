"""Divergences of two outputs, and the metrics they induce."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvature.losses import autodiff


class _Induced(abc.ABC):
    """What divergences share: the value and the Hessian of each unit."""

    event_ndim: int

    @abc.abstractmethod
    def _between(self, z: jax.Array, other: jax.Array) -> jax.Array:
        """The divergence of one unit."""

    @abc.abstractmethod
    def _around(self, z: jax.Array) -> autodiff.Scalar:
        """A function of one unit whose Hessian at `z` is G_z."""

    def __call__(self, z: jax.Array, other: jax.Array) -> jax.Array:
        """The divergence of every unit: shape of `z` without its last `event_ndim` axes."""
        return self._over_units(self._between, z)(z, other)

    def mvp(self, z: jax.Array, v: jax.Array) -> jax.Array:
        """See `Metric`."""
        return self._hessian(autodiff.hessian_mvp, z, v)

    def root(self, z: jax.Array, v: jax.Array) -> jax.Array:
        """See `Metric`; S is symmetric, from a dense matrix and its eigenvectors for every unit."""
        return self._hessian(autodiff.psd_root, z, v)

    def _hessian(self, apply: Callable[..., jax.Array], z: jax.Array, v: jax.Array) -> jax.Array:
        return self._over_units(lambda z, v: apply(self._around(z), z, v), z)(z, v)

    def _over_units(self, function: Callable[..., Any], z: jax.Array) -> Callable[..., Any]:
        if z.ndim < self.event_ndim:
            raise ValueError(
                f"z has shape {z.shape}, expected at least {self.event_ndim} axes: event_ndim is "
                "the number of axes that the function of one unit takes."
            )
        return autodiff.over_units(function, z.ndim - self.event_ndim)


@dataclasses.dataclass(frozen=True)
class Divergence(_Induced):
    """A divergence rho(z, z') of two outputs, and the metric it induces: its Hessian at z = z'.

    rho has to be smooth, with a minimum at z = z'. Where it is not, negative eigenvalues are set to
    zero in `root`, and only there.

    Attributes:
      rho: `rho(z, z')`, a scalar, of one unit.
      event_ndim: the number of axes of one unit's z; axes in front of them are mapped over.

    Raises:
      ValueError: z has fewer axes than `event_ndim`.

    >>> import jax.numpy as jnp, curvature
    >>> def hellinger(z, other):  # between Poisson distributions of log rates z and other
    ...     return 2 * jnp.sum((jnp.exp(z / 2) - jnp.exp(other / 2)) ** 2)
    >>> curvature.metrics.Divergence(hellinger).mvp(jnp.zeros(1), jnp.ones(1))
    Array([1.], dtype=float32)
    """

    rho: Callable[[jax.Array, jax.Array], jax.Array]
    event_ndim: int = 1

    def _between(self, z: jax.Array, other: jax.Array) -> jax.Array:
        return self.rho(z, other)

    def _around(self, z: jax.Array) -> autodiff.Scalar:
        return lambda moved: self.rho(moved, z)


@dataclasses.dataclass(frozen=True)
class Bregman(_Induced):
    """The divergence phi(z) - phi(z') - <grad phi(z'), z - z'>; its metric is phi's Hessian.

    For the log-partition function A of an exponential family in natural parameters it is a
    Kullback-Leibler divergence with the arguments exchanged, D_A(z, z') = KL(p_z' || p_z), and the
    metric is the Fisher information (Amari 2016, chapter 1). `kl` has the arguments in KL's order.

    Attributes:
      phi: a strictly convex function of one unit's z, a scalar.
      event_ndim: the number of axes of one unit's z; axes in front of them are mapped over.

    Raises:
      ValueError: z has fewer axes than `event_ndim`.

    >>> import jax.numpy as jnp, curvature
    >>> bregman = curvature.metrics.Bregman(lambda z: jnp.sum(z**2))
    >>> bregman(jnp.array([3.0, 0.0]), jnp.array([1.0, 1.0]))
    Array(5., dtype=float32)
    """

    phi: Callable[[jax.Array], jax.Array]
    event_ndim: int = 1

    def _between(self, z: jax.Array, other: jax.Array) -> jax.Array:
        value, slope = jax.value_and_grad(self.phi)(other)
        return self.phi(z) - value - jnp.sum(slope * (z - other))

    def _around(self, z: jax.Array) -> autodiff.Scalar:
        return self.phi


def kl(
    log_partition: Callable[[jax.Array], jax.Array],
    z: jax.Array,
    other: jax.Array,
    event_ndim: int = 1,
) -> jax.Array:
    """KL(p_z || p_other) within an exponential family, in nats.

    Args:
      log_partition: the log-partition function of one unit: `jax.nn.logsumexp` for categorical
        logits; with event_ndim 0, `jax.nn.softplus` for Bernoulli logits, `jnp.exp` for Poisson log
        rates, `lambda z: z**2 / 2` for Gaussian means of unit variance.
      z: natural parameters, shape `units + event`.
      other: natural parameters, the same shape.
      event_ndim: the number of axes of one unit's z.

    Returns:
      The divergence of every unit, shape `units`.

    >>> import jax, jax.numpy as jnp, curvature
    >>> p, q = jnp.array([0.5, 0.5]), jnp.array([0.9, 0.1])
    >>> bool(jnp.allclose(curvature.metrics.kl(jax.nn.logsumexp, jnp.log(p), jnp.log(q)),
    ...                   jnp.sum(p * jnp.log(p / q))))
    True
    """
    return Bregman(log_partition, event_ndim)(other, z)
