"""The time of a step of K-FAC, ours and kfac-jax's, each beside a step of Adam in the same loop.

The tanh autoencoder 784-1000-500-250-30 and back, batch 512, float32, sigmoid cross entropy; fixed
rate, momentum and damping, statistics at every step; and ours by default. Every contestant has a
process of its own, so that none finds compiled what another left, and every step of it is followed
by one of Adam on the same batch, so that both see the same neighbours on the machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from threadpoolctl import threadpool_limits

import curvature
from benchmarks import kfac_jax, optimizers
from benchmarks.networks import autoencoder
from benchmarks.problems import Problem
from curvature import examples, text
from digits import data as digits_data
from digits import report
from digits.data import Batch

LEARNING_RATE = 0.05
DAMPING = 10.0  # of a loss summed over 784 pixels; with 0.1 curves diverge at this rate
ADAM_RATE = 1e-3
LEFT_OUT = 5  # steps at the start whose time does not count
CONTESTANTS = {
    "ours": {"statistics_every": 1, "refresh_every": 5, "warmup_steps": 0, "kl_clip": None},
    "ours_defaults": {},
    "kfac_jax": {"curvature_update_period": 1, "inverse_update_period": 5},
}
DATA = ("curves", "random")


def make_problem(data: str) -> Problem:
    """The autoencoder, on curves or on uniform noise."""
    count = 10 * 512
    if data == "curves":
        images = examples.curves(count)
    else:
        images = np.random.default_rng(0).uniform(size=(count, 784)).astype(np.float32)
    images = jnp.asarray(images)
    return Problem(
        name="side_by_side",
        description="autoencoder 784-1000-500-250-30 and back, tanh, linear code",
        network=autoencoder([784, 1000, 500, 250, 30]),
        family="bernoulli",
        data=Batch(images, images),
        batch_size=512,
        steps=60,
        first_order_steps=60,
    )


def make_trainer(contestant: str, problem: Problem, batch: Batch) -> optimizers.Trainer:
    """One of CONTESTANTS, or `adam`."""
    if contestant == "adam":
        return optimizers.optax_trainer(problem, optax.adam(ADAM_RATE))
    options = CONTESTANTS[contestant]
    if contestant == "kfac_jax":
        fixed = kfac_jax.fixed(LEARNING_RATE, DAMPING)
        return kfac_jax.optimizer_trainer(problem, **fixed, **options)
    params = jax.eval_shape(problem.network.init, jax.random.key(0))
    registry = curvature.register(problem.loss_fn, params, batch)
    tx = curvature.kfac(
        registry, LEARNING_RATE, optimizers.MOMENTUM, **{"damping": DAMPING, **options}
    )
    return optimizers.optax_trainer(problem, tx)


class Contestant:
    """An optimizer in the loop, with its clock; its first step is counted as compilation."""

    def __init__(self, name: str, problem: Problem, batch: Batch) -> None:
        params = jax.block_until_ready(problem.network.init(jax.random.key(0)))
        key, self.losses, self.times = jax.random.key(1), [], []
        self.loss = jax.jit(problem.loss_fn)
        start = time.perf_counter()
        self.step = make_trainer(name, problem, batch)
        state = self.step.init(params, batch, key)
        self.at = jax.tree.map(jnp.copy, (params, state))
        jax.block_until_ready(self.step.step(params, state, batch, key))
        self.compile_seconds = time.perf_counter() - start

    def advance(self, batch: Batch, key: jax.Array) -> None:
        """One timed step, and the loss before it."""
        self.losses.append(float(self.loss(self.at[0], batch)))
        start = time.perf_counter()
        self.at = jax.block_until_ready(self.step.step(*self.at, batch, key))
        self.times.append(time.perf_counter() - start)

    def measured(self) -> dict[str, Any]:
        """Times of steps, size of the state, losses on the batches."""
        times = np.array(self.times[LEFT_OUT:])
        params, state = map(_bytes, self.at)
        return {
            "mean_step_seconds": float(times.mean()),
            "median_step_seconds": float(np.median(times)),
            "slowest_step_seconds": float(times.max()),
            "slowest_to_median": float(times.max() / np.median(times)),
            "compile_seconds": self.compile_seconds,
            "state_in_parameters": state / params,
            "losses": self.losses,
        }


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@threadpool_limits.wrap(limits=1, user_api="blas")
def measure(name: str, data: str, steps: int) -> dict[str, Any]:
    """Runs one contestant beside Adam."""
    problem = make_problem(data)
    batches = digits_data.batches(problem.data, problem.batch_size, seed=0)
    batch = next(batches)
    contestant, adam = Contestant(name, problem, batch), Contestant("adam", problem, batch)
    for done in range(LEFT_OUT + steps):
        key = jax.block_until_ready(jax.random.key(done))
        for one in (contestant, adam):
            one.advance(batch, key)
        batch = jax.block_until_ready(next(batches))
    result, beside = contestant.measured(), adam.measured()
    for what in ("mean", "median", "slowest"):
        result[f"{what}_to_adam"] = result[f"{what}_step_seconds"] / beside[f"{what}_step_seconds"]
    return {**result, "adam": beside}


def compare(data: str, steps: int, checkout: Path | None) -> dict[str, Any]:
    """Every contestant in a process of its own; kfac-jax where there is a checkout."""
    measured = {}
    for name in CONTESTANTS:
        if name == "kfac_jax" and checkout is None:
            continue
        command = [sys.executable, "-m", "benchmarks.side_by_side", name, data, str(steps)]
        command += [str(checkout)] if name == "kfac_jax" else []
        # The child finds what this process finds, which may have been put on the path in Python.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        child = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        measured[name] = json.loads(child.stdout.splitlines()[-1])
    return {
        "description": make_problem(data).description,
        "data": data,
        "batch_size": 512,
        "learning_rate": LEARNING_RATE,
        "momentum": optimizers.MOMENTUM,
        "damping": DAMPING,
        "steps": steps,
        "contestants": measured,
        "environment": report.environment(),
    }


def table(results: dict[str, Any]) -> str:
    """A row for each contestant; times are multiples of Adam's in the same process."""
    header = (
        *("contestant", "mean", "median", "slowest", "slowest/median", "compile s"),
        *("state/parameters", "loss", "Adam ms"),
    )
    rows = [
        [
            name,
            *(f"{found[f'{what}_to_adam']:.2f} x" for what in ("mean", "median", "slowest")),
            f"{found['slowest_to_median']:.2f}",
            f"{found['compile_seconds']:.1f}",
            f"{found['state_in_parameters']:.2f}",
            f"{found['losses'][-1]:.2f}",
            f"{1e3 * found['adam']['median_step_seconds']:.1f}",
        ]
        for name, found in results["contestants"].items()
    ]
    return text.table(header, rows, str.rjust)


if __name__ == "__main__":
    name, data, steps, *checkout = sys.argv[1:]
    if checkout and (trouble := kfac_jax.add_checkout(Path(checkout[0]))):
        sys.exit(trouble)
    print(json.dumps(measure(name, data, int(steps))))
