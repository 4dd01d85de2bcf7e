"""What a checkpoint of `train.py` holds, read back for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from digits import data, loop, optimizers, problems


class Saved(NamedTuple):
    """A training run at its last checkpoint; `settings` are those it was started with."""

    problem: problems.Problem
    digits: data.Digits
    settings: dict[str, Any]
    step: int
    state: loop.TrainState


def read(path: Path) -> Saved:
    """Rebuilds the problem from the settings in the checkpoint, and restores its state.

    Raises:
      ValueError: there is no checkpoint of train.py there.
    """
    place = path.absolute() / "checkpoints"
    steps = [p.name for p in place.glob("*") if p.name.isdecimal()] if place.is_dir() else []
    if not steps:
        raise ValueError(f"{path} {_found(path)}")
    step = max(map(int, steps))
    # Without a manager, which would also make and tidy folders: the run may be going on.
    reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    stored = ocp.args.Composite(run=ocp.args.JsonRestore())
    settings = reader.restore(place / str(step), args=stored).run["settings"]
    problem = problems.make(settings["framework"], settings["model"])
    digits = data.load(settings["seed"])
    target = ocp.args.StandardRestore(_target(problem, digits, settings))
    state = reader.restore(place / str(step), args=ocp.args.Composite(state=target)).state
    return Saved(problem, digits, settings, step, state)


def _found(path: Path) -> str:
    """What there is instead of a checkpoint, and what to do."""
    if not path.is_dir():
        found = "is a file, not a folder" if path.exists() else "does not exist"
    elif (path / "metrics.jsonl").exists():
        found = "holds a run of train.py that made no checkpoint"
    else:
        found = "holds no checkpoint of train.py"
    return (
        f"{found}. Expected the --out folder of a run with checkpoints, such as: "
        f"python scripts/train.py --checkpoint-every 100 --out {path}"
    )


def _target(
    problem: problems.Problem, digits: data.Digits, settings: dict[str, Any]
) -> loop.TrainState:
    """A state of the saved one's shapes."""
    names = {"learning_rate": 0.0}  # not kept where the optimizer chooses it
    names |= {k: v for k, v in settings.items() if k in optimizers.Settings.__dataclass_fields__}
    optimizer = optimizers.Settings(settings["optimizer"], **names)
    plan = loop.Plan(0, settings["batch_size"], settings["seed"])
    tx = optimizers.make(optimizer, loop.register(problem, digits.train, plan))
    params, model_state = problem.init(jax.random.key(0))
    return loop.TrainState(params, model_state, tx.init(params))
