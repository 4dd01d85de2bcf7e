"""Built-in models: those of `train.py` and of `benchmark.py`, and checkpoints of the former."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from tqdm import tqdm

import curvature
from benchmarks.problems import PROBLEMS
from benchmarks.problems import Problem as Benchmark
from comparing.source import Source, SourceError
from digits import data, loop, optimizers, problems, saved, watch
from digits.data import Batch

PyTree = Any
LEARNING_RATE = optimizers.DEFAULT_LEARNING_RATE["adam"]

# How many examples of a benchmark are compared on, and in batches of how many: bounds on time, and
# on memory, which holds the gradient of every example of a batch at a time.
_SIZES = {
    "curves": (100, 20),
    "digits_autoencoder": (500, 250),
    "digits_classifier": (500, 250),
    "residual_cnn": (200, 50),
    "char_transformer": (64, 16),
}
_DIGITS = {f"digits_{model}": model for model in problems.ARCHITECTURES}
EXAMPLES = (*_DIGITS, *_SIZES)


def example(name: str, steps: int, seed: int, progress: bool) -> Source:
    """One of the `EXAMPLES` after some steps of Adam."""
    if name in _DIGITS:
        return _digits(_DIGITS[name], steps, seed, progress)
    return _benchmark(PROBLEMS[name](), steps, seed, progress)


def checkpoint(path: Path) -> Source:
    """The network of a run of train.py at its last checkpoint."""
    try:
        found = saved.read(path)
    except ValueError as error:
        raise SourceError(str(error)) from error
    label = optimizers.LABELS[found.settings["optimizer"]]
    title = f"{found.problem.name} network after {found.step} steps of {label}"
    return _of_digits(title, found.problem, found.digits, found.state)


def _digits(model: str, steps: int, seed: int, progress: bool) -> Source:
    problem, digits = problems.make("linen", model), data.load(seed)
    settings = optimizers.Settings("adam", LEARNING_RATE)
    params, model_state = problem.init(jax.random.key(seed))
    state = loop.TrainState(params, model_state, None)
    if steps:
        plan = loop.Plan(steps, 250, seed, record_every=steps, progress=progress)
        state = loop.train(problem, digits, settings, plan, None).state
    return _of_digits(_after(f"{problem.name} network", steps), problem, digits, state)


def _of_digits(
    title: str, problem: problems.Problem, digits: data.Digits, state: loop.TrainState
) -> Source:
    """On as many training images as `train.py --compare-every` takes."""
    parts = _batches(digits.train, watch.IMAGES, watch.IMAGES // 2)
    return Source(
        title,
        watch.evaluation_registry(problem, parts[0]),
        state.params,
        [(state.model_state, batch) for batch in parts],
    )


def _benchmark(problem: Benchmark, steps: int, seed: int, progress: bool) -> Source:
    params = problem.network.init(jax.random.key(seed))
    params = _trained(problem, params, steps, seed, progress)
    parts = _batches(problem.data, *_SIZES[problem.name])
    registry = curvature.register(problem.loss_fn, params, parts[0])
    return Source(_after(f"{problem.name}: {problem.description}", steps), registry, params, parts)


def _trained(problem: Benchmark, params: PyTree, steps: int, seed: int, progress: bool) -> PyTree:
    tx = optax.adam(LEARNING_RATE)

    @jax.jit
    def step(params: PyTree, state: PyTree, batch: Batch) -> tuple[PyTree, PyTree]:
        grads = jax.grad(problem.loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, stream = tx.init(params), data.batches(problem.data, problem.batch_size, seed)
    every = 0.1 if sys.stderr.isatty() else 3600.0  # a log file gets the last line
    for _ in tqdm(range(steps), desc="Adam", disable=not progress or not steps, mininterval=every):
        params, state = step(params, state, next(stream))
    return params


def _batches(images: Batch, examples: int, size: int) -> Sequence[Batch]:
    starts = range(0, examples, size)
    return [jax.tree.map(lambda a, i=i: a[i : i + size], images) for i in starts]


def _after(title: str, steps: int) -> str:
    return f"{title}, after {steps} steps of Adam" if steps else f"{title}, not trained"
