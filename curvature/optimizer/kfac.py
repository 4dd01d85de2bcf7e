"""K-FAC as an optax transformation: preconditioner, damping, and the length of the step."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import optax
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from curvature.meshes import entering
from curvature.optimizer.adaptive import LevenbergMarquardt, QuadraticModel
from curvature.optimizer.arguments import (
    Gather,
    Period,
    ScalarOrSchedule,
    check_instance,
    check_positive,
    check_range,
    damping_of,
)
from curvature.optimizer.decay import Mask, decaying
from curvature.optimizer.descent import Descent
from curvature.optimizer.objective import Objective
from curvature.optimizer.options import Options
from curvature.optimizer.preconditioner import Preconditioner
from curvature.optimizer.refresh import Cholesky, Method
from curvature.precision import FAST, Precision
from curvature.sides import WideFactors
from curvature.statistics import Fisher, Kind
from curvature.trace import Registry, check_registry

PyTree = Any
_FISHER, _CHOLESKY = Fisher(), Cholesky()
_KL_CLIP = 1e-3
_MODEL_KL_CLIP, _ADAPTIVE_KL_CLIP = 3e-2, 0.3  # where the quadratic model chooses the length


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
    relative_damping: bool | None = None,
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
    wide_factors: WideFactors = "diagonal",
    fallback: optax.GradientTransformation | None = None,
    axis_name: str | Sequence[str] | None = None,
    precision: Precision = FAST,
    storage_dtype: DTypeLike | None = None,
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
        three times every block's mean eigenvalue, or the net's, as `relative_damping` takes it;
        with `QuadraticModel()`, and where the loss carries curvature alone, 1e-3.
      kind: what is averaged: `Fisher`, `EmpiricalFisher` or `GaussNewton`.
      l2: of a penalty 1/2 l2 |params|^2 that is trained on beside the loss: its gradient is added
        to the gradient, its curvature to the damping. A number or a schedule. Parameters that no
        gradient of the loss reaches (frozen by `stop_gradient`, or unused) are not penalised.
      weight_decay: decoupled (Loshchilov and Hutter 2019): every step also shrinks the parameters
        by the factor 1 - learning_rate * weight_decay, but for those that no gradient reaches. A
        number or a schedule.
      weight_decay_mask: which parameters that shrinks, as `optax.add_decayed_weights` takes it.
      kl_clip: bound on what a step v changes one of the loss's predictions by, in the mean, as a KL
        divergence: a longer step is shortened (Ba et al. 2017). That is 1/2 v'Gv where the loss is
        a mean over predictions, and is divided by their total weight where it is a sum over some.
        With a given learning rate it is taken of the part without momentum, and as the blocks see
        it. A number, a schedule, or None for no bound. `"auto"` is 1e-3 with a given learning rate,
        without which a rate that is too large loses the run. With `QuadraticModel()`, which knows
        no batch but its own, it is 3e-2. Where `LevenbergMarquardt()` looks after it, it is 0.3, or
        0.3 times 1/2 (z - t)^2 / variance in the mean over predictions where squared errors make
        that larger than 1.
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
      max_factor_dim: the widest Kronecker factor that is kept as one matrix.
      wide_factors: what a wider one keeps: its `"diagonal"`, or `"blocks"` along it of at most
        `max_factor_dim` coordinates that follow each other.
      fallback: transformation of the gradients of generic and excluded parameters.
      axis_name: the axis over which gradients were averaged, where `update` runs inside `shard_map`
        or `pmap`; see `scale_by_curvature`. A `value=` given to `update` may be each device's own.
      precision: of the products of float32 in statistics and of inverses.
      storage_dtype: what inverses are kept in between steps, as `jnp.bfloat16`.

    Returns:
      An optax transformation with extra arguments; its state is a `KFACState`. Its
      `update(gradient, state, params, *, loss_args, key=None, value=None)` takes the arguments of
      the loss function after `params` as the tuple `loss_args`, a random key for kinds that draw,
      and, for `LevenbergMarquardt`, the loss of this batch at `params` as `value`, without which
      it is evaluated once more. The gradient is that of the loss alone, without `l2`.

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
    options = Options.of(locals())
    check_range("momentum", momentum, 0.0, 1.0)
    check_range("l2", l2, 0.0, float("inf"))
    check_instance("learning_rate", learning_rate)
    by_model, adapts = isinstance(learning_rate, QuadraticModel), None
    absolute = by_model or not check_registry(registry).objective
    damping, relative_damping = damping_of(damping, relative_damping, absolute=absolute)
    if not by_model:
        check_range("learning_rate", learning_rate, 0.0, float("inf"))
    by_excess = False
    if isinstance(kl_clip, str) and kl_clip == "auto":
        by_excess = by_model and isinstance(damping, LevenbergMarquardt)
        of_model = _ADAPTIVE_KL_CLIP if by_excess else _MODEL_KL_CLIP
        kl_clip = of_model if by_model else _KL_CLIP
    if kl_clip is not None:
        check_positive("kl_clip", kl_clip)
    given: Any = damping
    if isinstance(damping, LevenbergMarquardt):
        adapts, given = damping, damping.initial
        if not registry.objective:
            raise ValueError(
                "LevenbergMarquardt compares values of the registered loss, which carries "
                "curvature alone (register's objective=False, or log_amplitude): its value is not "
                "what is minimised. Give damping as a number or a schedule."
            )
    if relative_damping and (by_model or adapts):
        raise ValueError(
            "relative_damping is a damping for every block, and the quadratic model has one for "
            "all: give learning_rate and damping as numbers or schedules, or leave it out."
        )
    preconditioner = Preconditioner.create(
        registry,
        kind,
        options,
        damping=given,
        relative_damping=relative_damping,
        clips=kl_clip is not None,
        graft=graft,
        fallback=fallback,
    )
    objective = Objective(registry, kind, l2, preconditioner.estimator.axes)
    decayed = decaying(weight_decay, weight_decay_mask, registry)
    descent = Descent(
        preconditioner,
        objective,
        learning_rate,
        momentum,
        given,
        adapts,
        kl_clip,
        by_excess,
        decayed,
    )
    return entering(optax.GradientTransformationExtraArgs(descent.init, descent.update))


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
