"""The training loop, and a clock that treats every optimizer alike.

The clock runs only while a step does. Not counted, for any optimizer: registering the model and
compiling the step (done ahead and reported as `setup_seconds`), one warm-up call whose result is
thrown away, drawing the batch, measuring the loss on the whole training set, comparing curvatures,
and the progress bar.

LAPACK gets one thread, for every optimizer alike. The factors of these networks are small, and
where another program shares the cores, OpenBLAS's threads waiting for each other make a step of
K-FAC ten times slower.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import optax
from jax import Array
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import curvature
from digits import data as digits_data
from digits import optimizers
from digits.data import Batch, Digits
from digits.folder import RunFolder
from digits.problems import Problem, PyTree
from digits.watch import Watch


class TrainState(NamedTuple):
    """Everything that a step carries forward."""

    params: PyTree
    model_state: PyTree
    opt_state: PyTree


@dataclass(frozen=True)
class Plan:
    """How long and on what to train; shared by all optimizers of a comparison."""

    steps: int
    batch_size: int
    seed: int = 0
    record_every: int = 1
    progress: bool = True


@dataclass
class Curve:
    """Loss and accuracy on the whole training set, against steps and against seconds."""

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)

    def append(self, step: int, seconds: float, loss: float, accuracy: float) -> None:
        self.steps.append(step)
        self.seconds.append(seconds)
        self.loss.append(loss)
        self.accuracy.append(accuracy)

    def first_at_most(self, loss: float) -> int | None:
        """The position of the first point that is no higher than `loss`."""
        return next((i for i, value in enumerate(self.loss) if value <= loss), None)


@dataclass
class Run:
    """A finished training run."""

    settings: optimizers.Settings
    plan: Plan
    curve: Curve
    state: TrainState
    setup_seconds: float
    median_step_seconds: float
    test_loss: float
    test_accuracy: float
    stopped: str | None = None

    @property
    def final_loss(self) -> float:
        """The last training loss; infinite after a divergence, so that it compares as the worst."""
        return self.curve.loss[-1] if math.isfinite(self.curve.loss[-1]) else math.inf


def register(problem: Problem, batch: Batch, plan: Plan) -> Any:
    """The registry of a problem, traced at the plan's batch size; no arithmetic is done."""
    params, model_state = problem.init(jax.random.key(plan.seed))
    part = Batch(batch.x[: plan.batch_size], batch.y[: plan.batch_size])
    return curvature.register(
        problem.loss_fn, params, model_state, part, jax.random.key(plan.seed), has_aux=True
    )


def make_step(
    problem: Problem, tx: optax.GradientTransformationExtraArgs
) -> Callable[[TrainState, Batch, Array], TrainState]:
    """One training step; the same code for every framework and every optimizer."""

    def step(state: TrainState, batch: Batch, key: Array) -> TrainState:
        loss_key, curvature_key = jax.random.split(key)
        loss_args = (state.model_state, batch, loss_key)
        grads, (model_state, _) = jax.grad(problem.loss_fn, has_aux=True)(state.params, *loss_args)
        updates, opt_state = tx.update(
            grads, state.opt_state, state.params, loss_args=loss_args, key=curvature_key
        )
        return TrainState(optax.apply_updates(state.params, updates), model_state, opt_state)

    return step


def stats(state: TrainState) -> dict[str, float]:
    """What the optimizer says of its latest step; Adam and SGD say nothing."""
    found = getattr(state.opt_state, "stats", None)
    return {name: value.item() for name, value in found._asdict().items()} if found else {}


def _bar(plan: Plan, first: int, label: str, leave: bool) -> tqdm:
    return tqdm(
        total=plan.steps,
        initial=first,
        desc=label,
        disable=not plan.progress,
        leave=leave,
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 3600.0,  # a log file gets the last line
    )


@threadpool_limits.wrap(limits=1, user_api="blas")
def train(
    problem: Problem,
    data: Digits,
    settings: optimizers.Settings,
    plan: Plan,
    registry: Any,
    bar_label: str | None = None,
    leave_bar: bool = True,
    folder: RunFolder | None = None,
    watch: Watch | None = None,
) -> Run:
    """Trains from the initialisation and the batch order that `plan.seed` fixes.

    With a folder it goes on from the checkpoint there, and leaves measurements and checkpoints, to
    which `watch` adds its own. A run whose loss is no longer finite stops there, and says so in
    `Run.stopped`; so does one that takes no steps any more.
    """
    began = time.perf_counter()
    first = folder.step if folder else 0
    batch_stream = digits_data.batches(data.train, plan.batch_size, plan.seed, first)
    batch = next(batch_stream)
    tx = optimizers.make(settings, registry)
    params, model_state = problem.init(jax.random.key(plan.seed))
    state = TrainState(params, model_state, tx.init(params))
    key = jax.random.key(plan.seed + 1)
    step = jax.jit(make_step(problem, tx)).lower(state, batch, key).compile()
    if folder:
        state = folder.restore(state)
    jax.block_until_ready(step(state, batch, key))  # Warms up; the result is not kept.
    setup_seconds = time.perf_counter() - began

    evaluate = jax.jit(problem.evaluate)
    curve = Curve()
    for row in folder.rows if folder else []:
        curve.append(row["step"], row["seconds"], row["loss"], row["accuracy"])
    stopped = None
    seconds = folder.seconds if folder else 0.0
    times: list[float] = []
    with _bar(plan, first, bar_label or settings.label, leave_bar) as bar:

        def record(done: int) -> float:
            loss, accuracy = map(float, evaluate(state.params, state.model_state, data.train))
            curve.append(done, seconds, loss, accuracy)
            if folder:
                row = {"step": done, "seconds": seconds, "loss": loss, "accuracy": accuracy}
                if watch is not None and math.isfinite(loss):
                    row |= watch(done, state.params, state.model_state)
                folder.append(row | stats(state))
            bar.set_postfix_str(f"loss {loss:.2e}, accuracy {accuracy:.2%}", refresh=False)
            return loss

        if not first:
            record(0)
        for done in range(first + 1, plan.steps + 1):
            step_key = jax.random.fold_in(key, done)
            jax.block_until_ready((batch, step_key))
            start = time.perf_counter()
            state = jax.block_until_ready(step(state, batch, step_key))
            times.append(time.perf_counter() - start)
            seconds += times[-1]
            batch = next(batch_stream)
            bar.update()
            due = done % plan.record_every == 0 or done == plan.steps
            due = due or (watch is not None and watch.due(done))
            if due and not math.isfinite(record(done)):
                stopped = f"the training loss was no longer finite after {done} steps"
                break
            try:
                curvature.check_progress(state.opt_state)
            except RuntimeError as error:
                stopped = str(error)
                break
            if folder:
                folder.save_if_due(done, state, seconds)

    test_loss, test_accuracy = map(float, evaluate(state.params, state.model_state, data.test))
    return Run(
        settings=settings,
        plan=plan,
        curve=curve,
        state=state,
        setup_seconds=setup_seconds,
        median_step_seconds=statistics.median(times or [math.nan]),  # Resumed at its end.
        test_loss=test_loss,
        test_accuracy=test_accuracy,
        stopped=stopped,
    )
