"""Adam in the eigenbasis of the curvature, as an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from curvature.optimizer.arguments import Gather, Period, ScalarOrSchedule, at, check_range
from curvature.optimizer.decay import Mask, decaying
from curvature.optimizer.eigenbasis import EigenbasisState, options_of, transformation
from curvature.optimizer.moments import Layout
from curvature.optimizer.refresh import QR, Eigh
from curvature.optimizer.shampoo import Shampoo
from curvature.precision import FAST, Precision
from curvature.sides import WideFactors
from curvature.statistics import Fisher, Kind
from curvature.trace import Registry

PyTree = Any
_FISHER, _QR = Fisher(), QR()


def eigen_adam(
    registry: Registry,
    learning_rate: ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-8,
    *,
    nesterov: bool = True,
    kind: Kind | Shampoo = _FISHER,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: Mask = None,
    decay: ScalarOrSchedule | None = None,
    burn_in: int = 0,
    accumulate: int = 1,
    statistics_every: Period | None = None,
    statistics_batch: float | None = None,
    refresh_every: Period = 5,
    warmup_steps: int = 20,
    refresh: Eigh | QR = _QR,
    spread: bool = True,
    refresh_over: NamedSharding | None = None,
    gather: Gather = "inverses",
    max_factor_dim: int = 8192,
    wide_factors: WideFactors = "diagonal",
    axis_name: str | Sequence[str] | None = None,
    precision: Precision = FAST,
    storage_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam in the eigenbasis of every layer's Kronecker factors.

    For large nets whose gradients are noisy, such as transformers. A step moves every coordinate by
    about the learning rate whatever the curvature is, as Adam's does, so that there is no damping
    and no bound on its length to choose. Learning rates are about those that suit Adam; a short
    linear warm-up and a decay to zero suit it as well.

    With `kind=Shampoo()` this is SOAP (Vyas et al. 2024); see `in_eigenbasis`.

    Args:
      registry: what is in the model, from `curvature.register`.
      learning_rate: a number, or a schedule of the step count.
      b1: weight of the past in the mean of the gradients.
      b2: weight of the past in their mean square, which is taken in the eigenbasis.
      eps: added to the root of the mean square.
      nesterov: whether the mean looks one step ahead (Dozat 2016), as `optax.nadam` does.
      kind: of which factors the eigenbasis is, as `in_eigenbasis` takes it, and all that follow.
      weight_decay: decoupled: every step also shrinks the parameters by the factor
        1 - learning_rate * weight_decay, but for those that no gradient of the loss reaches. A
        number or a schedule.
      weight_decay_mask: which parameters that shrinks, as `optax.add_decayed_weights` takes it.
      decay: weight of the past in the average of the factors, as `in_eigenbasis` takes it.
      burn_in: calls at the start that only average statistics.
      accumulate: micro-batches for a step.
      statistics_every: steps between statistics, as `in_eigenbasis` takes it.
      statistics_batch: the share of a batch's examples that they are taken of.
      refresh_every: steps in which every basis is renewed once; with `spread=False` a schedule,
        too.
      warmup_steps: steps at the start that all take statistics and renew every basis.
      refresh: how bases are found.
      spread: whether each of these steps renews a part of them.
      refresh_over: over whose devices they are dealt to be renewed.
      gather: `"inverses"` or `"updates"` from there, as `in_eigenbasis` takes it.
      max_factor_dim: the widest side that has one eigenbasis.
      wide_factors: what a wider one has: its own coordinates (`"diagonal"`), or an eigenbasis for
        each of `"blocks"` of at most `max_factor_dim` coordinates that follow each other.
      axis_name: as `scale_by_curvature` takes it.
      precision: of products, as `in_eigenbasis` takes it.
      storage_dtype: what bases are kept in between steps, as `jnp.bfloat16`.

    Returns:
      An optax transformation with extra arguments; its state is an `EigenbasisState`. A skipped
      step (see `scale_by_curvature`) leaves the parameters alone.

    Raises:
      ValueError: as `in_eigenbasis`.

    >>> import jax, jax.numpy as jnp, optax, curvature
    >>> def loss_fn(params, x, y):
    ...     return curvature.losses.l2_loss(x @ params["w"], y).mean()
    >>> params, x, y = {"w": jnp.ones((2, 3))}, jnp.ones((4, 2)), jnp.zeros((4, 3))
    >>> tx = curvature.eigen_adam(curvature.register(loss_fn, params, x, y), 1e-2)
    >>> grads, key = jax.grad(loss_fn)(params, x, y), jax.random.key(0)
    >>> updates, state = tx.update(grads, tx.init(params), params, loss_args=(x, y), key=key)
    >>> bool(loss_fn(optax.apply_updates(params, updates), x, y) < loss_fn(params, x, y))
    True
    """
    options = options_of(locals())
    check_range("learning_rate", learning_rate, 0.0, float("inf"))
    decayed = decaying(weight_decay, weight_decay_mask, registry)
    core = transformation(
        registry,
        optax.scale_by_adam(b1, b2, eps, nesterov=nesterov),
        Layout.of(optax.scale_by_adam()),  # b1 and b2 may be traced: a trial needs numbers
        kind,
        options,
    )

    def update(
        updates: PyTree, state: EigenbasisState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, EigenbasisState]:
        direction, after = core.update(updates, state, params, **extra)
        count = state.step
        rate = at(learning_rate, count, state.weight)
        step = jax.tree.map(lambda d: -rate.astype(d.dtype) * d, direction)
        taken = (count >= 0) & (after.step > count)
        return decayed(step, params, jnp.where(taken, rate, 0), count), after

    return optax.GradientTransformationExtraArgs(core.init, update)
