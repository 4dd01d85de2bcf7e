"""kfac-jax (DeepMind) from a checkout, on the same problems and batches."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import jax
from jax import Array

from benchmarks.problems import Problem
from benchmarks.trainer import MOMENTUM, Setting, Trainer
from digits.data import Batch

PyTree = Any


def add_checkout(path: Path) -> str | None:
    """Makes the checkout importable; says why where it is not."""
    if not (path / "kfac_jax" / "__init__.py").is_file():
        return f"{path} holds no kfac_jax/__init__.py: give the folder of a checkout of kfac-jax"
    sys.path.insert(0, str(path))
    try:
        importlib.import_module("kfac_jax")
    except ImportError as error:
        return f"kfac-jax does not import: {error}; install what its pyproject.toml lists"
    return None


def trainer(problem: Problem, setting: Setting) -> Trainer:
    """The optimizer of a setting, which it reads as ours do."""
    return optimizer_trainer(
        problem,
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        use_adaptive_damping=True,
        initial_damping=setting["initial_damping"],
    )


def fixed(learning_rate: float, damping: float) -> dict[str, Any]:
    """Options of a fixed rate, momentum and damping."""
    return {
        "learning_rate_schedule": lambda *_, **__: learning_rate,
        "momentum_schedule": lambda *_, **__: MOMENTUM,
        "damping_schedule": lambda *_, **__: damping,
    }


def optimizer_trainer(problem: Problem, **options: Any) -> Trainer:
    """`kfac_jax.Optimizer`, which jits by itself and consumes parameters and state."""
    kfac_jax = importlib.import_module("kfac_jax")

    def loss_fn(params: PyTree, batch: Batch) -> Array:
        logits = problem.network.apply(params, batch.x)
        if problem.family == "bernoulli":
            kfac_jax.register_sigmoid_cross_entropy_loss(logits, batch.y)
        else:  # It divides by the number of examples, not by that of the labels.
            weight = batch.size / batch.y.size
            kfac_jax.register_softmax_cross_entropy_loss(logits, batch.y, weight=weight)
        return problem.loss_fn(params, batch)

    optimizer = kfac_jax.Optimizer(
        value_and_grad_func=jax.value_and_grad(loss_fn), l2_reg=0.0, num_burnin_steps=0, **options
    )

    def init(params: PyTree, batch: Batch, key: Array) -> PyTree:
        return optimizer.init(params, key, batch)

    def step(params: PyTree, state: PyTree, batch: Batch, key: Array) -> tuple[PyTree, PyTree]:
        params, state, _ = optimizer.step(params, state, key, batch=batch)
        return params, state

    return Trainer(init, step)
