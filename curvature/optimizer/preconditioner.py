"""The preconditioner alone, as an optax transformation to be chained.

What it needs beyond the gradient arrives as extra arguments of `update`, as `optax.lbfgs` has it.
It is pure, and jitted by its user.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from curvature.meshes import divided, entering
from curvature.optimizer.arguments import (
    Gather,
    Period,
    ScalarOrSchedule,
    at,
    check_configuration,
    check_not_masked,
    check_positive,
    check_range,
    check_state,
    check_transformation,
    check_update,
    damping_of,
    own,
)
from curvature.optimizer.averaging import Averaging, Gathered
from curvature.optimizer.grafting import grafted
from curvature.optimizer.options import Options
from curvature.optimizer.quadratic import dot
from curvature.optimizer.refresh import Cholesky, Inverses, Method, Now, Refreshed
from curvature.optimizer.refresh.cond import finite, when
from curvature.optimizer.uncovered import scaled, set_apart, typical
from curvature.precision import FAST, Precision
from curvature.sides import WideFactors
from curvature.statistics import Estimator, Fisher, Kind
from curvature.statistics.stacks import Arrays
from curvature.trace import Layer, Registry, check_registry

PyTree = Any
_FISHER, _CHOLESKY = Fisher(), Cholesky()


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


def scale_by_curvature(
    registry: Registry,
    kind: Kind = _FISHER,
    *,
    damping: ScalarOrSchedule | Literal["auto"] = "auto",
    relative_damping: bool | None = None,
    decay: ScalarOrSchedule = 0.95,
    burn_in: int = 0,
    accumulate: int = 1,
    statistics_every: Period = 1,
    statistics_batch: float | None = None,
    refresh_every: Period = 1,
    warmup_steps: int = 20,
    kl_clip: ScalarOrSchedule | None = None,
    refresh: Method = _CHOLESKY,
    spread: bool = True,
    refresh_over: NamedSharding | None = None,
    gather: Gather = "inverses",
    graft: optax.GradientTransformation | None = None,
    max_factor_dim: int = 8192,
    wide_factors: WideFactors = "diagonal",
    fallback: optax.GradientTransformation | None = None,
    axis_name: str | Sequence[str] | None = None,
    precision: Precision = FAST,
    storage_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies gradients by the inverse of a running blockwise curvature.

    `update(grads, state, params, loss_args=(batch,), key=key)` computes statistics at `params` on
    `loss_args` (the arguments of the loss function after `params`), averages them, and applies
    (G + damping I)^-1.

    Layers with the block `"ekfac"` (see `Registry.with_blocks`) average their factors, and their
    corrections in the eigenbasis of the latest refresh. A refresh takes the corrections over to the
    eigenbasis of the averaged factors: they become the diagonal there of the operator that they
    were. The first ones are the products of the factors' eigenvalues, of the right trace.

    A step whose gradient or statistics are not finite is skipped: the update is zero, the state is
    as before but for `state.stats.skipped`. So is one whose update overflows; its statistics are
    averaged all the same.

    The damping may also be given to `update`, as `damping=...`; the next refresh takes it.

    Args:
      registry: what is in the model, from `curvature.register`.
      kind: what is averaged: `Fisher`, `EmpiricalFisher` or `GaussNewton`.
      damping: added to the curvature; a number or a schedule of the step count; `"auto"` is three
        times every block's mean eigenvalue. Factored in Kronecker blocks, corrected ones among them
        (Martens and Grosse 2015), but exactly under `Eigh(factored=False)` and
        `QR(factored=False)`.
      relative_damping: whether damping, also one given to `update`, is a multiple of every block's
        mean eigenvalue, and so goes with the scale of the loss. By default it is where `damping`
        is not given.
      decay: weight of the past in the exponential average of the statistics, in [0, 1).
      burn_in: calls at the start that only average statistics: their updates are zero.
      accumulate: micro-batches for a step. Every call adds gradient and statistics of its own; each
        last one steps, the updates of the others are zero. Not with `optax.MultiSteps`, which
        would leave the statistics to the last micro-batch.
      statistics_every: steps between statistics; a number or a schedule.
      statistics_batch: the share of a batch's examples that statistics are taken of, in (0, 1]:
        evenly spaced ones, which stand for all. What statistics cost is about proportional to it.
      refresh_every: steps in which every inverse is renewed once; with `spread=False` a schedule,
        too.
      kl_clip: bound on 1/2 d'(G + damping I)d of what is returned, as the blocks see it, for one of
        the loss's predictions (see `kfac`); a longer d is shortened. With a learning rate behind it
        a step is bounded by the rate squared times that. A number, a schedule, or None for no
        bound.
      warmup_steps: steps at the start that all take statistics and renew every inverse: the
        curvature of a new net may grow a thousandfold in ten steps.
      refresh: how: `Cholesky()`, `NewtonSchulz()`, `Eigh()` or `QR()`.
      spread: whether each of these steps renews a part of the inverses; else the first one all.
      refresh_over: a sharding, such as `NamedSharding(mesh, PartitionSpec("data"))`, over whose
        devices factors of one size are dealt to be inverted; by default every device inverts all.
        With a method that has a tolerance, what is kept is then decided by every device for its
        share.
      gather: what is gathered from these devices: `"inverses"` after a refresh, so that every
        device has all of them; or `"updates"` in every step, so that each keeps, and applies, its
        share of the statistics and inverses only. `curvature.state_shardings` says where they are.
        Such a state is filled up for that number of devices.
      graft: a transformation such as `optax.scale_by_adam()`, whose update gives the length of
        every layer's part of the direction; only its direction is the curvature's.
      max_factor_dim: the widest Kronecker factor that is kept as one matrix.
      wide_factors: what a wider one keeps: its `"diagonal"`, or `"blocks"` along it of at most
        `max_factor_dim` coordinates that follow each other.
      fallback: transformation of the gradients of generic and excluded parameters, such as
        `optax.scale_by_adam()`. Without one, generic parameters have a diagonal block and the
        gradients of excluded ones pass unchanged.
      axis_name: where `update` runs inside `shard_map` or `pmap` with a part of the batch on every
        device, the axis (or a tuple of axes) over which gradients were averaged: statistics are
        averaged over it, too, and every device draws targets of its own. `()` keeps the devices
        apart, each with a curvature of its own: an ensemble of runs. Not needed under `jit` alone,
        nor for a loss that has a `shard_map` inside.
      precision: of the products of float32 in statistics and with inverses, as `jax.lax.dot` takes
        it: by default three products of bfloat16 halves where there is hardware for it;
        `"highest"` is float32 everywhere. Factorisations always are.
      storage_dtype: what inverses are kept in between steps: None for that of the statistics, or
        `jnp.bfloat16` for half of their memory, and entries that are right to 0.4 %. They are made,
        and applied, in full; `NewtonSchulz` starts from what is kept, and a `tolerance` sees its
        rounding. Bases of `"ekfac"` blocks are statistics, which stay as they are.

    Returns:
      An optax transformation with extra arguments; its state is a `CurvatureState`.

    Raises:
      ValueError: at once for an argument out of range; by `update` without `params`, `loss_args`
        or a needed `key`, with arguments that differ from what was registered, or inside
        `shard_map` or `pmap` without `axis_name`.
    """
    options = Options.of(locals())
    if kl_clip is not None:
        check_positive("kl_clip", kl_clip)
    absolute = not check_registry(registry).objective
    usual, relative_damping = damping_of(damping, relative_damping, absolute=absolute)
    preconditioner = Preconditioner.create(
        registry,
        kind,
        options,
        damping=usual,
        relative_damping=relative_damping,
        clips=kl_clip is not None,
        graft=graft,
        fallback=fallback,
    )

    def update(
        updates: PyTree,
        state: CurvatureState,
        params: PyTree | None = None,
        *,
        loss_args: tuple[PyTree, ...] | None = None,
        key: jax.Array | None = None,
        damping: ScalarOrSchedule = usual,
        **extra: Any,
    ) -> tuple[PyTree, CurvatureState]:
        args = check_update(params, loss_args)
        check_state(state, CurvatureState)
        gathered = preconditioner.gathered(updates, state, params, args, key)

        def act(carry: tuple[PyTree, CurvatureState]) -> tuple[PyTree, CurvatureState]:
            _, state = carry
            lam = at(damping, state.step, state.stats.damping)
            direction, squared, new = preconditioner.direction(gathered, state, params, lam, extra)
            if kl_clip is not None:
                clip = shortening(at(kl_clip, state.step, lam), squared, new.predictions)
                direction = jax.tree.map(lambda d: d * clip.astype(d.dtype), direction)
            good = gathered.sound & finite(direction)
            return masked(good, direction), settled(good, new, state)

        zeros = jax.tree.map(jnp.zeros_like, updates)
        return when(gathered.due, act, (zeros, gathered.state))

    return entering(optax.GradientTransformationExtraArgs(preconditioner.init, update))


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
        check_not_masked(params, self.estimator.registry.params)
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

        The second is as the blocks see it, with 1 / `typical` in the place of G where there are
        none. None of them need be finite.
        """
        state = self._refreshed(state, damping, gathered.sound)
        gradient, graft = gathered.gradient, state.graft
        direction = self.inverses.operator(state.statistics, state.inverse) @ gradient
        squared = dot(gradient, direction, damping.dtype)
        scale = typical(gradient, direction, squared)
        if self.graft is None:
            apart = scaled(self.uncovered, gradient, scale)
        else:
            like, graft = self.graft.update(gradient, state.graft, params, **extra)
            direction, squared = grafted(self.averaging.stacks.layers, gradient, direction, like)
            apart, _ = grafted(self.uncovered, gradient, gradient, like)
        left, fallback = self.rest.update(gradient, state.fallback, params, **extra)
        others = jax.tree.map(lambda out, x, y: x if out else y, self.left, left, apart)
        squared = squared.astype(damping.dtype) + dot(others, others, damping.dtype) / scale
        direction = jax.tree.map(
            lambda out, d, x: x if out else d + x, self.left, direction, others
        )
        state = state._replace(step=state.step + 1, fallback=fallback, graft=graft)
        return direction, squared, state

    def _refreshed(
        self, state: CurvatureState, damping: jax.Array, sound: jax.Array
    ) -> CurvatureState:
        """Renews the inverses whose turn it is; all of them where there are none yet."""
        first = ~state.refreshed
        early = first | (state.step < self.averaging.options.warmup_steps)
        now = Now(state.weight, damping, first, restart=first & (state.step <= 0))
        clock = self.averaging.options.clock(state.step, sound, early)
        moving, staleness = self.inverses.moving(state.statistics), jnp.zeros_like(damping)
        old = Refreshed(moving, state.inverse, jnp.asarray(False), staleness)
        moving, inverse, failed, staleness = self.inverses.refresh(
            state.statistics, now, clock, old
        )
        statistics = {k: x | moving.get(k, {}) for k, x in state.statistics.items()}
        stats = state.stats._replace(
            failed_refreshes=state.stats.failed_refreshes + failed.astype(jnp.int32),
            damping=jnp.where(clock.due, damping, state.stats.damping),
            staleness=jnp.where(clock.due, staleness, state.stats.staleness),
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
    return jax.tree.map(lambda x: jnp.where(good, x, jnp.zeros_like(x)), tree)
