"""Where the seconds of a step of ours go: timing runs with parts switched off.

A gradient alone gives `forward_backward`. A step that takes no statistics and refreshes nothing
costs that and `apply`: preconditioning, momentum, and what chooses rate and damping. With
statistics it costs `statistics` more, and with a refresh too `refresh` more: of all blocks at once.
By default K-FAC does the former at every fifth step and a tenth of the latter at each.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from threadpoolctl import threadpool_limits

from benchmarks import optimizers
from benchmarks.problems import Problem
from benchmarks.trainer import Setting

NEVER = 10**6
STEPS = 5  # in a round: one period of Levenberg and Marquardt's rule
ROUNDS = 4

PERIODS = {
    "apply": {"statistics_every": NEVER, "refresh_every": NEVER, "spread": False},
    "statistics": {"statistics_every": 1, "refresh_every": NEVER, "spread": False},
    "refresh": {"statistics_every": 1, "refresh_every": 1},
}


@threadpool_limits.wrap(limits=1, user_api="blas")
def seconds(name: str, problem: Problem, setting: Setting) -> dict[str, float]:
    """Seconds of each part of a step; the parts' rounds take turns, and the medians count."""
    gradient = jax.jit(jax.value_and_grad(problem.loss_fn))
    params = problem.network.init(jax.random.key(0))
    batch = problem.batches(seed=0)(params)
    parts: dict[str, Callable[[], Any]] = {"forward_backward": lambda: gradient(params, batch)}
    for part, periods in PERIODS.items():
        tx = optimizers.ours(name, problem, setting, batch, **periods)
        parts[part] = _stepping(optimizers.optax_trainer(problem, tx), params, batch)
    times: dict[str, list[float]] = {part: [] for part in parts}
    for _ in range(1 + ROUNDS):  # the first round compiles
        for part, act in parts.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                jax.block_until_ready(act())
            times[part].append((time.perf_counter() - start) / STEPS)
    levels = [statistics.median(measured[1:]) for measured in times.values()]
    differences = [levels[0], *(b - a for a, b in pairwise(levels))]
    return dict(zip(parts, differences, strict=True))


def _stepping(trainer: optimizers.Trainer, params: Any, batch: Any) -> Callable[[], Any]:
    """A function that takes the next step each time."""
    key = jax.random.key(0)
    at = jax.tree.map(jnp.copy, params)
    at = (at, trainer.init(at, batch, key))

    def act() -> Any:
        nonlocal at
        at = trainer.step(*at, batch, key)
        return at

    return act
