"""What to do when, inside a jitted step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


def when(due: jax.Array | bool, act: Callable[[T], T], value: T) -> T:
    """`act(value)` if it is due, else the value; the value is what may change, and no more.

    A conditional copies what it returns.
    """
    if isinstance(due, bool):
        return act(value) if due else value
    return jax.lax.cond(due, act, lambda value: value, value)


def finite(tree: Any) -> jax.Array:
    """Whether all entries are finite.

    What is not finite survives in a sum; division by the size first keeps finite sums finite. One
    sum of sums is compiled many times faster than a conjunction of conjunctions.
    """
    means = [jnp.sum(x / x.size).astype(float) for x in jax.tree.leaves(tree) if x.size]
    return jnp.all(jnp.isfinite(jnp.stack(means))) if means else jnp.asarray(True)
