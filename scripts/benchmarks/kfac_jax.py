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
FERMINET_DAMPING = 1e-3


def add_checkout(path: Path, package: str = "kfac_jax") -> str | None:
    """Makes the package of a checkout importable; says why where it is not."""
    if not (path / package / "__init__.py").is_file():
        return f"{path} holds no {package}/__init__.py: give the folder of a checkout of {package}"
    sys.path.insert(0, str(path))
    try:
        importlib.import_module(package)
    except ImportError as error:
        return f"{package} does not import: {error}; install what it depends on"
    return None


def trainer(problem: Problem, setting: Setting) -> Trainer:
    """The optimizer of a setting, which it reads as ours do.

    Where the rate is given, the rest is FermiNet's: its curvature is exact in one pass, its steps
    are bounded, and there is no momentum.
    """
    if problem.chosen_rate:
        return optimizer_trainer(
            problem,
            **fixed(setting["learning_rate"], FERMINET_DAMPING, momentum=0.0),
            estimation_mode="fisher_exact",
            norm_constraint=1e-3,
            inverse_update_period=1,
        )
    return optimizer_trainer(
        problem,
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        use_adaptive_damping=True,
        initial_damping=setting["initial_damping"],
    )


def fixed(learning_rate: float, damping: float, momentum: float = MOMENTUM) -> dict[str, Any]:
    """Options of a fixed rate, momentum and damping."""
    return {
        "learning_rate_schedule": lambda *_, **__: learning_rate,
        "momentum_schedule": lambda *_, **__: momentum,
        "damping_schedule": lambda *_, **__: damping,
    }


def optimizer_trainer(problem: Problem, **options: Any) -> Trainer:
    """`kfac_jax.Optimizer`, which jits by itself and consumes parameters and state."""
    kfac_jax = importlib.import_module("kfac_jax")

    def loss_fn(params: PyTree, batch: Batch) -> Array:
        _tag_outputs(kfac_jax, problem, params, batch)
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


def _tag_outputs(kfac_jax: Any, problem: Problem, params: PyTree, batch: Batch) -> None:
    """Says to kfac-jax what our losses say; it divides by the number of examples."""
    if problem.family == "squared":
        inside, edge = problem.outputs(params, batch)
        kfac_jax.register_squared_error_loss(inside, weight=1 / inside.shape[1])
        kfac_jax.register_squared_error_loss(edge[:, None])
        return
    outputs = problem.network.apply(params, batch.x)
    if problem.family == "bernoulli":
        kfac_jax.register_sigmoid_cross_entropy_loss(outputs, batch.y)
    elif problem.family == "amplitude":
        kfac_jax.register_normal_predictive_distribution(outputs[:, None])
    else:  # by the number of labels
        weight = batch.size / batch.y.size
        kfac_jax.register_softmax_cross_entropy_loss(outputs, batch.y, weight=weight)
