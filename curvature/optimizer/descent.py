"""The step of `kfac`: its rate and momentum, its bound, and the damping of the next one."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvature.optimizer import quadratic
from curvature.optimizer.adaptive import LevenbergMarquardt, QuadraticModel
from curvature.optimizer.arguments import (
    ScalarOrSchedule,
    at,
    check_state,
    check_update,
    check_value,
    own,
)
from curvature.optimizer.averaging import Gathered
from curvature.optimizer.objective import Objective, Problem, combined, is_zero
from curvature.optimizer.preconditioner import (
    CurvatureState,
    Preconditioner,
    masked,
    settled,
    shortening,
)
from curvature.optimizer.refresh.cond import when

PyTree = Any


class StepStats(NamedTuple):
    """How the latest step was chosen.

    Attributes:
      learning_rate: the coefficient of the preconditioned gradient.
      momentum: the coefficient of the step before.
      clipped: the factor by which `kl_clip` shortened it.
      reduction_ratio: the latest measured ratio of the loss's change to the predicted one.
      predicted: the change that the quadratic model predicted: of the latest step where the model
        chose it, else there.
      next_batch_ratio: the latest ratio of a step's change of the next batch's loss to the
        predicted one.
      update_norm: the length of the update.
      rejected: steps that were not taken because of what they would have done to their own batch.
      unchanged: measurements in a row, up to the latest, in which the loss changed by nothing at
        all, or was not finite, though the parameters changed. `curvature.check_progress` looks at
        it.
    """

    learning_rate: jax.Array
    momentum: jax.Array
    clipped: jax.Array
    reduction_ratio: jax.Array
    predicted: jax.Array
    next_batch_ratio: jax.Array
    update_norm: jax.Array
    rejected: jax.Array
    unchanged: jax.Array


class KFACStats(NamedTuple):
    """What happened: the entries of `CurvatureStats` and of `StepStats`."""

    skipped: jax.Array
    idle: jax.Array
    failed_refreshes: jax.Array
    damping: jax.Array
    staleness: jax.Array
    learning_rate: jax.Array
    momentum: jax.Array
    clipped: jax.Array
    reduction_ratio: jax.Array
    predicted: jax.Array
    next_batch_ratio: jax.Array
    update_norm: jax.Array
    rejected: jax.Array
    unchanged: jax.Array


class KFACState(NamedTuple):
    """State of `kfac`: a pytree of arrays.

    Attributes:
      curvature: the preconditioner's state; its `stats` count skipped steps.
      previous: the step before, a tree like the parameters.
      next_damping: the damping of the next step.
      latest: how the latest step was chosen.
    """

    curvature: CurvatureState
    previous: PyTree
    next_damping: jax.Array
    latest: StepStats

    @property
    def stats(self) -> KFACStats:
        """What happened, for any logger (`._asdict()` names it)."""
        return KFACStats(*self.curvature.stats, *self.latest)


class _Step(NamedTuple):
    """A step and its coefficients; `predicted` is the change of the loss that is expected."""

    step: PyTree
    rate: jax.Array
    momentum: jax.Array
    clipped: jax.Array
    predicted: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Descent:
    """Steps by a preconditioned gradient.

    Attributes:
      preconditioner: of gradients.
      objective: what the quadratic model is of.
      learning_rate: as `kfac` takes it, and all that follow.
      momentum: the coefficient of the step before.
      damping: a number or a schedule: of the first step where it adapts.
      adapts: how the damping does, if it does.
      kl_clip: the bound on a step.
      by_excess: whether it is a multiple of what a prediction's squared error is, above 1.
      decayed: adds what weight decay does to a step.
    """

    preconditioner: Preconditioner
    objective: Objective
    learning_rate: ScalarOrSchedule | QuadraticModel
    momentum: ScalarOrSchedule
    damping: Any
    adapts: LevenbergMarquardt | None
    kl_clip: ScalarOrSchedule | None
    by_excess: bool
    decayed: Callable[..., PyTree]

    @property
    def by_model(self) -> bool:
        """Whether the quadratic model chooses the length of steps."""
        return isinstance(self.learning_rate, QuadraticModel)

    def init(self, params: PyTree) -> KFACState:
        """The state before the first step."""
        curvature = self.preconditioner.init(params)
        zero = jnp.zeros_like(curvature.stats.damping)
        start = at(self.damping, curvature.step, zero)
        latest = StepStats(*(zero for _ in StepStats._fields))
        none = jnp.zeros((), jnp.int32)
        latest = latest._replace(rejected=none, unchanged=none)
        return own(KFACState(curvature, jax.tree.map(jnp.zeros_like, params), start, latest))

    def update(
        self, updates: PyTree, state: KFACState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, KFACState]:
        """The step of a call, zero where it only gathers, and the state after it."""
        args = check_update(params, extra.pop("loss_args", None))
        check_state(state, KFACState)
        check_value(extra.get("value"))
        key = extra.pop("key", None)
        lam = extra.pop("damping", None if self.adapts else self.damping)
        gathered = self.preconditioner.gathered(updates, state.curvature, params, args, key)
        act = functools.partial(self.step, gathered, params, args, lam, extra)
        zeros = jax.tree.map(jnp.zeros_like, updates)
        return when(gathered.due, act, (zeros, state._replace(curvature=gathered.state)))

    def step(
        self,
        gathered: Gathered,
        params: PyTree,
        args: tuple[PyTree, ...],
        given: Any,
        extra: dict[str, Any],
        carry: tuple[PyTree, KFACState],
    ) -> tuple[PyTree, KFACState]:
        """The step of the gathered gradient; `given` is the damping, None where it adapts."""
        _, state = carry
        count, value = state.curvature.step, extra.get("value")
        lam, fresh = state.next_damping, state.latest.next_batch_ratio
        if given is not None:
            lam = at(given, count, lam)
        problem = self.objective.at(params, args, gathered.gradient, lam, count)
        if self.adapts and given is None:
            problem, fresh = self._checked(self.adapts, problem, state, value)
        direction, squared, curvature = self.preconditioner.direction(
            gathered._replace(gradient=problem.gradient),
            state.curvature,
            params,
            problem.damping,
            extra,
        )
        taken = (self.by_quadratic_model if self.by_model else self.at_rate)(
            problem, direction, squared, state
        )
        norm = jnp.sqrt(quadratic.dot(taken.step, taken.step, lam.dtype))
        good = gathered.sound & jnp.isfinite(norm)
        after, ratio, rejected = problem.lam, state.latest.reduction_ratio, jnp.asarray(False)
        unchanged = state.latest.unchanged
        predicted = taken.predicted if self.by_model else state.latest.predicted
        if self.adapts:
            measured = self._measured(self.adapts, problem, taken, norm, good, state, value)
            after, ratio, predicted, rejected, unchanged = measured
            failures = (s.stats.failed_refreshes for s in (curvature, state.curvature))
            after = self.adapts.recovered(after, problem.lam, operator.gt(*failures))
        latest = StepStats(
            taken.rate,
            taken.momentum,
            taken.clipped,
            ratio,
            predicted,
            fresh,
            update_norm=jnp.where(rejected, 0, norm),
            rejected=state.latest.rejected + rejected.astype(jnp.int32),
            unchanged=unchanged,
        )
        before = masked(~rejected, taken.step) if self.adapts else taken.step
        kept = KFACState(
            settled(good, curvature, state.curvature, rejected),
            *jax.tree.map(
                functools.partial(jnp.where, good), (before, after, latest), tuple(state[1:])
            ),
        )
        asked = taken.rate / taken.clipped
        return masked(good & ~rejected, self.decayed(taken.step, params, asked, count)), kept

    def _checked(
        self, adapts: LevenbergMarquardt, problem: Problem, state: KFACState, value: Any
    ) -> tuple[Problem, jax.Array]:
        """The problem with the damping after what the step before did to this batch; that ratio."""
        count = state.curvature.step

        def checked(_: Any) -> tuple[jax.Array, jax.Array]:
            back = jax.tree.map(jnp.negative, state.previous)
            predicted = state.latest.predicted
            ratio, _ = problem.ratio(back, -predicted, value)
            return adapts.checked(problem.lam, jnp.where(predicted < 0, ratio, 0)), ratio

        due = (count > 0) & (self.by_model | (count % adapts.every == 0))
        lam, fresh = when(due, checked, (problem.lam, state.latest.next_batch_ratio))
        averages, weight = state.curvature.statistics, state.curvature.weight
        floor = self.preconditioner.inverses.smallest_damping(averages, weight)
        return problem._replace(lam=jnp.maximum(lam, floor.astype(lam.dtype))), fresh

    def _measured(
        self,
        adapts: LevenbergMarquardt,
        problem: Problem,
        taken: _Step,
        norm: jax.Array,
        good: jax.Array,
        state: KFACState,
        value: Any,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
        """What a step does to its own batch.

        Returns:
          The next damping, the reduction ratio, the change that was predicted, whether the step is
          not to be taken, and how often in a row the loss said nothing.
        """
        predicted = taken.predicted if self.by_model else state.latest.predicted

        def measured(_: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
            lam, change = problem.lam, taken.predicted
            if not self.by_model:
                model = problem.model([taken.step])
                change = model(jnp.ones(1, change.dtype)).astype(lam.dtype)
            ratio, nothing = problem.ratio(taken.step, change, value)
            return ratio, change, jnp.where(nothing, state.latest.unchanged + 1, 0)

        regular = (state.curvature.step + 1) % adapts.every == 0
        leap = adapts.is_leap(norm, state.latest.update_norm)
        due = good & (regular | leap)
        before = (state.latest.reduction_ratio, predicted, state.latest.unchanged)
        ratio, predicted, unchanged = when(due, measured, before)
        known = jnp.where(due & (predicted < 0), ratio, 0)
        # A loss that does not change at all, or is none, says nothing of the damping.
        known = jnp.where(due & (unchanged > 0), (adapts.low + adapts.high) / 2, known)
        known = adapts.confirmed(known, state.latest.next_batch_ratio, by_model=self.by_model)
        after, rejected = adapts.judged(problem.lam, known, regular, due & leap)
        return after, ratio, predicted, rejected, unchanged

    def at_rate(
        self, problem: Problem, direction: PyTree, squared: jax.Array, state: KFACState
    ) -> _Step:
        """The step of a given learning rate and momentum."""
        lam, count = problem.lam, state.curvature.step
        rate, beta = at(self.learning_rate, count, lam), at(self.momentum, count, lam)
        clip = jnp.ones_like(lam)
        if self.kl_clip is not None:
            bound, predictions = at(self.kl_clip, count, lam), state.curvature.predictions
            clip = shortening(bound, rate**2 * squared, predictions)
        step = combined((-rate * clip, beta), (direction, state.previous))
        return _Step(step, rate * clip, beta, clip, jnp.zeros_like(lam))

    def by_quadratic_model(
        self, problem: Problem, direction: PyTree, squared: jax.Array, state: KFACState
    ) -> _Step:
        """The step of the rate and momentum that the quadratic model likes best."""
        lam, descent = problem.lam, jax.tree.map(jnp.negative, direction)
        directions = [descent] if is_zero(self.momentum) else [descent, state.previous]
        found = problem.model(directions)
        best = found.minimiser()
        clip = jnp.ones_like(lam)
        if self.kl_clip is not None:
            bound = at(self.kl_clip, state.curvature.step, lam)
            if self.by_excess:
                bound = bound * jnp.maximum(found.excess, 1).astype(lam.dtype)
            length = found.length(best).astype(lam.dtype)
            clip = shortening(bound, length, state.curvature.predictions)
            best = best * clip.astype(best.dtype)
        rate, *others = best.astype(lam.dtype)
        beta = others[0] if others else jnp.zeros_like(rate)
        predicted = found(best).astype(lam.dtype)
        return _Step(combined(list(best), directions), rate, beta, clip, predicted)
