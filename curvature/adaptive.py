"""Choosing damping and step by the quadratic model (Martens and Grosse 2015, section 6)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class LevenbergMarquardt:
    """Damping by how well the quadratic model predicts the loss.

    Every `every` steps the reduction ratio

        rho = (loss(w + v) - loss(w)) / M(v)

    is measured on the step's own batch. Where it is below `low`, the model is trusted too far and
    the damping grows by `factor^-every`; above `high` it shrinks by `factor^every`.

    Attributes:
      initial: the damping of the first step.
      every: steps between measurements, each of which costs two evaluations of the loss.
      factor: change of the damping in one step, in (0, 1).
      low: ratio below which the damping grows.
      high: ratio above which it shrinks.
      minimum: the damping's lower bound.
      maximum: its upper bound.

    Raises:
      ValueError: an argument is out of range.
    """

    initial: float = 1.0
    every: int = 5
    factor: float = 0.95
    low: float = 0.25
    high: float = 0.75
    minimum: float = 1e-8
    maximum: float = 1e8

    def __post_init__(self) -> None:
        if not 0 < self.minimum <= self.initial <= self.maximum:
            raise ValueError(
                f"Expected 0 < minimum <= initial <= maximum, found {self.minimum}, "
                f"{self.initial} and {self.maximum}."
            )
        if not 0 < self.factor < 1 or not self.low < self.high or self.every < 1:
            raise ValueError(
                "Expected factor in (0, 1), low < high and every >= 1, found "
                f"{self.factor}, {self.low}, {self.high} and {self.every}."
            )

    def updated(self, damping: jax.Array, ratio: jax.Array) -> jax.Array:
        """The next damping; a ratio that is not a number (a loss that overflowed) counts as low."""
        change = jnp.asarray(self.factor, damping.dtype) ** self.every
        grown = jnp.where(ratio > self.high, damping * change, damping)
        grown = jnp.where(ratio >= self.low, grown, damping / change)
        return jnp.clip(grown, self.minimum, self.maximum)


@dataclasses.dataclass(frozen=True)
class QuadraticModel:
    """Learning rate and momentum of each step, chosen together.

    The step is `rate * direction + momentum * previous step` with the coefficients that minimise
    the quadratic model on the step's batch. It costs about three forward passes.
    """
