"""Examples a few at a time, so that what is made of them takes little memory.

Neighbours go into different chunks: where the batch is divided over devices, each has a part of
every chunk, and none waits for another.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from curvature import _jax


def sum_over_examples(one: Callable[..., jax.Array], most: int, *arrays: jax.Array) -> jax.Array:
    """The sum of `one(chunk of each array)` over chunks of the leading axis, of at most `most`."""
    groups, size = _division(len(arrays[0]), most)
    if size == len(arrays[0]):
        return one(*arrays)
    whole = groups * size
    head = tuple(_dealt(x[:whole], groups) for x in arrays)
    like = jax.eval_shape(one, *(x[0] for x in head))
    zero = jnp.zeros(like.shape, like.dtype)
    for array in arrays:  # in a `shard_map`, over devices
        zero = _jax.varying_like(zero, array)
    total, _ = jax.lax.scan(lambda sum_, part: (sum_ + one(*part), None), zero, head)
    return total + one(*(x[whole:] for x in arrays)) if whole < len(arrays[0]) else total


def map_over_examples(one: Callable[..., jax.Array], most: int, *arrays: jax.Array) -> jax.Array:
    """`one(chunk of each array)`, an array by examples, put together again."""
    groups, size = _division(len(arrays[0]), most)
    if size == len(arrays[0]):
        return one(*arrays)
    whole = groups * size
    parts = jax.lax.map(lambda part: one(*part), tuple(_dealt(x[:whole], groups) for x in arrays))
    out = jnp.swapaxes(parts, 0, 1).reshape((whole, *parts.shape[2:]))
    rest = [one(*(x[whole:] for x in arrays))] if whole < len(arrays[0]) else []
    return jnp.concatenate([out, *rest]) if rest else out


def _division(examples: int, most: int) -> tuple[int, int]:
    """How many chunks there are, and their size; what is left over is less than one.

    Chunks without a rest, if they need not be less than half as large for it.
    """
    most = max(1, min(most, examples))
    groups = math.ceil(examples / most)
    for even in range(groups, 2 * groups + 1):
        if examples % even == 0:
            return even, examples // even
    return examples // most, most


def _dealt(x: jax.Array, groups: int) -> jax.Array:
    """`(groups, size, ...)`: example n is in group n % groups."""
    return jnp.swapaxes(x.reshape((-1, groups, *x.shape[1:])), 0, 1)
