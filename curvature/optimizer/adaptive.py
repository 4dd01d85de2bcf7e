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
    the damping grows by `factor^-every`; above `high` it shrinks by `factor^every`, if the next
    batch confirms it, see below. Where the model expects no decrease, as it may of a given rate and
    momentum, that counts as a ratio of zero. Where what it expects and what happened are both
    within the rounding of the loss, as they are of a loss with a large part that cannot go down, it
    is trusted.

    A step whose rho is below -1 raises its own batch's loss by more than it was to lower it. It is
    not taken, and the damping grows by sqrt(-rho), at least twofold and at most a hundredfold. A
    step more than twice as long as the one before, as the first one is, is measured for this before
    it is taken, and must not raise that loss at all.

    A small batch confirms its own model even of a step that is far too long for all others. So the
    step is also measured on the next batch, where rho is -1 on average if the gradient is nothing
    but noise: v then minimises the batch's own model, and costs others v'Gv / 2 = -M(v). A rho
    below -1 says that the damping does not cover what the batch did not see. Where the damping
    decides, a step's length is inversely proportional to it, and that excess to the length's
    square: the damping grows by sqrt(-rho) here as well. Where `QuadraticModel` chooses
    the steps, that is looked at after each: one bad step undoes what hundreds have gained. And the
    damping does not shrink while the latest rho of a next batch is below `low`, or below zero where
    `QuadraticModel` chooses steps, which are best for their own batches.

    The damping does not go below what the precision of the factors can invert; after a refresh that
    fails all the same it is four times as high.

    Attributes:
      initial: the damping of the first step.
      every: steps between measurements of rho, which cost two evaluations of the loss; the look at
        the next batch costs another two. With `value=` given to the update, they cost one each.
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
    minimum: float = 1e-6
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
        """The next damping; a ratio that is not a number counts as low."""
        change = jnp.asarray(self.factor, damping.dtype) ** self.every
        moved = jnp.where(ratio > self.high, damping * change, damping)
        moved = jnp.where(ratio >= self.low, moved, damping / change)
        return jnp.clip(moved, self.minimum, self.maximum)

    def judged(
        self,
        damping: jax.Array,
        ratio: jax.Array,
        regular: jax.Array,
        leap: jax.Array | bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """The next damping after a step on its own batch, and whether the step is not to be taken.

        Args:
          damping: of the step.
          ratio: the reduction ratio there, see `objective.Problem.ratio`.
          regular: whether it is time to move the damping also after a step that is taken.
          leap: whether the step is so much longer than the one before.
        """
        rejected = ~(ratio >= jnp.where(leap, 0, -1))
        grown = self.checked(damping, jnp.where(jnp.isnan(ratio), -jnp.inf, ratio))
        grown = jnp.maximum(grown, jnp.minimum(2 * damping, self.maximum))
        moved = jnp.where(regular, self.updated(damping, ratio), damping)
        return jnp.where(rejected, grown, moved), rejected

    def confirmed(self, ratio: jax.Array, fresh: jax.Array, *, by_model: bool) -> jax.Array:
        """A ratio on a step's own batch, no reason to shrink the damping if the next one disagrees.

        Args:
          ratio: on the step's own batch.
          fresh: the latest one on a next batch; zero where there is none.
          by_model: whether steps minimise the model of their own batch.
        """
        disagrees = fresh < (0 if by_model else self.low)
        return jnp.where(disagrees, jnp.minimum(ratio, self.high), ratio)

    def recovered(self, after: jax.Array, damping: jax.Array, failed: jax.Array) -> jax.Array:
        """The next damping; four times that of a refresh that failed, so that the next need not."""
        return jnp.where(failed, jnp.clip(4 * damping, after, self.maximum), after)

    def is_leap(self, norm: jax.Array, previous: jax.Array) -> jax.Array:
        """Whether a step is so much longer than the one before that it is measured at once."""
        return norm > 2 * previous

    def checked(self, damping: jax.Array, ratio: jax.Array) -> jax.Array:
        """The damping after a step of this ratio: on the next batch, or on its own if not taken.

        Left alone where the ratio is -1 or more, or not a number.
        """
        least = jnp.asarray(self.factor, damping.dtype) ** -self.every
        growth = jnp.maximum(jnp.sqrt(jnp.clip(-ratio, 1, 1e4)), least)
        return jnp.where(ratio < -1, jnp.minimum(damping * growth, self.maximum), damping)


@dataclasses.dataclass(frozen=True)
class QuadraticModel:
    """Learning rate and momentum of each step, chosen together.

    The step is `rate * direction + momentum * previous step` with the coefficients that minimise
    the quadratic model on the step's batch, and as long as `kl_clip` allows. It costs about three
    forward passes.
    """
