"""Byte-level language models on the running Python's own sources, judged by held-out loss."""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from digits.data import Batch

from .networks import transformer
from .problems import Problem

BYTES = 256
HELD_OUT = 512  # windows; a tenth of the text is kept apart for them


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
    training, held_out = _windows(size.context)
    return Problem(
        name=f"language_{name}",
        description=f"causal transformer, {size.layers} layers of width {size.width}, on bytes of "
        f"Python sources, windows of {size.context}",
        network=transformer(BYTES, size.context, size.width, size.layers, size.heads),
        family="categorical",
        data=training,
        batch_size=size.batch,
        steps=size.steps,
        first_order_steps=size.steps,
        held_out=held_out,
        scheduled=True,
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    f"language_{name}": functools.partial(language, name) for name in SIZES
}


def _windows(context: int) -> tuple[Batch, Batch]:
    """Windows of the text and the bytes that follow: for training, and some from its end."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    codes = np.frombuffer(text, np.uint8).astype(np.int32)
    cut = int(0.9 * len(codes))
    training, rest = _cut(codes[:cut], context), _cut(codes[cut:], context)
    chosen = np.random.default_rng(0).permutation(rest.size)[:HELD_OUT]
    count = training.size - training.size % 64
    return (
        Batch(training.x[:count], training.y[:count]),
        Batch(jnp.asarray(rest.x[chosen]), jnp.asarray(rest.y[chosen])),
    )


def _cut(codes: np.ndarray, context: int) -> Batch:
    count = (len(codes) - 1) // context
    x, y = (codes[i : i + count * context].reshape(count, context) for i in (0, 1))
    return Batch(x, y)
