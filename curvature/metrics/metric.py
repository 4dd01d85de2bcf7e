"""What a metric is; multiples of the identity, and the matrices of an output family."""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from curvature.losses import OutputLoss, Targets


@runtime_checkable
class Metric(Protocol):
    """What gives G_z on an output space; `z`, `v` and the results have one shape."""

    def mvp(self, z: jax.Array, v: jax.Array) -> jax.Array:
        """G_z v."""
        ...

    def root(self, z: jax.Array, v: jax.Array) -> jax.Array:
        """S v for a square S with S S' = G_z."""
        ...


@dataclasses.dataclass(frozen=True)
class Euclidean:
    """A multiple of the identity: the distance of outputs as vectors.

    Attributes:
      scale: at least 0, in the inverse of z's units squared.

    Raises:
      ValueError: the scale is negative.

    >>> import jax.numpy as jnp, curvature
    >>> curvature.metrics.Euclidean(2.0).mvp(jnp.zeros(2), jnp.ones(2))
    Array([2., 2.], dtype=float32)
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.scale < 0:
            raise ValueError(f"scale is {self.scale}, expected at least 0.")

    def mvp(self, z: jax.Array, v: jax.Array) -> jax.Array:
        """See `Metric`."""
        del z
        return self.scale * v

    def root(self, z: jax.Array, v: jax.Array) -> jax.Array:
        """See `Metric`."""
        del z
        return self.scale**0.5 * v


@dataclasses.dataclass(frozen=True)
class _OfFamily:
    family: OutputLoss
    targets: Targets = ()
    weights: jax.Array | None = None

    def _weighted(self, product: jax.Array, power: float) -> jax.Array:
        if self.weights is None:
            return product
        units = product.shape[: product.ndim - self.family.event_ndim]
        weights = jnp.asarray(self.weights)
        if weights.shape != units:
            raise ValueError(
                f"weights have shape {weights.shape}, expected {units}: one for each unit of z."
            )
        scale = weights.astype(product.dtype) ** power
        return scale.reshape(units + (1,) * self.family.event_ndim) * product


class FisherMetric(_OfFamily):
    """The Fisher information F_z of an output family, in closed form.

    Attributes:
      family: an output family in `curvature.losses`, such as `Categorical()`.
      targets: what the family's methods take; most families need none (`OutputLoss`).
      weights: a factor for each unit, not negative; shape of z without the family's event axes.

    Raises:
      ValueError: the weights have another shape, or the family's Fisher is not known.

    >>> import jax.numpy as jnp, curvature
    >>> metric = curvature.metrics.FisherMetric(curvature.losses.Categorical())
    >>> metric.mvp(jnp.zeros(2), jnp.array([1.0, 0.0]))
    Array([ 0.25, -0.25], dtype=float32)
    """

    def mvp(self, z: jax.Array, v: jax.Array) -> jax.Array:
        """See `Metric`."""
        return self._weighted(self.family.fisher_mvp(v, z, self.targets), 1.0)

    def root(self, z: jax.Array, v: jax.Array) -> jax.Array:
        """See `Metric`."""
        return self._weighted(self.family.fisher_root(v, z, self.targets), 0.5)


class HessianMetric(_OfFamily):
    """The Hessian H_z of a family's loss at given targets, in closed form.

    A metric where H_z is positive semi-definite. Where it is not (`HeteroscedasticGaussian`,
    `Custom`), `mvp` is still H_z, and `root` that of the positive semi-definite matrix the family
    puts in its place.

    Attributes:
      family: an output family in `curvature.losses`, such as `Exponential()`.
      targets: a tuple, as the family's methods take them.
      weights: a factor for each unit, not negative; shape of z without the family's event axes.

    Raises:
      ValueError: the weights have another shape.

    >>> import jax.numpy as jnp, curvature
    >>> metric = curvature.metrics.HessianMetric(curvature.losses.Exponential(), (jnp.ones(1) * 3,))
    >>> metric.mvp(jnp.zeros(1), jnp.ones(1))
    Array([3.], dtype=float32)
    """

    def mvp(self, z: jax.Array, v: jax.Array) -> jax.Array:
        """See `Metric`."""
        return self._weighted(self.family.hessian_mvp(v, z, self.targets), 1.0)

    def root(self, z: jax.Array, v: jax.Array) -> jax.Array:
        """See `Metric`."""
        return self._weighted(self.family.root(v, z, self.targets), 0.5)
