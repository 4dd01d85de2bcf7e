"""How optimizers are compared: the same start, the same batches, the same number of trials.

Each of an optimizer's settings is tried on seed TUNING_SEED for TUNING_SHARE of the steps; the one
with the lowest loss then runs on the seeds 1, 2, ... A seed decides initialisation,
batches, and the targets that are drawn for statistics.

The clock runs inside steps only. Compilation, and the warm-up steps that bring it about, come
before on copies; batches are drawn, and the loss on the whole training set is evaluated, between
steps.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from threadpoolctl import threadpool_limits

from benchmarks import optimizers
from benchmarks.problems import Problem
from benchmarks.trainer import Setting, Trainer

TUNING_SEED = 0
TUNING_SHARE = 0.2
WARM_UP = 5  # kfac-jax compiles a second step for the fifth one, which adapts the damping
DIVERGED = "the training loss was no longer finite"


@dataclass(frozen=True)
class Protocol:
    """How long to run, on how many seeds, how much to try."""

    steps: int
    seeds: int
    trials: int = optimizers.TRIALS
    seconds: float | None = None

    @property
    def tuning_steps(self) -> int:
        return max(1, round(self.steps * TUNING_SHARE))

    @property
    def tuning_seconds(self) -> float | None:
        return None if self.seconds is None else self.seconds * TUNING_SHARE


@dataclass
class Run:
    """One training run; `measures` are lists beside `steps` and `seconds`, the loss among them."""

    seed: int
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    measures: dict[str, list[float]] = field(default_factory=dict)
    compile_seconds: float = 0.0
    median_step_seconds: float = 0.0
    slowest_step_seconds: float = 0.0
    stopped: str | None = None

    @property
    def final_loss(self) -> float:
        """The last training loss, infinite after a divergence."""
        return math.inf if self.stopped == DIVERGED else self.measures["loss"][-1]


@threadpool_limits.wrap(limits=1, user_api="blas")
def run(
    name: str, problem: Problem, setting: Setting, seed: int, steps: int, seconds: float | None
) -> Run:
    """Trains from the seed's start on the seed's batches, for so many steps or seconds."""
    result = Run(seed)
    next_batch = problem.batches(seed)
    key = jax.random.key(seed)
    params = jax.jit(problem.network.init)(key)
    batch = next_batch(params)
    evaluate = jax.jit(problem.evaluate)

    began = time.perf_counter()
    trainer = optimizers.trainer(name, problem, setting, batch, steps)
    state = trainer.init(params, batch, key)
    _warm_up(trainer, params, state, batch, key)
    set_up_seconds = time.perf_counter() - began

    times: list[float] = []

    def record(done: int) -> bool:
        result.steps.append(done)
        result.seconds.append(sum(times))
        for measure, value in evaluate(params, problem.judged_on).items():
            result.measures.setdefault(measure, []).append(float(value))
        return math.isfinite(result.measures["loss"][-1])

    record(0)
    every = max(1, steps // problem.points)
    for done in range(1, steps + 1):
        step_key = jax.block_until_ready(jax.random.fold_in(key, done))
        start = time.perf_counter()
        params, state = jax.block_until_ready(trainer.step(params, state, batch, step_key))
        times.append(time.perf_counter() - start)
        batch = jax.block_until_ready(next_batch(params))
        late = seconds is not None and sum(times) >= seconds
        if (done % every == 0 or done == steps or late) and not record(done):
            result.stopped = DIVERGED
        elif late and done < steps:
            result.stopped = f"{seconds:g} seconds were over"
        if result.stopped:
            break

    result.median_step_seconds = statistics.median(times)
    result.slowest_step_seconds = max(times)
    result.compile_seconds = max(0.0, set_up_seconds - WARM_UP * result.median_step_seconds)
    return result


def _warm_up(trainer: Trainer, params: Any, state: Any, batch: Any, key: jax.Array) -> None:
    params, state = jax.tree.map(jnp.copy, (params, state))
    for _ in range(WARM_UP):
        params, state = jax.block_until_ready(trainer.step(params, state, batch, key))


def tune(name: str, problem: Problem, protocol: Protocol) -> list[dict[str, Any]]:
    """Tries an optimizer's settings; gives each with its loss, in the order tried."""
    steps, seconds = protocol.tuning_steps, protocol.tuning_seconds
    if problem.scheduled:  # what a rate is worth shows at the end of its decay
        steps, seconds = protocol.steps, protocol.seconds
    trials = []
    for setting in optimizers.settings(name, problem)[: protocol.trials]:
        trial = run(name, problem, setting, TUNING_SEED, steps, seconds)
        trials.append({"setting": setting, "loss": trial.final_loss, "stopped": trial.stopped})
        print(f"  {name} {setting}: loss {trial.final_loss:.4g}", flush=True)
    return trials


def best(trials: Sequence[dict[str, Any]]) -> Setting:
    """The setting with the lowest loss; raises if every one diverged."""
    found = min(trials, key=lambda trial: trial["loss"])
    if not math.isfinite(found["loss"]):
        raise RuntimeError(f"All settings diverged: {trials}. Try others in optimizers.SETTINGS.")
    return found["setting"]
