"""The network in Flax linen, its blocks scanned over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from transformer import mathematics
from transformer.config import Config

PyTree = Any


class Block(nn.Module):
    """Attention and a gated layer, with norms in front."""

    config: Config

    @nn.compact
    def __call__(self, x: Array, _: None = None) -> tuple[Array, None]:
        config = self.config

        def dense(width: int, name: str) -> nn.Dense:
            return nn.Dense(width, use_bias=False, dtype=config.compute, name=name)

        h = nn.RMSNorm(dtype=config.compute, name="norm_attention")(x)
        shared = config.kv_heads * config.head_width
        widths = {"query": config.width, "key": shared, "value": shared}
        q, k, v = (dense(width, name)(h) for name, width in widths.items())
        x = x + dense(config.width, "mix")(mathematics.attention(config, q, k, v))
        h = nn.RMSNorm(dtype=config.compute, name="norm_gated")(x)
        h = nn.silu(dense(config.hidden, "gate")(h)) * dense(config.hidden, "up")(h)
        return x + dense(config.width, "down")(h), None


class Transformer(nn.Module):
    """From bytes `[batch, positions]` to logits `[batch, positions, vocabulary]`."""

    config: Config

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        config = self.config
        embed = nn.Embed(config.vocabulary, config.width, dtype=config.compute, name="tokens")
        block = nn.remat(Block, prevent_cse=False) if config.remat else Block
        blocks = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=config.layers
        )
        x, _ = blocks(config, name="blocks")(embed(tokens), None)
        return embed.attend(nn.RMSNorm(dtype=config.compute, name="norm")(x)).astype(jnp.float32)


def build(config: Config) -> tuple[Callable[[Array], PyTree], Callable[[PyTree, Array], Array]]:
    """`init(key)` and `apply(params, tokens)`."""
    module = Transformer(config)

    def init(key: Array) -> PyTree:
        return module.init(key, jnp.zeros((1, config.context), jnp.int32))["params"]

    def apply(params: PyTree, tokens: Array) -> Array:
        logits: Array = module.apply({"params": params}, tokens)
        return logits

    return jax.jit(init), apply
