"""Decoupled weight decay (Loshchilov and Hutter 2019), for recipes that do not take every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from curvature.optimizer.arguments import ScalarOrSchedule, at, check_range
from curvature.optimizer.objective import combined, is_zero
from curvature.optimizer.uncovered import reached
from curvature.trace import Registry

PyTree = Any
Mask = PyTree | Callable[[PyTree], PyTree] | None


def decaying(
    weight_decay: ScalarOrSchedule, mask: Mask, registry: Registry
) -> Callable[[PyTree, PyTree, jax.Array, jax.Array], PyTree]:
    """A function that adds weight decay to a step.

    Args:
      weight_decay: its strength, a number or a schedule.
      mask: which parameters it shrinks, as `optax.add_decayed_weights` takes it.
      registry: what is in the model; what no gradient of its loss reaches stays as it is.

    Returns:
      `decayed(step, params, rate, count)`: the step minus rate * weight_decay * params.

    Raises:
      TypeError: the mask is neither a function nor a tree of booleans.
      ValueError: a strength below zero; by `decayed` without parameters.
    """
    check_range("weight_decay", weight_decay, 0.0, float("inf"))
    if not callable(mask) and not all(
        isinstance(x, bool | np.bool_) for x in jax.tree.leaves(mask)
    ):
        raise TypeError(
            f"weight_decay_mask is {mask!r}, expected a tree of booleans like the parameters, or a "
            "function from parameters to one, as optax.add_decayed_weights takes it."
        )
    mask = _everything if mask is None else mask
    decays = optax.masked(optax.add_decayed_weights(1.0), mask)

    def decayed(step: PyTree, params: PyTree, rate: jax.Array, count: jax.Array) -> PyTree:
        if is_zero(weight_decay):
            return step
        if params is None:
            raise ValueError(
                "update was called without params, which weight_decay shrinks: call "
                "update(grads, state, params, ...)."
            )
        scale = -rate * at(weight_decay, count, rate)
        trained = reached(registry, params)
        zeros = jax.tree.map(jnp.zeros_like, params)
        shrunk, _ = decays.update(zeros, decays.init(params), trained)
        return combined((jnp.ones_like(scale), scale), (step, shrunk))

    return decayed


def _everything(params: PyTree) -> PyTree:
    return jax.tree.map(lambda _: True, params)
