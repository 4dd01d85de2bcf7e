"""Gaussian outputs of known variance (squared errors) and of predicted variance."""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from curvature.losses.output import (
    Elementwise,
    OutputLoss,
    Targets,
    floating,
    positive,
    shaped_like,
    tag,
)


class _KnownVariance(Elementwise):
    """Gaussian in its mean: H_z = F_z = 1 / variance."""

    @abc.abstractmethod
    def _precision(self, z: jax.Array, targets: Targets) -> jax.Array:
        """1 / variance, broadcastable to `z`."""

    def score(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        return self._precision(z, targets) * (z - targets[0].astype(z.dtype))

    def sampled_score(self, key: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        return self.fisher_root(jax.random.normal(key, z.shape, z.dtype), z, targets)

    def excess(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        return 0.5 * self._precision(z, targets) * (z - targets[0].astype(z.dtype)) ** 2

    def second_derivative(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `Elementwise`."""
        return jnp.broadcast_to(self._precision(z, targets), z.shape)


@dataclasses.dataclass(frozen=True)
class SquaredError(_KnownVariance):
    """l = precision/2 (z - t)^2; precision 1 is optax's `l2_loss`, 2 its `squared_error`.

    >>> import jax.numpy as jnp, curvature
    >>> curvature.losses.SquaredError(2).fisher_information(jnp.zeros(1), ())
    Array([2.], dtype=float32)
    """

    precision: int = 1

    def __post_init__(self) -> None:
        if self.precision not in (1, 2):
            raise ValueError(f"precision is {self.precision}, expected 1 or 2: else use Gaussian.")

    @property
    def name(self) -> str:
        """See `OutputLoss`."""
        return {1: "l2_loss", 2: "squared_error"}[self.precision]

    def value(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        loss = optax.losses.squared_error if self.precision == 2 else optax.losses.l2_loss
        return loss(z, targets[0])

    def _precision(self, z: jax.Array, targets: Targets) -> jax.Array:
        return jnp.asarray(self.precision, z.dtype)


@dataclasses.dataclass(frozen=True)
class Gaussian(_KnownVariance):
    """Gaussian in its mean, the targets being `(t, variance)`: H_z = F_z = 1 / variance."""

    @property
    def name(self) -> str:
        """See `OutputLoss`."""
        return "gaussian_nll"

    def value(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        t, variance = (x.astype(z.dtype) for x in targets)
        return 0.5 * (jnp.log(variance) + (z - t) ** 2 / variance)

    def _precision(self, z: jax.Array, targets: Targets) -> jax.Array:
        return 1 / targets[1].astype(z.dtype)


@dataclasses.dataclass(frozen=True)
class HeteroscedasticGaussian(OutputLoss):
    """Gaussian whose mean m and log variance s are predicted: z = (m, s) on the last axis.

    With r = t - m and v = exp(s),

        H_z = [[1/v, r/v], [r/v, r^2/(2v)]],  F_z = E[H_z] = diag(1/v, 1/2).

    H_z depends on the target and is indefinite wherever r != 0 (its determinant is -r^2/(2 v^2)),
    so it has no square root: `root` is that of F_z, which is always positive definite.

    >>> import jax.numpy as jnp, curvature
    >>> family = curvature.losses.HeteroscedasticGaussian()
    >>> family.fisher_mvp(jnp.ones(2), jnp.array([0.0, jnp.log(4.0)]), ())
    Array([0.25, 0.5 ], dtype=float32)
    """

    event_ndim = 1
    fisher_is_hessian = False

    @property
    def name(self) -> str:
        """See `OutputLoss`."""
        return "heteroscedastic_gaussian_nll"

    def value(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        residual, log_variance, precision = self._parts(z, targets)
        return 0.5 * (log_variance + residual**2 * precision)

    def score(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        residual, _, precision = self._parts(z, targets)
        scaled = residual * precision
        return jnp.stack([-scaled, 0.5 * (1 - residual * scaled)], -1)

    def sampled_score(self, key: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        del targets
        noise = jax.random.normal(key, z.shape[:-1], z.dtype)  # r = noise sqrt(v)
        return jnp.stack([-noise * jnp.exp(-z[..., 1] / 2), 0.5 * (1 - noise**2)], -1)

    def hessian_mvp(self, vector: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        residual, _, precision = self._parts(z, targets)
        mean, log_variance = vector[..., 0], vector[..., 1]
        turned = precision * (mean + residual * log_variance)
        back = precision * residual * (mean + 0.5 * residual * log_variance)
        return jnp.stack([turned, back], -1)

    def gauss_newton_mvp(self, vector: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """That of the Fisher."""
        return self.fisher_mvp(vector, z, targets)

    def root(self, vector: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """The square root of F_z: H_z is indefinite."""
        return self.fisher_root(vector, z, targets)

    def fisher_mvp(self, vector: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        del targets
        return jnp.stack([jnp.exp(-z[..., 1]) * vector[..., 0], 0.5 * vector[..., 1]], -1)

    def fisher_root(self, vector: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        del targets
        mean = jnp.exp(-z[..., 1] / 2) * vector[..., 0]
        return jnp.stack([mean, 0.5**0.5 * vector[..., 1]], -1)

    @staticmethod
    def _parts(z: jax.Array, targets: Targets) -> tuple[jax.Array, jax.Array, jax.Array]:
        """r, s and 1/v."""
        return targets[0].astype(z.dtype) - z[..., 0], z[..., 1], jnp.exp(-z[..., 1])


def l2_loss(predictions: ArrayLike, targets: ArrayLike | None = None) -> jax.Array:
    """Elementwise 1/2 (prediction - target)^2: a Gaussian of unit variance.

    Args:
      predictions: any shape.
      targets: same shape; zero where None.

    Returns:
      Elementwise losses, as `optax.l2_loss`.

    >>> import jax.numpy as jnp, curvature
    >>> curvature.losses.l2_loss(jnp.array([3.0]), jnp.array([1.0]))
    Array([2.], dtype=float32)
    """
    return _squared(1, predictions, targets)


def squared_error(predictions: ArrayLike, targets: ArrayLike | None = None) -> jax.Array:
    """Elementwise (prediction - target)^2: a Gaussian of variance 1/2.

    Args:
      predictions: any shape.
      targets: same shape; zero where None.

    Returns:
      Elementwise losses, as `optax.squared_error`.

    >>> import jax.numpy as jnp, curvature
    >>> curvature.losses.squared_error(jnp.array([3.0]), jnp.array([1.0]))
    Array([4.], dtype=float32)
    """
    return _squared(2, predictions, targets)


def _squared(precision: int, predictions: ArrayLike, targets: ArrayLike | None) -> jax.Array:
    z = floating(predictions, "predictions")
    return tag(SquaredError(precision), z, shaped_like(z, targets, "predictions"))


def gaussian_nll(mean: ArrayLike, targets: ArrayLike, *, variance: ArrayLike = 1.0) -> jax.Array:
    """Elementwise negative log-likelihood of Gaussians of known variance.

    1/2 (log variance + (t - mean)^2 / variance), which leaves out the constant log(2 pi) / 2. The
    variance is data: curvature knows of no parameters behind it (`heteroscedastic_gaussian_nll`
    does). F_z = H_z = 1 / variance.

    Args:
      mean: any shape.
      targets: shape of `mean`, in the same units.
      variance: positive, broadcastable to `mean`, in the units of the targets squared.

    Returns:
      Elementwise losses, shape of `mean`.

    Raises:
      TypeError: `mean` is not floating point.
      ValueError: the shapes do not fit, or the variance is a number that is not positive.

    >>> import jax.numpy as jnp, curvature
    >>> curvature.losses.gaussian_nll(jnp.array([3.0]), jnp.array([1.0]), variance=1.0)
    Array([2.], dtype=float32)
    """
    z = floating(mean, "mean")
    t = shaped_like(z, targets, "mean")
    return tag(Gaussian(), z, t, positive(variance, "variance", z))


def heteroscedastic_gaussian_nll(
    mean: ArrayLike, log_variance: ArrayLike, targets: ArrayLike
) -> jax.Array:
    """Elementwise negative log-likelihood of Gaussians whose mean and variance are predicted.

    1/2 (log_variance + (t - mean)^2 exp(-log_variance)), without the constant log(2 pi) / 2
    (Nix and Weigend 1994). The Hessian in the two outputs depends on the target and is indefinite;
    the Fisher, diag(1 / variance, 1/2), is not: `GaussNewton` means the Fisher here
    (`HeteroscedasticGaussian`).

    Args:
      mean: any shape.
      log_variance: shape of `mean`.
      targets: shape of `mean`.

    Returns:
      Elementwise losses, shape of `mean`.

    Raises:
      TypeError: `mean` or `log_variance` is not floating point.
      ValueError: the shapes differ.

    >>> import jax.numpy as jnp, curvature
    >>> mean, log_variance, t = jnp.array([3.0]), jnp.zeros(1), jnp.array([1.0])
    >>> curvature.losses.heteroscedastic_gaussian_nll(mean, log_variance, t)
    Array([2.], dtype=float32)
    """
    m, s = floating(mean, "mean"), floating(log_variance, "log_variance")
    if s.shape != m.shape:
        raise ValueError(f"log_variance has shape {s.shape}, expected {m.shape}: the mean's.")
    t = shaped_like(m, targets, "mean")
    return tag(HeteroscedasticGaussian(), jnp.stack([m, s], -1), t)
