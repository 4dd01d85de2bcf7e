"""The training loop: one device, a mesh, or several processes."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from tqdm import tqdm

import curvature
from digits.folder import RunFolder
from transformer import place, text
from transformer.recipes import LABELS, Recipe

PyTree = Any
Apply = Callable[[PyTree, Array], Array]


class State(NamedTuple):
    """Everything that a step carries forward."""

    params: PyTree
    opt_state: PyTree


@dataclass(frozen=True)
class Plan:
    """How long and on what to train."""

    steps: int
    batch_size: int
    seed: int
    record_every: int
    progress: bool
    stop_after: int | None = None


@dataclass
class Result:
    """A finished run: measurements against steps, and what came of it."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    median_step_seconds: float = math.nan
    setup_seconds: float = 0.0
    stopped: str | None = None


class Trainer:
    """A network, its data and its optimizer, placed on a mesh."""

    def __init__(
        self,
        init: Callable[[Array], PyTree],
        apply: Apply,
        context: int,
        plan: Plan,
        recipe: Recipe,
        mesh: jax.sharding.Mesh,
    ) -> None:
        self.apply, self.plan, self.recipe, self.mesh = apply, plan, recipe, mesh
        self.training, self.held_out = text.windows(context)
        if plan.batch_size > self.held_out.size:
            raise ValueError(
                f"--batch-size {plan.batch_size} is more than the {self.held_out.size} windows "
                "that are held out"
            )
        key = jax.random.key(plan.seed)
        shapes = jax.eval_shape(init, key)
        self.params = jax.jit(init, out_shardings=place.of_parameters(mesh, shapes))(key)
        self.registry = curvature.register(self.loss, self.params, *self.batch(1))

    def loss(self, params: PyTree, x: Array, y: Array) -> Array:
        """Mean cross entropy of the next byte, in nats."""
        each = curvature.losses.softmax_cross_entropy_with_integer_labels(self.apply(params, x), y)
        return each.mean()

    def batch(self, step: int) -> tuple[Array, Array]:
        """The windows of a step, divided over the mesh."""
        chosen = text.rows(self.training.size, self.plan.batch_size, self.plan.seed, step)
        sharding = place.rows(self.mesh)
        x, y = (place.divided(part[chosen], sharding) for part in self.training)
        return x, y

    def judged(self) -> Callable[[PyTree], float]:
        """From parameters to the loss on the windows that are kept apart."""
        size = self.plan.batch_size
        evaluate = jax.jit(self.loss)
        sharding = place.rows(self.mesh)
        count = min(self.held_out.size // size, 32)
        batches = [
            tuple(
                place.divided(part[i * size : (i + 1) * size], sharding) for part in self.held_out
            )
            for i in range(count)
        ]
        return lambda params: statistics.fmean(float(evaluate(params, *b)) for b in batches)

    def compiled(self) -> tuple[State, Callable[..., tuple[State, Array]]]:
        """The first state, and one step."""
        over = place.all_devices(self.mesh)
        tx = self.recipe.make(self.registry, self.plan.steps, over)
        places = curvature.state_shardings(tx, self.params)
        state = State(self.params, jax.jit(tx.init, out_shardings=places)(self.params))

        def step(state: State, batch: tuple[Array, Array], key: Array) -> tuple[State, Array]:
            loss, grads = jax.value_and_grad(self.loss)(state.params, *batch)
            updates, opt_state = tx.update(
                grads, state.opt_state, state.params, loss_args=batch, key=key
            )
            return State(optax.apply_updates(state.params, updates), opt_state), loss

        # A state divided as the one before: the step is compiled once.
        same = jax.tree.map(lambda x: x.sharding, state)
        run = jax.jit(step, donate_argnums=0, out_shardings=(same, None))
        lowered = run.lower(state, self.batch(1), jax.random.key(0))
        return state, lowered.compile()

    def train(self, folder: RunFolder) -> Result:
        """From the start, or the checkpoint in the folder, to the end."""
        plan, result = self.plan, Result(rows=list(folder.rows))
        began = time.perf_counter()
        state, step = self.compiled()
        state = folder.restore(state)
        judge = self.judged()
        result.setup_seconds = time.perf_counter() - began
        key = jax.random.key(plan.seed + 1)
        seconds, times = folder.seconds, []
        label = LABELS[self.recipe.name]
        quiet = not (plan.progress and place.is_first())

        def record(done: int, loss: float) -> None:
            row = {"step": done, "seconds": seconds, "loss": loss, "held_out": judge(state.params)}
            result.rows.append(row)
            folder.append(row)
            bar.set_postfix_str(f"held out {row['held_out']:.3f}", refresh=False)

        with tqdm(
            total=plan.steps,
            initial=folder.step,
            desc=label,
            disable=quiet,
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 3600.0,  # a log file gets the last line
        ) as bar:
            for done in range(folder.step + 1, plan.steps + 1):
                batch, step_key = self.batch(done), jax.random.fold_in(key, done)
                jax.block_until_ready((batch, step_key))
                start = time.perf_counter()
                state, loss = jax.block_until_ready(step(state, batch, step_key))
                times.append(time.perf_counter() - start)
                seconds += times[-1]
                bar.update()
                if done % plan.record_every == 0 or done == plan.steps:
                    record(done, float(loss))
                    if not math.isfinite(result.rows[-1]["held_out"]):
                        result.stopped = f"the loss was no longer finite after {done} steps"
                        break
                folder.save_if_due(done, state, seconds)
                if done == plan.stop_after:
                    result.stopped = f"stopped after {done} steps: go on with --resume"
                    break
        self.params = state.params
        result.median_step_seconds = statistics.median(times or [math.nan])
        return result


def count(params: PyTree) -> int:
    """How many parameters there are."""
    return sum(int(jnp.size(leaf)) for leaf in jax.tree.leaves(params))
