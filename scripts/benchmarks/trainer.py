"""What every optimizer of the benchmark is to its protocol, ours and others'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

from digits.data import Batch

PyTree = Any
Setting = dict[str, float]

MOMENTUM = 0.9


class Trainer(NamedTuple):
    """An optimizer at work on a problem; both functions may consume their arguments.

    `init(params, batch, key) -> state` and `step(params, state, batch, key) -> (params, state)`.
    """

    init: Callable[[PyTree, Batch, Array], PyTree]
    step: Callable[[PyTree, PyTree, Batch, Array], tuple[PyTree, PyTree]]
