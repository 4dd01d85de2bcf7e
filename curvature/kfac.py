"""K-FAC as an optax transformation: preconditioner, damping, and the length of the step."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvature import quadratic
from curvature.adaptive import LevenbergMarquardt, QuadraticModel
from curvature.estimator import Fisher, Kind
from curvature.preconditioner import (
    CurvatureState,
    ScalarOrSchedule,
    check_range,
    check_update,
    every,
    finite,
    scale_by_curvature,
)
from curvature.registry import Registry

PyTree = Any
_FISHER = Fisher()


class StepStats(NamedTuple):
    """How the latest step was chosen.

    Attributes:
      learning_rate: the coefficient of the preconditioned gradient.
      momentum: the coefficient of the step before.
      clipped: the factor by which `kl_clip` shortened it.
      reduction_ratio: the latest measured ratio of the loss's change to the predicted one.
    """

    learning_rate: jax.Array
    momentum: jax.Array
    clipped: jax.Array
    reduction_ratio: jax.Array


class KFACStats(NamedTuple):
    """What happened: the entries of `CurvatureStats` and of `StepStats`."""

    skipped: jax.Array
    failed_refreshes: jax.Array
    damping: jax.Array
    learning_rate: jax.Array
    momentum: jax.Array
    clipped: jax.Array
    reduction_ratio: jax.Array


class KFACState(NamedTuple):
    """State of `kfac`: a pytree of arrays.

    Attributes:
      curvature: the preconditioner's state; its `stats` count skipped steps.
      previous: the step before, a tree like the parameters.
      damping: the damping of the next step.
      latest: how the latest step was chosen.
    """

    curvature: CurvatureState
    previous: PyTree
    damping: jax.Array
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
    damping: ScalarOrSchedule | LevenbergMarquardt = 1e-3,
    *,
    kind: Kind = _FISHER,
    decay: float = 0.95,
    statistics_every: int = 1,
    refresh_every: int = 1,
    kl_clip: float | None = None,
    max_factor_dim: int = 8192,
    fallback: optax.GradientTransformation | None = None,
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
      damping: added to the curvature; a number, a schedule, or `LevenbergMarquardt()`.
      kind: what is averaged: `Fisher`, `EmpiricalFisher` or `GaussNewton`.
      decay: weight of the past in the exponential average of the statistics, in [0, 1).
      statistics_every: steps between statistics.
      refresh_every: steps between inversions.
      kl_clip: bound on 1/2 v'Gv, the change of the model's predictions as a KL divergence: a longer
        step is shortened. With a given learning rate it is taken of the part without momentum, and
        as the blocks see it. None: no bound.
      max_factor_dim: a Kronecker factor wider than this keeps its diagonal only.
      fallback: transformation of the gradients of generic and excluded parameters, such as
        `optax.scale_by_adam()`. Without one, generic parameters have a diagonal block and the
        gradients of excluded ones pass unchanged.

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
    >>> tx = curvature.kfac(registry, 1.0, momentum=0.0, damping=1e-6, kind=kind)
    >>> grads = jax.grad(loss_fn)(params, x, y)
    >>> updates, _ = tx.update(grads, tx.init(params), params, loss_args=(x, y))
    >>> bool(loss_fn(optax.apply_updates(params, updates), x, y) < 1e-4)  # one Newton step
    True
    """
    check_range("momentum", momentum, 0.0, 1.0)
    by_model = isinstance(learning_rate, QuadraticModel)
    if not by_model:
        check_range("learning_rate", learning_rate, 0.0, float("inf"))
    if kl_clip is not None:
        check_range("kl_clip", kl_clip, 0.0, float("inf"))
    adapts, given = None, damping
    if isinstance(damping, LevenbergMarquardt):
        adapts, given = damping, damping.initial
    assert not isinstance(given, LevenbergMarquardt)
    precondition = scale_by_curvature(
        registry,
        kind,
        damping=given,
        decay=decay,
        statistics_every=statistics_every,
        refresh_every=refresh_every,
        max_factor_dim=max_factor_dim,
        fallback=fallback,
    )

    def init(params: PyTree) -> KFACState:
        curvature = precondition.init(params)
        zero = jnp.zeros_like(curvature.stats.damping)
        start = _at(given, curvature.step, zero)
        latest = StepStats(zero, zero, zero, zero)
        return KFACState(curvature, jax.tree.map(jnp.zeros_like, params), start, latest)

    def model(
        params: PyTree, args: Any, gradient: PyTree, steps: Sequence[PyTree], lam: jax.Array
    ) -> quadratic.Quadratic:
        loss_fn, has_aux = registry.loss_fn, registry.has_aux
        return quadratic.along(loss_fn, has_aux, params, args, gradient, steps, lam)

    def update(
        updates: PyTree, state: KFACState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, KFACState]:
        args = check_update(params, extra.get("loss_args"))
        count = state.curvature.step
        lam = state.damping if adapts else _at(given, count, state.damping)
        direction, curvature = precondition.update(
            updates, state.curvature, params, **{"damping": lam, **extra}
        )
        descent = jax.tree.map(jnp.negative, direction)
        good = curvature.stats.skipped == state.curvature.stats.skipped
        chosen = at_rate if not by_model else by_quadratic_model
        step = chosen(updates, descent, state, params, args, lam)
        good &= finite(step.step)

        def measured() -> tuple[jax.Array, jax.Array]:
            assert adapts is not None
            predicted = step.predicted
            if not by_model:
                predicted = model(params, args, updates, [step.step], lam)(jnp.ones(1, lam.dtype))
            moved = optax.apply_updates(params, step.step)
            change = _loss(registry, moved, args) - _loss(registry, params, args)
            ratio = change.astype(lam.dtype) / predicted.astype(lam.dtype)
            return adapts.updated(lam, ratio), ratio

        after, ratio = lam, state.latest.reduction_ratio
        if adapts:
            after, ratio = every(adapts.every, count + 1, measured, (lam, ratio))
        latest = StepStats(step.rate, step.momentum, step.clipped, ratio)
        new = KFACState(curvature, step.step, after, latest)
        kept = jax.tree.map(functools.partial(jnp.where, good), new, state)
        skipped = state.curvature.stats.skipped + jnp.where(good, 0, 1).astype(jnp.int32)
        stats = kept.curvature.stats._replace(skipped=skipped)
        kept = kept._replace(curvature=kept.curvature._replace(stats=stats))
        return jax.tree.map(lambda s: jnp.where(good, s, jnp.zeros_like(s)), step.step), kept

    def at_rate(
        gradient: PyTree, descent: PyTree, state: KFACState, params: PyTree, args: Any, lam: Any
    ) -> _Step:
        """The step of a given learning rate and momentum."""
        rate = _at(learning_rate, state.curvature.step, lam)
        beta = _at(momentum, state.curvature.step, lam)
        clip = jnp.ones_like(lam)
        if kl_clip is not None:
            # Of v = -rate (G + lam I)^-1 g, v'(G + lam I)v is rate^2 g'(G + lam I)^-1 g.
            clip = _clip(kl_clip, -(rate**2) * quadratic.dot(gradient, descent, lam.dtype))
        step = _combined((rate * clip, beta), (descent, state.previous))
        return _Step(step, rate * clip, beta, clip, jnp.zeros_like(lam))

    def by_quadratic_model(
        gradient: PyTree, descent: PyTree, state: KFACState, params: PyTree, args: Any, lam: Any
    ) -> _Step:
        """The step of the rate and momentum that the quadratic model likes best."""
        directions = [descent]
        if callable(momentum) or isinstance(momentum, jax.core.Tracer) or momentum:
            directions.append(state.previous)
        found = model(params, args, gradient, directions, lam)
        best = found.minimiser()
        clip = jnp.ones_like(lam)
        if kl_clip is not None:
            clip = _clip(kl_clip, found.length(best).astype(lam.dtype))
            best = best * clip.astype(best.dtype)
        rate, *others = best.astype(lam.dtype)
        beta = others[0] if others else jnp.zeros_like(rate)
        return _Step(_combined(list(best), directions), rate, beta, clip, found(best))

    return optax.GradientTransformationExtraArgs(init, update)


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
    return kfac(registry.with_blocks("foof"), learning_rate, *args, **options)


def _at(value: Any, count: jax.Array, like: jax.Array) -> jax.Array:
    """A number, or a schedule at a step."""
    return jnp.asarray(value(count) if callable(value) else value).astype(like.dtype)


def _combined(coefficients: Sequence[jax.Array], trees: Sequence[PyTree]) -> PyTree:
    """The sum of coefficient times tree, in the trees' dtypes."""

    def one(*leaves: jax.Array) -> jax.Array:
        terms = [c.astype(x.dtype) * x for c, x in zip(coefficients, leaves, strict=True)]
        return functools.reduce(jnp.add, terms)

    return jax.tree.map(one, *trees)


def _clip(bound: float, length: jax.Array) -> jax.Array:
    """What shortens a step v with v'Gv = length to 1/2 v'Gv <= bound."""
    return jnp.sqrt(2 * bound / jnp.maximum(length, 2 * bound))


def _loss(registry: Registry, params: PyTree, args: tuple[PyTree, ...]) -> jax.Array:
    out = registry.loss_fn(params, *args)
    value: jax.Array = out[0] if registry.has_aux else out
    return value
