"""The preconditioner alone, as an optax transformation to be chained.

What it needs beyond the gradient arrives as extra arguments of `update`, as `optax.lbfgs` has it.
It is pure, and jitted by its user.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from curvature.estimator import Estimator, Fisher, Kind
from curvature.estimator.bases import BASES
from curvature.registry import Registry

PyTree = Any
ScalarOrSchedule = ArrayLike | Callable[[ArrayLike], ArrayLike]
_FISHER = Fisher()
BlockArrays = dict[str, dict[str, jax.Array]]


class CurvatureStats(NamedTuple):
    """What happened, for any logger.

    Attributes:
      skipped: steps skipped because the gradient, the statistics or the update was not finite.
      failed_refreshes: refreshes whose inverse was not finite, so that the previous one was kept.
      damping: the damping of the latest refresh.
    """

    skipped: jax.Array
    failed_refreshes: jax.Array
    damping: jax.Array


class CurvatureState(NamedTuple):
    """State of `scale_by_curvature`: a pytree of arrays.

    Attributes:
      step: steps taken (skipped ones not counted).
      weight: total weight of the exponential average, which corrects its bias towards zero.
      statistics: the exponential averages before that correction, by layer and factor; of EKFAC
        layers also the bases of the latest refresh, in which corrections are averaged.
      inverse: the arrays of the damped inverse's blocks.
      fallback: the state of the fallback transformation.
      stats: what happened.
    """

    step: jax.Array
    weight: jax.Array
    statistics: BlockArrays
    inverse: BlockArrays
    fallback: optax.OptState
    stats: CurvatureStats


def scale_by_curvature(
    registry: Registry,
    kind: Kind = _FISHER,
    *,
    damping: ScalarOrSchedule = 1e-3,
    decay: float = 0.95,
    statistics_every: int = 1,
    refresh_every: int = 1,
    max_factor_dim: int = 8192,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies gradients by the inverse of a running blockwise curvature.

    `update(grads, state, params, loss_args=(batch,), key=key)` computes statistics at `params` on
    `loss_args` (the arguments of the loss function after `params`), averages them, and applies
    (G + damping I)^-1, with factored damping in Kronecker blocks (Martens and Grosse 2015).

    Layers with the block `"ekfac"` (see `Registry.with_blocks`) average their factors, and their
    corrections in the eigenbasis of the latest refresh. A refresh takes the corrections over to the
    eigenbasis of the averaged factors: they become the diagonal there of the operator that they
    were. The first ones are the products of the factors' eigenvalues, of the right trace.

    A step whose gradient, statistics or update is not finite is skipped: the update is zero, the
    state is as before but for `state.stats.skipped`.

    The damping may also be given to `update`, as `damping=...`; the next refresh takes it.

    Args:
      registry: what is in the model, from `curvature.register`.
      kind: what is averaged: `Fisher`, `EmpiricalFisher` or `GaussNewton`.
      damping: added to the curvature; a number or a schedule of the step count.
      decay: weight of the past in the exponential average of the statistics, in [0, 1).
      statistics_every: steps between statistics.
      refresh_every: steps between inversions.
      max_factor_dim: a Kronecker factor wider than this keeps its diagonal only.
      fallback: transformation of the gradients of generic and excluded parameters, such as
        `optax.scale_by_adam()`. Without one, generic parameters have a diagonal block and the
        gradients of excluded ones pass unchanged.

    Returns:
      An optax transformation with extra arguments; its state is a `CurvatureState`.

    Raises:
      ValueError: at once for an argument out of range; by `update` without `params`, `loss_args`
        or a needed `key`, or with arguments that differ from what was registered.
    """
    check_range("damping", damping, 0.0, float("inf"))
    check_range("decay", decay, 0.0, 1.0)
    _check_period("statistics_every", statistics_every)
    _check_period("refresh_every", refresh_every)
    if fallback is not None:
        registry = registry.without_generic()
    estimator = Estimator(registry, kind, max_factor_dim)
    left = jax.tree.unflatten(jax.tree.structure(registry.params), registry.excluded)
    rest = optax.with_extra_args_support(optax.masked(fallback or optax.identity(), left))

    def init(params: PyTree) -> CurvatureState:
        zero = jnp.zeros((), jnp.int32)
        scalar = jnp.zeros((), jnp.result_type(float))
        stats = CurvatureStats(zero, zero, scalar)
        zeros = estimator.zeros()
        inverse = estimator.operator(zeros).arrays()
        return CurvatureState(zero, scalar, zeros, inverse, rest.init(params), stats)

    def update(
        updates: PyTree,
        state: CurvatureState,
        params: PyTree | None = None,
        *,
        loss_args: tuple[PyTree, ...] | None = None,
        key: jax.Array | None = None,
        damping: ScalarOrSchedule = damping,
        **extra: Any,
    ) -> tuple[PyTree, CurvatureState]:
        args = check_update(params, loss_args)

        def sample() -> tuple[BlockArrays, jax.Array]:
            fresh = estimator.statistics(params, *args, key=key, bases=state.statistics)
            mix = functools.partial(_mix, decay)
            return _but_bases(mix, state.statistics, fresh), mix(state.weight, 1.0)

        averages, weight = every(
            statistics_every, state.step, sample, (state.statistics, state.weight)
        )
        strength = jnp.asarray(damping(state.step) if callable(damping) else damping)
        strength = strength.astype(state.stats.damping.dtype)

        def invert() -> tuple[BlockArrays, BlockArrays, jax.Array, jax.Array]:
            turned = estimator.rebased(averages, restart=state.weight == 0)
            corrected = _but_bases(lambda s: s / weight.astype(s.dtype), turned)
            inverse = estimator.operator(corrected).damped_inverse(strength).arrays()
            good = finite(inverse)
            kept = jax.tree.map(
                functools.partial(jnp.where, good), (turned, inverse), (averages, state.inverse)
            )
            return *kept, jnp.where(good, 0, 1).astype(jnp.int32), strength

        nothing = (averages, state.inverse, jnp.zeros((), jnp.int32), state.stats.damping)
        averages, inverse, failed, used = every(refresh_every, state.step, invert, nothing)
        direction = estimator.operator(inverse) @ updates
        others, fallen = rest.update(updates, state.fallback, params, **extra)
        direction = jax.tree.map(lambda out, o, d: o if out else d, left, others, direction)
        good = finite((updates, averages, direction))
        stats = CurvatureStats(state.stats.skipped, state.stats.failed_refreshes + failed, used)
        new = CurvatureState(state.step + 1, weight, averages, inverse, fallen, stats)
        kept = jax.tree.map(functools.partial(jnp.where, good), new, state)
        skipped = state.stats.skipped + jnp.where(good, 0, 1).astype(jnp.int32)
        kept = kept._replace(stats=kept.stats._replace(skipped=skipped))
        return jax.tree.map(lambda d: jnp.where(good, d, jnp.zeros_like(d)), direction), kept

    return optax.GradientTransformationExtraArgs(init, update)


