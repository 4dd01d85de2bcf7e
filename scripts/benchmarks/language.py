"""Byte-level language models on the running Python's own sources, judged by held-out loss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from benchmarks.networks import transformer
from benchmarks.problems import Problem
from digits.data import Batch
from transformer import text

BYTES = 256


class Size(NamedTuple):
    """A transformer, its batch, and how long it trains."""

    layers: int
    width: int
    heads: int
    context: int
    batch: int
    steps: int


SIZES = {
    "0.1M": Size(2, 64, 4, 48, 16, 600),
    "1M": Size(4, 128, 4, 64, 16, 600),
    "19M": Size(6, 512, 8, 256, 64, 1000),
    "124M": Size(12, 768, 12, 1024, 8, 1000),
}
"""By their number of parameters; the last two need an accelerator."""


def language(name: str) -> Problem:
    """A size of `SIZES`, with warm-up and cosine decay of every learning rate."""
    size = SIZES[name]
    training, held_out = text.windows(size.context)
    return Problem(
        name=f"language_{name}",
        description=f"causal transformer, {size.layers} layers of width {size.width}, on bytes of "
        f"Python sources, windows of {size.context}",
        network=transformer(BYTES, size.context, size.width, size.layers, size.heads),
        family="categorical",
        data=Batch(*training),
        batch_size=size.batch,
        steps=size.steps,
        first_order_steps=size.steps,
        held_out=Batch(*map(jnp.asarray, held_out)),
        scheduled=True,
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    f"language_{name}": functools.partial(language, name) for name in SIZES
}
