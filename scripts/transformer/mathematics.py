"""What both frameworks' networks do between their layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from transformer.config import Config


def rotary(x: Array) -> Array:
    """Queries or keys `[batch, positions, heads, width]`, turned by their positions.

    Su et al. 2021, "RoFormer", with halves in the place of pairs.
    """
    half = x.shape[-1] // 2
    rates = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * rates
    cos, sin = (f(angles)[:, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def attention(config: Config, q: Array, k: Array, v: Array) -> Array:
    """Causal attention of flat queries, keys and values, `[batch, positions, heads * width]`."""

    def heads(x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1, config.head_width)

    mixed = jax.nn.dot_product_attention(
        rotary(heads(q)), rotary(heads(k)), heads(v), is_causal=True
    )
    return mixed.reshape(q.shape)