def _mix(decay: float, old: jax.Array, new: ArrayLike) -> jax.Array:
    return decay * old + (1 - decay) * jnp.asarray(new, old.dtype)


def _but_bases(function: Callable[..., jax.Array], *trees: BlockArrays) -> BlockArrays:
    """`function` of the statistics in several trees; bases are no averages and stay as they are."""
    first, *rest = trees
    return {
        layer: {
            name: x if name in BASES else function(x, *(tree[layer][name] for tree in rest))
            for name, x in arrays.items()
        }
        for layer, arrays in first.items()
    }


def every(period: int, count: jax.Array, act: Callable[[], Any], otherwise: Any) -> Any:
    """`act()` every `period` steps, at once where that is always."""
    if period == 1:
        return act()
    return jax.lax.cond(count % period == 0, act, lambda: otherwise)


def finite(tree: PyTree) -> jax.Array:
    """Whether all entries are finite."""
    checks = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return functools.reduce(jnp.logical_and, checks, jnp.asarray(True))


def check_update(params: PyTree | None, loss_args: Any) -> tuple[PyTree, ...]:
    """The arguments of the loss; raises where `update` was called without them or `params`."""
    if params is None:
        raise ValueError(
            "update was called without params: call update(grads, state, params, ...)."
        )
    if loss_args is None:
        raise ValueError(
            "update was called without loss_args: pass loss_args=(batch,), the arguments that "
            "loss_fn takes after params."
        )
    if not isinstance(loss_args, (tuple, list)):
        raise TypeError(
            f"loss_args is {type(loss_args).__name__}, expected a tuple of the arguments that "
            "loss_fn takes after params: loss_args=(batch,)."
        )
    return tuple(loss_args)


def check_range(name: str, value: Any, low: float, high: float) -> None:
    """Raises for a number outside [low, high); arrays under a trace are not looked at."""
    if callable(value) or isinstance(value, jax.core.Tracer):
        return
    if not low <= float(np.asarray(value)) < high:
        raise ValueError(f"{name} is {value}, expected a number in [{low:g}, {high:g}).")


def _check_period(name: str, value: int) -> None:
    if not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} is {value!r}, expected a positive integer.")
