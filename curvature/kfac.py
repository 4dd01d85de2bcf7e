"""K-FAC as an optax transformation: preconditioner, damping, and the length of the step."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from curvature import quadratic
from curvature.adaptive import LevenbergMarquardt, QuadraticModel
from curvature.arguments import (
    Gather,
    Period,
    ScalarOrSchedule,
    at,
    check_instance,
    check_positive,
    check_range,
    check_state,
    check_update,
    default_damping,
    own,
)
from curvature.averaging import Gathered
from curvature.decay import Mask, decaying
from curvature.estimator import Fisher, Kind
from curvature.meshes import entering
from curvature.objective import Objective, Problem, combined, is_zero
from curvature.precision import FAST, Precision
from curvature.preconditioner import (
    CurvatureState,
    Preconditioner,
    masked,
    settled,
    shortening,
)
from curvature.refresh import Cholesky, Method
from curvature.refresh.control import when
from curvature.registry import Registry, check_registry

PyTree = Any
_FISHER, _CHOLESKY = Fisher(), Cholesky()
_KL_CLIP = 1e-3


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
    """

    learning_rate: jax.Array
    momentum: jax.Array
    clipped: jax.Array
    reduction_ratio: jax.Array
    predicted: jax.Array
    next_batch_ratio: jax.Array
    update_norm: jax.Array
    rejected: jax.Array


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


