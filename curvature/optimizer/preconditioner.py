"""Gradients times the inverse of an averaged curvature: refreshes, skipped steps, the state."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvature.meshes import divided
from curvature.optimizer.arguments import (
    check_configuration,
    check_params,
    check_range,
    check_transformation,
    own,
)
from curvature.optimizer.averaging import Averaging, Gathered
from curvature.optimizer.grafting import grafted
from curvature.optimizer.options import Options
from curvature.optimizer.quadratic import dot
from curvature.optimizer.refresh import Inverses, Now, Refreshed
from curvature.optimizer.uncovered import scaled, set_apart, typical_inverse
from curvature.statistics import Estimator, Kind
from curvature.statistics.stacks import Arrays
from curvature.trace import Layer, Registry, check_registry

PyTree = Any


class CurvatureStats(NamedTuple):
    """What happened, for any logger.

    Attributes:
      skipped: steps skipped because the gradient, the statistics or the update was not finite.
      idle: steps in a row, up to the latest, that were not taken: skipped, or rejected by `kfac`.
        `curvature.check_progress` looks at it.
      failed_refreshes: refreshes in which some inverse was not finite, so that the previous one was
        kept.
      damping: the damping of the latest refresh.
      staleness: how stale the inverses had become that were renewed at the latest refresh, before
        it: the largest; see `Cholesky` and `Eigh`.
    """

    skipped: jax.Array
    idle: jax.Array
    failed_refreshes: jax.Array
    damping: jax.Array
    staleness: jax.Array


class CurvatureState(NamedTuple):
    """State of `scale_by_curvature`: a pytree of arrays.

    Attributes:
      step: steps taken (skipped ones not counted); negative during burn-in.
      weight: total weight of the exponential average, which corrects its bias towards zero.
      statistics: the exponential averages before that correction, by stack of layers of one shape
        (see `curvature.statistics.stacks`) and factor; of EKFAC layers also the bases of the latest
        refresh, in which corrections are averaged.
      inverse: the arrays of the damped inverse's blocks, by stack; see
        `curvature.optimizer.refresh.inverses`.
      refreshed: whether there are inverses; set to False, all are made anew from the statistics.
      micro: micro-batches since the latest step.
      gradient: the sum of their gradients; empty without accumulation.
      fallback: the state of the fallback transformation.
      graft: the state of the transformation whose lengths are taken.
      stats: what happened.
      predictions: the total weight dL/dl of the loss's predictions, when statistics were taken
        first, zero before; None without `kl_clip`.
    """

    step: jax.Array
    weight: jax.Array
    statistics: Arrays
    inverse: Arrays
    refreshed: jax.Array
    micro: jax.Array
    gradient: PyTree
    fallback: optax.OptState
    graft: optax.OptState
    stats: CurvatureStats
    predictions: jax.Array | None = None


def shortening(bound: jax.Array, squared: jax.Array, predictions: jax.Array | None) -> jax.Array:
    """What shortens a step v with v'Gv = `squared` to 1/2 v'Gv <= `bound` a prediction.

    Args:
      bound: on the mean over predictions.
      squared: summed over them.
      predictions: their total weight; zero, where none is known, stands for 1.
    """
    assert predictions is not None
    most = 2 * bound * jnp.where(predictions > 0, predictions, 1).astype(squared.dtype)
    return jnp.sqrt(most / jnp.maximum(squared, most))


@dataclasses.dataclass(frozen=True, eq=False)
class Preconditioner:
    """The parts of `scale_by_curvature`, for transformations that do more."""

    averaging: Averaging
    inverses: Inverses
    graft: optax.GradientTransformationExtraArgs | None
    rest: optax.GradientTransformationExtraArgs
    left: PyTree
    uncovered: tuple[Layer, ...]

    @classmethod
    def create(
        cls,
        registry: Registry,
        kind: Kind,
        options: Options,
        *,
        damping: Any,
        relative_damping: bool,
        clips: bool,
        graft: optax.GradientTransformation | None,
        fallback: optax.GradientTransformation | None,
    ) -> Preconditioner:
        """The arguments are those of `scale_by_curvature`, and are checked here.

        `clips` is whether the length of steps is bounded, so that predictions are weighed.
        """
        check_registry(registry)
        check_range("damping", damping, 0.0, float("inf"))
        check_transformation("fallback", fallback)
        check_transformation("graft", graft)
        excluded = registry.excluded
        registry, uncovered = set_apart(registry)
        if fallback is not None:
            registry = registry.without_generic()
            excluded = registry.excluded
        left = jax.tree.unflatten(jax.tree.structure(registry.params), excluded)
        stacks = options.stacks(registry, kind)
        how = options.refresh, options.turns, relative_damping, options.refresh_over
        return cls(
            Averaging(stacks, options, weighs=clips),
            Inverses(stacks, *how, options.storage_dtype),
            None if graft is None else optax.with_extra_args_support(graft),
            optax.with_extra_args_support(optax.masked(fallback or optax.identity(), left)),
            left,
            uncovered,
        )

    @property
    def estimator(self) -> Estimator:
        """Whose statistics are averaged."""
        return self.averaging.stacks.estimator

    def init(self, params: PyTree) -> CurvatureState:
        """The state before the first step."""
        check_params(params, self.estimator.registry)
        zero = jnp.zeros((), jnp.int32)
        scalar = jnp.zeros((), jnp.result_type(float))
        state = CurvatureState(
            **self.averaging.zeros(params),
            inverse=self.inverses.zeros(),
            refreshed=jnp.zeros((), bool),
            fallback=self.rest.init(params),
            graft=() if self.graft is None else self.graft.init(params),
            stats=CurvatureStats(zero, zero, zero, scalar, scalar),
        )
        return own(state)

    @functools.cached_property
    def _expected(self) -> CurvatureState:
        """The shapes of a state."""
        return jax.eval_shape(self.init, self.estimator.registry.params)

    def gathered(
        self,
        gradient: PyTree,
        state: CurvatureState,
        params: PyTree,
        args: tuple[PyTree, ...],
        key: jax.Array | None,
    ) -> Gathered:
        """Averages statistics and gathers gradients, until there is a step to take."""
        check_configuration(state, self._expected)
        over = self.averaging.stacks.over  # of a state that was made, or restored, elsewhere
        kept = divided((state.statistics, state.inverse), over)
        state = state._replace(statistics=kept[0], inverse=kept[1])
        return self.averaging.gathered(gradient, state, params, args, key)

    def direction(
        self,
        gathered: Gathered,
        state: CurvatureState,
        params: PyTree,
        damping: jax.Array,
        extra: dict[str, Any],
    ) -> tuple[PyTree, jax.Array, CurvatureState]:
        """The preconditioned gradient d, d'(G + damping I)d, and the state after the step.

        The second is as the blocks see it, with 1 / `typical_inverse` in the place of G where there
        are none. None of them need be finite.
        """
        state = self._refreshed(state, damping, gathered.sound)
        gradient, graft, like = gathered.gradient, state.graft, None
        preconditioned = self.inverses.operator(state.statistics, state.inverse) @ gradient
        squared = dot(gradient, preconditioned, damping.dtype)
        direction, length = preconditioned, squared
        if self.graft is not None:
            like, graft = self.graft.update(gradient, state.graft, params, **extra)
            direction, length = grafted(self.averaging.stacks.layers, gradient, direction, like)
            length = length.astype(damping.dtype)
        left, fallback = self.rest.update(gradient, state.fallback, params, **extra)
        if self.uncovered or any(jax.tree.leaves(self.left)):
            scale = typical_inverse(gradient, preconditioned, squared)
            others = self._others(gradient, left, scale, like)
            length += dot(others, others, damping.dtype) / scale
            direction = jax.tree.map(
                lambda out, d, x: x if out else d + x, self.left, direction, others
            )
        state = state._replace(step=state.step + 1, fallback=fallback, graft=graft)
        return direction, length, state

    def _others(self, gradient: PyTree, left: PyTree, scale: jax.Array, like: PyTree) -> PyTree:
        """The step of what has no curvature; `left` where it is the fallback's."""
        if self.graft is None:
            apart = scaled(self.uncovered, gradient, scale)
        else:
            apart, _ = grafted(self.uncovered, gradient, gradient, like)
        return jax.tree.map(lambda out, x, y: x if out else y, self.left, left, apart)

    def _refreshed(
        self, state: CurvatureState, damping: jax.Array, sound: jax.Array
    ) -> CurvatureState:
        """Renews the inverses whose turn it is; all of them where there are none yet."""
        first = ~state.refreshed
        early = first | (state.step < self.averaging.options.warmup_steps)
        now = Now(state.weight, damping, first, restart=first & (state.step <= 0))
        clock = self.averaging.options.clock(state.step, sound, early)
        moving, none = self.inverses.moving(state.statistics), jnp.full_like(damping, -1)
        old = Refreshed(moving, state.inverse, jnp.asarray(False), none)
        moving, inverse, failed, staleness = self.inverses.refresh(
            state.statistics, now, clock, old
        )
        statistics = {k: x | moving.get(k, {}) for k, x in state.statistics.items()}
        stats = state.stats._replace(
            failed_refreshes=state.stats.failed_refreshes + failed.astype(jnp.int32),
            damping=jnp.where(clock.due, damping, state.stats.damping),
            staleness=jnp.where(staleness < 0, state.stats.staleness, staleness),
        )
        return state._replace(
            statistics=statistics,
            inverse=inverse,
            refreshed=state.refreshed | clock.due,
            stats=stats,
        )


def settled(
    good: jax.Array,
    new: CurvatureState,
    old: CurvatureState,
    rejected: jax.Array | bool = False,
) -> CurvatureState:
    """The state after a step, or after a skipped one: what depends on the gradient as before.

    Args:
      good: whether everything was finite, so that the step is not skipped.
      new: the state with the step.
      old: the state before it.
      rejected: whether the step is not taken all the same.
    """

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(good, new, old)

    skipped = old.stats.skipped + jnp.where(good, 0, 1).astype(jnp.int32)
    taken = good & ~jnp.asarray(rejected)
    return new._replace(
        step=choose(new.step, old.step),
        fallback=jax.tree.map(choose, new.fallback, old.fallback),
        graft=jax.tree.map(choose, new.graft, old.graft),
        stats=new.stats._replace(skipped=skipped, idle=jnp.where(taken, 0, old.stats.idle + 1)),
    )


def masked(good: jax.Array, tree: PyTree) -> PyTree:
    """The tree, or zeros."""
    return jax.tree.map(lambda x: jnp.where(good, x, 0), tree)
