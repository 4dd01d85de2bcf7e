"""What to do when, inside a jitted step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


def cond(
    pred: jax.Array | bool, true: Callable[..., T], false: Callable[..., T], *operands: Any
) -> T:
    """`jax.lax.cond`; by Python where it is known which branch is taken.

    That is so outside of `jit`, where `jax.lax.cond` would compile new closures in every call.
    """
    if isinstance(pred, jax.core.Tracer):
        taken: T = jax.lax.cond(pred, true, false, *operands)
        return taken
    return true(*operands) if pred else false(*operands)


def when(due: jax.Array | bool, act: Callable[[T], T], value: T) -> T:
    """`act(value)` if it is due, else the value; the value is what may change, and no more.

    A conditional copies what it returns.
    """
    return cond(due, act, lambda value: value, value)


def loop(first: jax.Array, last: jax.Array, body: Callable[[jax.Array, T], T], value: T) -> T:
    """`jax.lax.fori_loop`; by Python where the bounds are known, as in `cond`."""
    if isinstance(last, jax.core.Tracer):
        found: T = jax.lax.fori_loop(first, last, body, value)
        return found
    for i in range(int(first), int(last)):
        value = body(jnp.asarray(i, last.dtype), value)
    return value


def finite(tree: Any) -> jax.Array:
    """Whether all entries are finite.

    What is not finite survives in a sum; division by the size first keeps finite sums finite. One
    sum of sums is compiled many times faster than a conjunction of conjunctions.
    """
    means = [jnp.sum(x / x.size).astype(float) for x in jax.tree.leaves(tree) if x.size]
    return jnp.all(jnp.isfinite(jnp.stack(means))) if means else jnp.asarray(True)


def finite_copies(arrays: Sequence[jax.Array]) -> jax.Array:
    """Of each copy along the first axes whether all of its entries are finite."""
    sizes = [x[0].size for x in arrays]  # divided by first, as in `finite`
    pairs = zip(arrays, sizes, strict=True)
    means = [jnp.sum(x / n, axis=tuple(range(1, x.ndim))).astype(float) for x, n in pairs]
    return functools.reduce(jnp.logical_and, map(jnp.isfinite, means))


def chosen(good: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """New copies where they are good, one flag for each of them or for all; else the old ones."""
    return jnp.where(good.reshape(good.shape + (1,) * (new.ndim - good.ndim)), new, old)