def kfac(
    registry: Registry,
    learning_rate: ScalarOrSchedule | QuadraticModel,
    momentum: ScalarOrSchedule = 0.9,
    damping: ScalarOrSchedule | LevenbergMarquardt | Literal["auto"] = "auto",
    *,
    kind: Kind = _FISHER,
    l2: ScalarOrSchedule = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: Mask = None,
    kl_clip: ScalarOrSchedule | Literal["auto"] | None = "auto",
    relative_damping: bool = False,
    decay: ScalarOrSchedule = 0.95,
    burn_in: int = 0,
    accumulate: int = 1,
    statistics_every: Period = 5,
    statistics_batch: float | None = None,
    refresh_every: Period = 10,
    warmup_steps: int = 20,
    refresh: Method = _CHOLESKY,
    spread: bool = True,
    refresh_over: NamedSharding | None = None,
    gather: Gather = "inverses",
    graft: optax.GradientTransformation | None = None,
    max_factor_dim: int = 8192,
    fallback: optax.GradientTransformation | None = None,
    axis_name: str | Sequence[str] | None = None,
    precision: Precision = FAST,
) -> optax.GradientTransformationExtraArgs:
    """Natural gradient with Kronecker-factored curvature (Martens and Grosse 2015).

    Preconditions with `scale_by_curvature`, then steps by

        v = -learning_rate (G + damping I)^-1 gradient + momentum * previous v

    A skipped step (see there) leaves parameters and momentum alone.

    Args:
      registry: what is in the model, from `curvature.register`.
      learning_rate: a number, a schedule of the step count, or `QuadraticModel()`, which chooses
        the learning rate and the momentum of every step together.
      momentum: the coefficient of the step before, in [0, 1), or a schedule; with
        `QuadraticModel()` zero says that there is none, any other number that it is chosen.
      damping: added to the curvature; a number, a schedule, or `LevenbergMarquardt()`. `"auto"` is
        1e-3, and 0.1 with `relative_damping`.
      kind: what is averaged: `Fisher`, `EmpiricalFisher` or `GaussNewton`.
      l2: of a penalty 1/2 l2 |params|^2 that is trained on beside the loss: its gradient is added
        to the gradient, its curvature to the damping. A number or a schedule.
      weight_decay: decoupled (Loshchilov and Hutter 2019): every step also shrinks the parameters
        by the factor 1 - learning_rate * weight_decay. A number or a schedule.
      weight_decay_mask: which parameters that shrinks, as `optax.add_decayed_weights` takes it.
      kl_clip: bound on 1/2 v'Gv, the change of the model's predictions as a KL divergence: a longer
        step is shortened (Ba et al. 2017). With a given learning rate it is
        taken of the part without momentum, and as the blocks see it. A number, a schedule, or None
        for no bound. `"auto"` is 1e-3 with a given learning rate, without which a rate that is too
        large loses the run, and None with `QuadraticModel()`, which chooses the length itself.
      relative_damping: as `scale_by_curvature` takes it, and all that follow; not with damping or
        rates by the quadratic model, which knows one damping for all.
      decay: weight of the past in the average of the statistics.
      burn_in: calls at the start that only average statistics.
      accumulate: micro-batches for a step. The quadratic model looks at the last one alone.
      statistics_every: steps between statistics; a number or a schedule.
      statistics_batch: the share of a batch's examples that they are taken of.
      refresh_every: steps in which every inverse is renewed once; with `spread=False` a schedule,
        too.
      warmup_steps: steps at the start that all take statistics and renew every inverse.
      refresh: how inverses are renewed.
      spread: whether each of these steps renews a part of them.
      refresh_over: over whose devices they are dealt to be renewed.
      gather: `"inverses"` or `"updates"` from there.
      graft: whose update gives the lengths.
      max_factor_dim: a Kronecker factor wider than this keeps its diagonal only.
      fallback: transformation of the gradients of generic and excluded parameters.
      axis_name: the axis over which gradients were averaged, where `update` runs inside `shard_map`
        or `pmap`; see `scale_by_curvature`. A `value=` given to `update` may be each device's own.
      precision: of the products of float32 in statistics and of inverses.

    Returns:
      An optax transformation with extra arguments; its state is a `KFACState`.

    Raises:
      ValueError: as `scale_by_curvature`.

    >>> import jax, jax.numpy as jnp, optax, curvature
    >>> def loss_fn(params, x, y):
    ...     return curvature.losses.l2_loss(x @ params["w"], y).mean()
    >>> x = jnp.array([[1.0, 0.0], [0.0, 10.0], [1.0, 1.0]])
    >>> y = x @ jnp.array([[1.0], [-2.0]])
    >>> params = {"w": jnp.zeros((2, 1))}
    >>> registry = curvature.register(loss_fn, params, x, y)
    >>> kind = curvature.GaussNewton()
    >>> tx = curvature.kfac(registry, 1.0, 0.0, 1e-6, kind=kind, kl_clip=None)
    >>> grads = jax.grad(loss_fn)(params, x, y)
    >>> updates, _ = tx.update(grads, tx.init(params), params, loss_args=(x, y))
    >>> bool(loss_fn(optax.apply_updates(params, updates), x, y) < 1e-4)  # one Newton step
    True
    """
    check_range("momentum", momentum, 0.0, 1.0)
    check_range("l2", l2, 0.0, float("inf"))
    check_instance("learning_rate", learning_rate)
    if isinstance(damping, str) and damping == "auto":
        damping = default_damping(relative=relative_damping)
    by_model, adapts = isinstance(learning_rate, QuadraticModel), None
    if not by_model:
        check_range("learning_rate", learning_rate, 0.0, float("inf"))
    if isinstance(kl_clip, str) and kl_clip == "auto":
        kl_clip = None if by_model else _KL_CLIP
    if kl_clip is not None:
        check_positive("kl_clip", kl_clip)
    given: Any = damping
    if isinstance(damping, LevenbergMarquardt):
        adapts, given = damping, damping.initial
    if relative_damping and (by_model or adapts):
        raise ValueError(
            "relative_damping is a damping for every block, and the quadratic model has one for "
            "all: give learning_rate and damping as numbers or schedules, or leave it out."
        )
    preconditioner = Preconditioner.create(
        registry,
        kind,
        damping=given,
        relative_damping=relative_damping,
        decay=decay,
        burn_in=burn_in,
        accumulate=accumulate,
        statistics_every=statistics_every,
        statistics_batch=statistics_batch,
        refresh_every=refresh_every,
        warmup_steps=warmup_steps,
        refresh=refresh,
        spread=spread,
        refresh_over=refresh_over,
        gather=gather,
        graft=graft,
        max_factor_dim=max_factor_dim,
        fallback=fallback,
        axis_name=axis_name,
        precision=precision,
    )
    objective = Objective(registry, kind, l2, preconditioner.estimator.axes)
    decayed = decaying(weight_decay, weight_decay_mask)

    def init(params: PyTree) -> KFACState:
        curvature = preconditioner.init(params)
        zero = jnp.zeros_like(curvature.stats.damping)
        start = at(given, curvature.step, zero)
        latest = StepStats(*(zero for _ in StepStats._fields))
        latest = latest._replace(rejected=jnp.zeros((), jnp.int32))
        return own(KFACState(curvature, jax.tree.map(jnp.zeros_like, params), start, latest))

    def update(
        updates: PyTree, state: KFACState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, KFACState]:
        args = check_update(params, extra.pop("loss_args", None))
        check_state(state, KFACState)
        key = extra.pop("key", None)
        lam = extra.pop("damping", None if adapts else given)
        gathered = preconditioner.gathered(updates, state.curvature, params, args, key)
        act = functools.partial(step, gathered, params, args, lam, extra)
        zeros = jax.tree.map(jnp.zeros_like, updates)
        return when(gathered.due, act, (zeros, state._replace(curvature=gathered.state)))

    def step(
        gathered: Gathered,
        params: PyTree,
        args: tuple[PyTree, ...],
        damping: Any,
        extra: dict[str, Any],
        carry: tuple[PyTree, KFACState],
    ) -> tuple[PyTree, KFACState]:
        """The step of the gathered gradient."""
        _, state = carry
        count = state.curvature.step
        lam, fresh = state.next_damping, state.latest.next_batch_ratio
        if damping is not None:
            lam = at(damping, count, lam)
        problem = objective.at(params, args, gathered.gradient, lam, count)
        if adapts and damping is None:
            check = functools.partial(checked, problem, state, adapts, extra.get("value"))
            due = (count > 0) & (by_model | (count % adapts.every == 0))
            lam, fresh = when(due, check, (lam, fresh))
            averages, weight = state.curvature.statistics, state.curvature.weight
            floor = preconditioner.inverses.smallest_damping(averages, weight)
            lam = jnp.maximum(lam, floor.astype(lam.dtype))
            problem = problem._replace(lam=lam)
        direction, squared, curvature = preconditioner.direction(
            gathered._replace(gradient=problem.gradient),
            state.curvature,
            params,
            problem.damping,
            extra,
        )
        descent = jax.tree.map(jnp.negative, direction)
        taken = (by_quadratic_model if by_model else at_rate)(problem, descent, squared, state)
        norm = jnp.sqrt(quadratic.dot(taken.step, taken.step, lam.dtype))
        good = gathered.sound & jnp.isfinite(norm)
        after, ratio, rejected = lam, state.latest.reduction_ratio, jnp.asarray(False)
        predicted = taken.predicted if by_model else state.latest.predicted
        if adapts:
            measure = functools.partial(measured, problem, taken, extra.get("value"))
            regular = (count + 1) % adapts.every == 0
            leap = adapts.is_leap(norm, state.latest.update_norm)
            due = good & (regular | leap)
            ratio, predicted = when(due, measure, (ratio, predicted))
            known = jnp.where(due & (predicted < 0), ratio, 0)
            after, rejected = adapts.judged(lam, known, regular, due & leap)
            failures = (s.stats.failed_refreshes for s in (curvature, state.curvature))
            after = adapts.recovered(after, lam, operator.gt(*failures))
        latest = StepStats(
            taken.rate,
            taken.momentum,
            taken.clipped,
            ratio,
            predicted,
            fresh,
            update_norm=jnp.where(rejected, 0, norm),
            rejected=state.latest.rejected + rejected.astype(jnp.int32),
        )
        before = masked(~rejected, taken.step)
        kept = KFACState(
            settled(good, curvature, state.curvature, rejected),
            *jax.tree.map(
                functools.partial(jnp.where, good), (before, after, latest), tuple(state[1:])
            ),
        )
        asked = taken.rate / taken.clipped
        return masked(good & ~rejected, decayed(taken.step, params, asked, count)), kept

    def measured(problem: Problem, taken: _Step, value: Any, _: Any) -> tuple[jax.Array, jax.Array]:
        """The reduction ratio of a step on its own batch, and the predicted change."""
        lam, predicted = problem.lam, taken.predicted
        if not by_model:
            predicted = problem.model([taken.step])(jnp.ones(1, predicted.dtype)).astype(lam.dtype)
        return problem.ratio(taken.step, predicted, value), predicted

    def checked(
        problem: Problem, state: KFACState, adapts: LevenbergMarquardt, value: Any, _: Any
    ) -> tuple[jax.Array, jax.Array]:
        """The damping after what the step before did to this batch, and that ratio."""
        back = jax.tree.map(jnp.negative, state.previous)
        predicted = state.latest.predicted
        ratio = problem.ratio(back, -predicted, value)
        return adapts.checked(problem.lam, jnp.where(predicted < 0, ratio, 0)), ratio

    def at_rate(problem: Problem, descent: PyTree, squared: jax.Array, state: KFACState) -> _Step:
        """The step of a given learning rate and momentum."""
        lam, count = problem.lam, state.curvature.step
        rate, beta = at(learning_rate, count, lam), at(momentum, count, lam)
        clip = jnp.ones_like(lam)
        if kl_clip is not None:
            clip = shortening(at(kl_clip, count, lam), rate**2 * squared)
        step = combined((rate * clip, beta), (descent, state.previous))
        return _Step(step, rate * clip, beta, clip, jnp.zeros_like(lam))

    def by_quadratic_model(
        problem: Problem, descent: PyTree, squared: jax.Array, state: KFACState
    ) -> _Step:
        """The step of the rate and momentum that the quadratic model likes best."""
        lam = problem.lam
        directions = [descent] if is_zero(momentum) else [descent, state.previous]
        found = problem.model(directions)
        best = found.minimiser()
        clip = jnp.ones_like(lam)
        if kl_clip is not None:
            bound = at(kl_clip, state.curvature.step, lam)
            clip = shortening(bound, found.length(best).astype(lam.dtype))
            best = best * clip.astype(best.dtype)
        rate, *others = best.astype(lam.dtype)
        beta = others[0] if others else jnp.zeros_like(rate)
        predicted = found(best).astype(lam.dtype)
        return _Step(combined(list(best), directions), rate, beta, clip, predicted)

    return entering(optax.GradientTransformationExtraArgs(init, update))


