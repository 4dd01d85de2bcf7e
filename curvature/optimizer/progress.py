"""A run that takes no steps any more, noticed by its loop."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from curvature.optimizer.descent import KFACState
from curvature.optimizer.eigenbasis import EigenbasisState
from curvature.optimizer.preconditioner import CurvatureState

PyTree = Any


def check_progress(state: PyTree, limit: int = 20) -> None:
    """Raises where an optimizer took none of its latest steps, as after a run has diverged.

    A step is not taken where its gradient, its statistics or its update is not finite, or where
    `LevenbergMarquardt` rejects it. One such step may be an accident; many in a row are a run that
    is lost. To be called outside of `jit`: it waits for the state.

        for i in range(steps):
            params, opt_state = step(params, opt_state, batch, key)
            curvature.check_progress(opt_state)

    Args:
      state: the state of one of these optimizers, or of a transformation made of them.
      limit: so many steps in a row are accepted.

    Raises:
      RuntimeError: more than `limit` steps in a row were not taken, or the loss changed by nothing
        at all, or was not finite, in as many measurements of `LevenbergMarquardt`.

    >>> import jax.numpy as jnp, curvature
    >>> def loss_fn(params, x):
    ...     return curvature.losses.l2_loss(x @ params["w"]).mean()
    >>> params, x = {"w": jnp.ones((2, 3))}, jnp.ones((4, 2))
    >>> tx = curvature.kfac(curvature.register(loss_fn, params, x), 0.1)
    >>> curvature.check_progress(tx.init(params))
    """
    for idle, skipped, unchanged in jax.device_get(_streaks(state)):
        _check(idle, skipped, unchanged, limit)


def stop_if_idle(state: PyTree, limit: int) -> None:
    """`check_progress` inside of `jit`, for adapters: the call on the device fails.

    By a callback to the host, in a branch that is taken after that many idle steps alone. Programs
    with callbacks are not kept in JAX's persistent compilation cache.

    Args:
      state: as `check_progress` takes it; nothing happens where there is none of these in it.
      limit: so many steps in a row are accepted.
    """
    check = functools.partial(_check, limit=limit)
    for streaks in _streaks(state):
        idle, _, unchanged = streaks
        late = jnp.any(idle > limit) | jnp.any(unchanged > limit)
        jax.lax.cond(late, lambda *xs: jax.debug.callback(check, *xs), lambda *_: None, *streaks)


def _check(idle: Any, skipped: Any, unchanged: Any, limit: int) -> None:
    idle, skipped, unchanged = map(np.max, (idle, skipped, unchanged))  # of several runs, by vmap
    if unchanged > limit:
        raise RuntimeError(
            f"The registered loss changed by nothing at all, or was not finite, in the latest "
            f"{unchanged} measurements of LevenbergMarquardt, though the parameters changed: it is "
            "not what is minimised. Give damping as a number or a schedule, and register it with "
            "objective=False."
        )
    if idle > limit:
        raise RuntimeError(
            f"The optimizer took none of its latest {idle} steps (of all its steps, {skipped} were "
            "skipped because something was not finite). Where parameters or losses are not finite "
            "either, the run has diverged: go on from an earlier checkpoint with a lower learning "
            "rate, more damping, or a smaller bound on the length of a step (kl_clip). Where they "
            "are, look at the batches, and at the loss that update is given (value=)."
        )


def _streaks(state: PyTree) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """(`idle`, `skipped`, `unchanged`) of every optimizer in a tree of states.

    And of `optax.apply_if_finite`, which keeps gradients from them that are not finite.
    """
    kinds = (KFACState, CurvatureState, EigenbasisState, optax.ApplyIfFiniteState)

    def is_state(part: Any) -> bool:
        return isinstance(part, kinds)

    none, found = jnp.zeros((), jnp.int32), []
    for part in filter(is_state, jax.tree.leaves(state, is_leaf=is_state)):
        if isinstance(part, optax.ApplyIfFiniteState):
            found.append((part.notfinite_count, part.total_notfinite, none))
            found += _streaks(part.inner_state)
        else:
            unchanged = getattr(part.stats, "unchanged", none)
            found.append((part.stats.idle, part.stats.skipped, unchanged))
    return found
