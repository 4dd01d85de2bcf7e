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
from curvature.statistics.eigenbasis import identity
from curvature.statistics.factors import Statistics
from curvature.trace import Layer


def plain(
    layer: Layer, found: Statistics, shifts: Mapping[str, jax.Array], damping: jax.Array
) -> Statistics:
    """The arrays of 1 / (mean eigenvalue + damping) times the identity.

    Args:
      layer: the layer.
      found: its statistics.
      shifts: what factored damping adds to its factors' diagonals; empty without factors.
      damping: what is added to the curvature of a block without factors.
    """
    depth = len(layer.stack)
    if not layer.factored:
        curvature = block_of(layer, found).diagonal()
        axes = tuple(range(depth, curvature.ndim))
        values = found["values"]
        inverse = safe_power(jnp.mean(curvature, axis=axes) + damping.astype(values.dtype), -1.0)
        if layer.outer:
            return {"values": multiples_of_identity(inverse, values.shape[-1])}
        spread = inverse.reshape(inverse.shape + (1,) * (values.ndim - depth))
        return {"values": jnp.broadcast_to(spread, values.shape)}
    sides = {}
    for side, size in zip(SIDES, layer.shape[-2:], strict=True):
        mean = jnp.mean(entries(found[side], size, depth), axis=-1)
        sides[side] = safe_power(mean + shifts[side], -1.0)
    both = (sides["input"] * sides["output"])[..., None, None]
    inverses = {side: _scaled(unit(found[side], depth), sides[side]) for side in SIDES}
    return inverses | identity(found, depth) | {"values": jnp.broadcast_to(both, layer.shape)}


def _scaled(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Every copy of an array times a number."""
    return x * scale.reshape(scale.shape + (1,) * (x.ndim - scale.ndim))
