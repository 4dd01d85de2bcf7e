"""The preconditioner alone, as an optax transformation to be chained.

What it needs beyond the gradient arrives as extra arguments of `update`, as `optax.lbfgs` has it.
It is pure, and jitted by its user.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from curvature.meshes import entering
from curvature.optimizer.arguments import (
    Gather,
    Period,
    ScalarOrSchedule,
    at,
    check_positive,
    check_state,
    check_update,
    damping_of,
)
from curvature.optimizer.options import Options
from curvature.optimizer.preconditioner import (
    CurvatureState,
    Preconditioner,
    masked,
    settled,
    shortening,
)
from curvature.optimizer.refresh import Cholesky, Method
from curvature.optimizer.refresh.cond import finite, when
from curvature.precision import FAST, Precision
from curvature.sides import WideFactors
from curvature.statistics import Fisher, Kind
from curvature.trace import Registry, check_registry

PyTree = Any
_FISHER, _CHOLESKY = Fisher(), Cholesky()


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
        times every block's mean eigenvalue, or the net's. Factored in Kronecker blocks, corrected
        ones among them (Martens and Grosse 2015), but exactly under `Eigh(factored=False)` and
        `QR(factored=False)`.
      relative_damping: whether damping, also one given to `update`, is a multiple of every block's
        mean eigenvalue, and so goes with the scale of the loss; or of 0.3 of the net's (the mean of
        theirs by their traces) where that is larger: next to nothing is known of a layer behind one
        that starts at zero. By default it is where `damping` is not given.
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
        device, the axis (or a tuple of all axes that divide it) over which gradients were averaged:
        statistics are averaged over it, too, and every device draws targets of its own. Where
        `shard_map` tracks what varies, average the loss, too, inside of what is differentiated: a
        gradient of the device's own loss is the sum over devices there. `()` keeps the devices
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
      ValueError: at once for an argument out of range; by `init` and `update` for what differs from
        what was registered; by `update` without `params`, `loss_args` or a needed `key`, or inside
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
