"""The sizes of a decoder-only transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True)
class Config:
    """A network of blocks of grouped-query attention and a gated layer, its embedding tied.

    Attributes:
      layers: how many blocks.
      width: of the residual stream.
      heads: of queries.
      kv_heads: of keys and values, each for `heads / kv_heads` of queries.
      context: positions of a window.
      dtype: of the computation; parameters and logits are in float32.
      remat: whether the backward pass computes a block's activations again.
      vocabulary: bytes.
    """

    layers: int = 2
    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    context: int = 48
    dtype: str = "float32"
    remat: bool = True
    vocabulary: int = 256

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise ValueError(
                f"a width of {self.width} is not divided by 2 x {self.heads} heads: rotary "
                "positions need heads of an even width"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} heads of keys")

    @property
    def head_width(self) -> int:
        """Of one head."""
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Of the gated layer: 8/3 of the width, so that its three matrices are two of 4 times."""
        return -(-8 * self.width // (3 * 16)) * 16

    @property
    def compute(self) -> Any:
        """The dtype of the computation."""
        return DTYPES[self.dtype]
