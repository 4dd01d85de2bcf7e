"""What is gathered until there is a step to take: averages of statistics, sums of gradients."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvature.meshes import automatic
from curvature.optimizer.arguments import at, is_time
from curvature.optimizer.options import Options
from curvature.optimizer.refresh.cond import finite, when
from curvature.precision import accumulator
from curvature.statistics import devices
from curvature.statistics.eigenbasis import BASES
from curvature.statistics.share import check_share
from curvature.statistics.stacks import Arrays, Stacks

PyTree = Any
_Averages = tuple[Arrays, jax.Array, jax.Array]
_Sampled = tuple[Arrays, jax.Array, jax.Array, jax.Array | None]


class Gathered(NamedTuple):
    """What a call of `update` has to act on.

    Attributes:
      state: with the statistics of the call, and its gradient where several make a step.
      gradient: the gradient of the step.
      due: whether it is time for a step; True where every call is one.
      sound: whether gradient and statistics were finite.
    """

    state: Any
    gradient: PyTree
    due: jax.Array | bool
    sound: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Averaging:
    """Running averages of statistics by stack, and micro-batches.

    States are named tuples with `step`, `weight`, `statistics`, `micro` and `gradient`, as
    `CurvatureState` has them; and `predictions`, where these are weighed.

    Attributes:
      stacks: of layers.
      options: when and how statistics are taken.
      weighs: whether the total weight of predictions is kept with them.
    """

    stacks: Stacks
    options: Options
    weighs: bool = False

    def __post_init__(self) -> None:
        check_share(self.options.statistics_batch, self.stacks.estimator.registry)

    def zeros(self, params: PyTree) -> dict[str, Any]:
        """The entries of a state before the first step."""
        return ({"predictions": jnp.zeros(())} if self.weighs else {}) | {
            "step": jnp.zeros((), jnp.int32) - self.options.burn_in,
            "weight": jnp.zeros((), jnp.result_type(float)),
            "statistics": self.stacks.zeros(),
            "micro": jnp.zeros((), jnp.int32),
            "gradient": jax.tree.map(_wide_zeros, params) if self.options.accumulate > 1 else (),
        }

    def gathered(
        self,
        gradient: PyTree,
        state: Any,
        params: PyTree,
        args: tuple[PyTree, ...],
        key: jax.Array | None,
    ) -> Gathered:
        """Averages statistics and gathers gradients, until there is a step to take."""
        devices.check(self.stacks.estimator.axes, gradient, params, args, key)
        averages, weight, sound, predictions = self._averaged(
            finite(gradient), state, params, args, key
        )
        state = state._replace(statistics=averages, weight=weight)
        if self.weighs:
            state = state._replace(predictions=predictions)
        return self._summed(gradient, state, sound)

    def _summed(self, gradient: PyTree, state: Any, sound: jax.Array) -> Gathered:
        """The mean of the gradients of a step's micro-batches."""
        due: jax.Array | bool = True
        if self.options.burn_in:
            due = state.step >= 0
            state = state._replace(step=jnp.where(due, state.step, state.step + 1))
        if self.options.accumulate > 1:
            one, ready = 1 / self.options.accumulate, due
            summed = jax.tree.map(
                lambda total, g: jnp.where(ready, total + g.astype(total.dtype) * one, total),
                state.gradient,
                gradient,
            )
            micro = jnp.where(ready, state.micro + 1, state.micro)
            due = micro >= self.options.accumulate  # it may be less than when the state was kept
            left = jax.tree.map(lambda g: jnp.where(due, jnp.zeros_like(g), g), summed)
            gradient = jax.tree.map(lambda total, g: total.astype(g.dtype), summed, gradient)
            state = state._replace(micro=jnp.where(due, 0, micro), gradient=left)
        return Gathered(state, gradient, due, sound)

    def _averaged(
        self,
        sound: jax.Array,
        state: Any,
        params: PyTree,
        args: tuple[PyTree, ...],
        key: jax.Array | None,
    ) -> _Sampled:
        """The averages with what this call adds, their weight, and whether that was finite.

        Last comes the total weight of the first predictions.
        """
        decay = self._past(state)
        share = (1 - decay) / self.options.accumulate
        past = jnp.where(state.micro == 0, decay, 1.0)

        def sample(carry: _Sampled) -> _Sampled:
            old, weight, sound, before = carry
            fresh, predictions = self._fresh(old, params, args, key)
            # The factors are Gram matrices: none of their entries is beyond their traces.
            sound &= jnp.isfinite(self.stacks.operator(fresh).trace())
            if (
                predictions is not None and before is not None
            ):  # later weights may be learned, and run away with the bound
                predictions = jnp.where(sound & (before == 0), predictions, before)
            return *mixed((old, weight), fresh, sound, past, share), predictions

        predictions = state.predictions if self.weighs else None
        return when(self._due(state), sample, (state.statistics, state.weight, sound, predictions))

    def _fresh(
        self, old: Arrays, params: PyTree, args: tuple[PyTree, ...], key: jax.Array | None
    ) -> tuple[Arrays, jax.Array | None]:
        """The statistics of a call, with corrections in the bases of the averages.

        With them comes the weight of the predictions.
        """
        bases = {
            name: {field: x for field, x in arrays.items() if field in BASES}
            for name, arrays in old.items()
        }
        known = automatic(self.stacks.apart, bases)
        estimator, share = self.stacks.estimator, self.options.statistics_batch
        how: Any = {"key": key, "bases": known, "share": share}
        predictions = None
        if self.weighs:
            found, predictions = estimator.weighed_statistics(params, *args, **how)
        else:
            found = estimator.statistics(params, *args, **how)
        return automatic(self.stacks.together, found, like=old), predictions

    def _past(self, state: Any) -> jax.Array:
        """The weight of the past; schedules begin after the burn-in."""
        return at(self.options.decay, jnp.maximum(state.step, 0), state.weight)

    def _due(self, state: Any) -> jax.Array | bool:
        """Whether it is time for statistics."""
        if self.options.statistics_every == 1:
            return True
        early = state.step < self.options.warmup_steps
        return is_time(self.options.statistics_every, jnp.maximum(state.step, 0)) | early


def mixed(
    averages: tuple[Arrays, jax.Array],
    fresh: Arrays,
    sound: jax.Array,
    past: jax.Array,
    share: jax.Array,
) -> _Averages:
    """Averages and their weight after fresh statistics, which count if they are sound."""

    def mix(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(sound, past.astype(old.dtype) * old + share.astype(old.dtype) * new, old)

    old, weight = averages
    new = {
        layer: {
            name: x if name in BASES else mix(x, fresh[layer][name]) for name, x in arrays.items()
        }
        for layer, arrays in old.items()
    }
    return new, mix(weight, jnp.ones_like(weight)), sound


def _wide_zeros(x: jax.Array) -> jax.Array:
    """Zeros in which many small numbers can be added up."""
    return jnp.zeros_like(x, accumulator(x.dtype))
