"""Windows of the running Python's own sources, as bytes: nothing is downloaded."""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np

HELD_OUT = 512  # windows; a tenth of the text is kept apart for them


class Windows(NamedTuple):
    """Windows of bytes and the bytes that follow each, `[windows, positions]`."""

    x: np.ndarray
    y: np.ndarray

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.x)


@functools.cache
def windows(context: int) -> tuple[Windows, Windows]:
    """Of so many bytes: for training, and some from the end of the text to judge by."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    codes = np.frombuffer(text, np.uint8).astype(np.int32)
    cut = int(0.9 * len(codes))
    training, rest = _cut(codes[:cut], context), _cut(codes[cut:], context)
    chosen = np.random.default_rng(0).permutation(rest.size)[:HELD_OUT]
    count = training.size - training.size % 64
    return Windows(training.x[:count], training.y[:count]), Windows(rest.x[chosen], rest.y[chosen])


def rows(size: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Which windows are in the batch of a step, from 1: each once an epoch, then shuffled anew."""
    epoch, place = divmod(step - 1, size // batch)
    order = np.random.default_rng((seed, epoch)).permutation(size)
    return order[place * batch : (place + 1) * batch]


def _cut(codes: np.ndarray, context: int) -> Windows:
    count = (len(codes) - 1) // context
    return Windows(*(codes[i : i + count * context].reshape(count, context) for i in (0, 1)))
