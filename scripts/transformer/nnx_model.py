"""The network in Flax NNX, its blocks scanned over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from transformer import mathematics
from transformer.config import Config

PyTree = Any


class Block(nnx.Module):
    """Attention and a gated layer, with norms in front."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        def dense(width_in: int, width_out: int) -> nnx.Linear:
            return nnx.Linear(width_in, width_out, use_bias=False, dtype=config.compute, rngs=rngs)

        width, shared = config.width, config.kv_heads * config.head_width
        self.config = config
        self.norm_attention = nnx.RMSNorm(width, dtype=config.compute, rngs=rngs)
        self.query, self.mix = dense(width, width), dense(width, width)
        self.key, self.value = dense(width, shared), dense(width, shared)
        self.norm_gated = nnx.RMSNorm(width, dtype=config.compute, rngs=rngs)
        self.gate, self.up = dense(width, config.hidden), dense(width, config.hidden)
        self.down = dense(config.hidden, width)

    def __call__(self, x: Array) -> Array:
        h = self.norm_attention(x)
        q, k, v = self.query(h), self.key(h), self.value(h)
        x = x + self.mix(mathematics.attention(self.config, q, k, v))
        h = self.norm_gated(x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h))


class Transformer(nnx.Module):
    """From bytes `[batch, positions]` to logits `[batch, positions, vocabulary]`."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs)

        self.config = config
        self.tokens = nnx.Embed(config.vocabulary, config.width, dtype=config.compute, rngs=rngs)
        self.blocks = blocks(rngs)
        self.norm = nnx.RMSNorm(config.width, dtype=config.compute, rngs=rngs)

    def __call__(self, tokens: Array) -> Array:
        def one(x: Array, block: Block) -> Array:
            return block(x)

        step = nnx.remat(one, prevent_cse=False) if self.config.remat else one
        through = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        x = through(self.tokens(tokens), self.blocks)
        return self.tokens.attend(self.norm(x)).astype(jnp.float32)


def build(config: Config) -> tuple[Callable[[Array], PyTree], Callable[[PyTree, Array], Array]]:
    """`init(key)` and `apply(params, tokens)`."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))

    def init(key: Array) -> PyTree:
        return nnx.split(Transformer(config, nnx.Rngs(params=key)), nnx.Param)[1]

    def apply(params: PyTree, tokens: Array) -> Array:
        logits: Array = nnx.merge(graph, params)(tokens)
        return logits

    return jax.jit(init), apply