def ekfac(
    registry: Registry, learning_rate: ScalarOrSchedule | QuadraticModel, *args: Any, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """`kfac` with eigenvalue-corrected blocks (George et al. 2018) where a layer can have one.

    Args:
      registry: what is in the model, from `curvature.register`.
      learning_rate: as `kfac` takes it.
      *args: as `kfac` takes them.
      **options: as `kfac` takes them.

    Returns:
      An optax transformation with extra arguments; its state is a `KFACState`.
    """
    check_registry(registry)
    return kfac(registry.with_blocks("ekfac"), learning_rate, *args, **options)


def foof(
    registry: Registry, learning_rate: ScalarOrSchedule | QuadraticModel, *args: Any, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """`kfac` with the input factor alone (Benzing 2022) where a layer can have one.

    The output side is a multiple of the identity of the right trace: there is nothing to learn from
    the cotangents but their size.

    Args:
      registry: what is in the model, from `curvature.register`.
      learning_rate: as `kfac` takes it.
      *args: as `kfac` takes them.
      **options: as `kfac` takes them.

    Returns:
      An optax transformation with extra arguments; its state is a `KFACState`.
    """
    check_registry(registry)
    return kfac(registry.with_blocks("foof"), learning_rate, *args, **options)


# Wrappers such as `optax.inject_hyperparams` go by the names of the arguments.
ekfac.__signature__ = foof.__signature__ = inspect.signature(kfac)  # type: ignore[attr-defined]
