"""Every optimizer, with the settings that are tried for it: TRIALS for each.

Ours and kfac-jax run the full algorithm, in which rate, momentum and damping adapt, with their own
defaults for the rest, and are tried with different initial dampings. The others are tried with
different learning rates, and AdamW also with two strengths of weight decay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import optax
import optax.contrib
from jax import Array

import curvature
from benchmarks import kfac_jax
from benchmarks.problems import Problem
from benchmarks.trainer import MOMENTUM, PyTree, Setting, Trainer
from digits.data import Batch

TRIALS = 6

OURS = ("kfac", "ekfac", "foof")
WITH_CURVATURE = (*OURS, "kfac_jax")
FIRST_ORDER = ("adam", "adamw", "sgd", "muon")
EIGEN = ("eigen_adam", "soap")
OPTIMIZERS = (*WITH_CURVATURE, *FIRST_ORDER, *EIGEN)
NOT_IN_OPTAX = tuple(name for name in ("shampoo", "soap") if not hasattr(optax.contrib, name))

LABELS = {
    "kfac": "K-FAC",
    "ekfac": "EKFAC",
    "foof": "FOOF",
    "kfac_jax": "kfac-jax",
    "adam": "Adam",
    "adamw": "AdamW",
    "sgd": "SGD with momentum",
    "muon": "Muon",
    "eigen_adam": "Eigen-Adam",
    "soap": "SOAP",
}


def _rates(*rates: float) -> list[Setting]:
    return [{"learning_rate": rate} for rate in rates]


_CURVATURE: list[Setting] = [
    {"initial_damping": damping} for damping in (0.1, 1.0, 0.01, 10.0, 1e-3, 1e-4)
]
SETTINGS: dict[str, list[Setting]] = {
    **dict.fromkeys(WITH_CURVATURE, _CURVATURE),
    "adam": _rates(1e-3, 3e-3, 3e-4, 1e-2, 1e-4, 3e-2),
    "adamw": [
        {"learning_rate": rate, "weight_decay": decay}
        for decay in (1e-4, 1e-2)
        for rate in (1e-3, 3e-3, 3e-4)
    ],
    "sgd": _rates(1e-2, 3e-2, 3e-3, 1e-1, 1e-3, 3e-1),
    "muon": _rates(1e-2, 3e-2, 3e-3, 1e-1, 1e-3, 3e-4),
    **dict.fromkeys(EIGEN, _rates(1e-2, 3e-3, 3e-2, 1e-3, 3e-4, 1e-1)),
}
"""What is tried, the likeliest first."""
_SCHEDULED = _rates(1e-2, 3e-3, 3e-2, 2e-2, 5e-3, 1e-3)


_CHOSEN = _rates(3e-2, 1e-1, 1e-2, 3e-1, 3e-3, 1e-3)


def settings(name: str, problem: Problem) -> list[Setting]:
    """What is tried for an optimizer on a problem."""
    if problem.chosen_rate and name in WITH_CURVATURE:
        return _CHOSEN
    if problem.scheduled and name in ("adamw", "muon", *EIGEN):
        return _SCHEDULED
    return SETTINGS[name]


def ours(name: str, problem: Problem, setting: Setting, batch: Batch, **options: Any) -> Any:
    """`curvature.kfac`, `ekfac` or `foof`; `options` are passed on."""
    params = jax.eval_shape(problem.network.init, jax.random.key(0))
    registry = curvature.register(problem.loss_fn, params, batch)
    recipe = getattr(curvature, name)
    if problem.chosen_rate:
        return recipe(registry, **setting, kind=curvature.EmpiricalFisher(), **options)
    damping = curvature.LevenbergMarquardt(setting["initial_damping"])
    return recipe(registry, curvature.QuadraticModel(), MOMENTUM, damping, **options)


def eigen(name: str, problem: Problem, setting: Any, batch: Batch) -> Any:
    """`curvature.eigen_adam`, in the eigenbasis of the Fisher matrix's factors or of Shampoo's."""
    params = jax.eval_shape(problem.network.init, jax.random.key(0))
    registry = curvature.register(problem.loss_fn, params, batch)
    kind = curvature.Shampoo() if name == "soap" else curvature.Fisher()
    return curvature.eigen_adam(registry, **setting, kind=kind)


def first_order(name: str, setting: Any) -> optax.GradientTransformation:
    """One of optax's; Muon orthogonalises hidden layers' matrices and leaves the rest to Adam."""
    if name == "sgd":
        return optax.sgd(**setting, momentum=MOMENTUM)
    if name == "muon":
        return optax.contrib.muon(**setting, muon_weight_dimension_numbers=hidden_matrices)
    return getattr(optax, name)(**setting)


def hidden_matrices(params: PyTree) -> PyTree:
    """Muon's dimension numbers: matrices, but for tables of tokens and positions and the output."""

    def one(path: Any, leaf: Array) -> optax.contrib.MuonDimensionNumbers | None:
        apart = any(getattr(key, "key", None) in ("tokens", "positions", "out") for key in path)
        return None if leaf.ndim != 2 or apart else optax.contrib.MuonDimensionNumbers()

    return jax.tree_util.tree_map_with_path(one, params)


def scheduled(setting: Setting, steps: int) -> dict[str, Any]:
    """The setting with a warm-up and a cosine decay of its learning rate."""
    if "learning_rate" not in setting:
        return dict(setting)
    rate = optax.warmup_cosine_decay_schedule(0.0, setting["learning_rate"], steps // 20, steps)
    return {**setting, "learning_rate": rate}


def trainer(name: str, problem: Problem, setting: Setting, batch: Batch, steps: int) -> Trainer:
    """Any of the optimizers, for so many steps; `batch` shows the shapes."""
    given = scheduled(setting, steps) if problem.scheduled else setting
    if name == "kfac_jax":
        return kfac_jax.trainer(problem, setting)
    if name in OURS:
        return optax_trainer(problem, ours(name, problem, setting, batch))
    make = eigen(name, problem, given, batch) if name in EIGEN else first_order(name, given)
    return optax_trainer(problem, make)


def optax_trainer(problem: Problem, tx: optax.GradientTransformation) -> Trainer:
    """A jitted step of an optax transformation, which consumes parameters and state."""
    tx = optax.with_extra_args_support(tx)

    def step(params: PyTree, state: PyTree, batch: Batch, key: Array) -> tuple[PyTree, PyTree]:
        value, grads = jax.value_and_grad(problem.loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, loss_args=(batch,), key=key, value=value)
        return optax.apply_updates(params, updates), state

    init = jax.jit(tx.init)
    return Trainer(lambda params, batch, key: init(params), jax.jit(step, donate_argnums=(0, 1)))


def names(given: Sequence[str], kfac_jax_found: bool) -> list[str]:
    """The optimizers to run, Adam and AdamW first: others are compared with them."""
    chosen = [name for name in OPTIMIZERS if name in given]
    if not kfac_jax_found:
        chosen = [name for name in chosen if name != "kfac_jax"]
    return sorted(chosen, key=lambda name: name not in ("adam", "adamw"))
