"""An inverse for a layer whose first one cannot be had: a multiple of the identity.

Without damping a factor may be singular, and its Cholesky factorisation fails. An inverse that was
there before is kept; at first there is none, and a layer with zeros in its place would not move.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from curvature.block_diagonal import block_of
from curvature.blocks.block import safe_power
from curvature.linalg import multiples_of_identity
from curvature.optimizer.refresh.schedule import SIDES
from curvature.sides import entries, unit
from curvature.statistics.eigenbasis import BASES
from curvature.statistics.factors import Statistics
from curvature.trace import Layer


def plain(
    layer: Layer,
    found: Statistics,
    shifts: Mapping[str, jax.Array],
    damping: jax.Array,
    like: Statistics,
) -> Statistics:
    """The arrays of 1 / (mean eigenvalue + damping) times the identity.

    Args:
      layer: the layer.
      found: its statistics.
      shifts: what factored damping adds to its factors' diagonals; empty without factors.
      damping: what is added to the curvature of a block without factors.
      like: arrays of the layer's inverse; the result has their names and dtypes.
    """
    if layer.factored:
        made = {name: _of_sides(layer, found, shifts, name) for name in like}
    else:
        made = {"values": _of_block(layer, found, damping)}
    return {name: x.astype(like[name].dtype) for name, x in made.items()}


def _of_block(layer: Layer, found: Statistics, damping: jax.Array) -> jax.Array:
    curvature, values = block_of(layer, found).diagonal(), found["values"]
    depth = len(layer.stack)
    mean = jnp.mean(curvature, axis=tuple(range(depth, curvature.ndim)))
    inverse = safe_power(mean + damping.astype(values.dtype), -1.0)
    if layer.outer:
        return multiples_of_identity(inverse, values.shape[-1])
    return jnp.broadcast_to(_spread(inverse, values.ndim), values.shape)


def _of_sides(
    layer: Layer, found: Statistics, shifts: Mapping[str, jax.Array], name: str
) -> jax.Array:
    depth = len(layer.stack)

    def inverse(side: str) -> jax.Array:
        size = layer.shape[-2:][SIDES.index(side)]
        return safe_power(jnp.mean(entries(found[side], size, depth), axis=-1) + shifts[side], -1.0)

    if name == "values":
        both = inverse("input") * inverse("output")
        return jnp.broadcast_to(both[..., None, None], layer.shape)
    if name in BASES:
        return unit(found[SIDES[BASES.index(name)]], depth)
    one = unit(found[name], depth)
    return one * _spread(inverse(name), one.ndim)


def _spread(x: jax.Array, ndim: int) -> jax.Array:
    """A number for every copy, to be multiplied with arrays of `ndim` axes."""
    return x.reshape(x.shape + (1,) * (ndim - x.ndim))
