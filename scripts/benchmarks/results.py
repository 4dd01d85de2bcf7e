"""Results as JSON files, one for a problem; medians over seeds; the table."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import optimizers
from benchmarks.problems import Problem
from benchmarks.protocol import Protocol
from curvature import text

Entry = dict[str, Any]


class Curve(NamedTuple):
    """Medians over seeds at the steps that every run recorded."""

    steps: list[int]
    seconds: np.ndarray
    loss: np.ndarray

    def first_at_most(self, loss: float) -> int | None:
        """The position of the first point that is no higher than `loss`."""
        return next((i for i, value in enumerate(self.loss) if value <= loss), None)


def start(problem: Problem, path: Path) -> dict[str, Any]:
    """The results so far, or none; raises where they are of another problem."""
    params = jax.eval_shape(problem.network.init, jax.random.key(0))
    about = {
        "problem": problem.name,
        "description": problem.description,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "examples": problem.data.size,
        "batch_size": problem.batch_size,
        "not_in_optax": list(optimizers.NOT_IN_OPTAX),
    }
    if problem.measured is not None:
        about["measured"] = problem.measured
    if not path.exists():
        return {**about, "optimizers": {}}
    kept = json.loads(path.read_text())
    if {key: kept[key] for key in about} != about:
        raise SystemExit(f"{path} is not of {about}: remove it, or give another --out.")
    return kept


def check_kept(name: str, entry: Entry, protocol: Protocol) -> None:
    """Raises where results that are kept came from another protocol."""
    asked = dataclasses.asdict(protocol)
    if entry["protocol"] != asked:
        raise SystemExit(
            f"{name} was measured with {entry['protocol']}, asked for is {asked}: "
            "give the same flags, or --fresh to measure again."
        )


def median_curve(entry: Entry) -> Curve:
    """Medians at each recorded step: a diverged run counts as infinite from then on.

    Runs that were cut off after some seconds end the curve where the first of them ends.
    """
    runs = entry["runs"]
    diverged = [run for run in runs if None in run["measures"]["loss"]]
    others = [run for run in runs if run not in diverged] or runs
    points = min((run["steps"] for run in others), key=len)

    def column(run: Entry, values: Sequence[float | None], end: float) -> list[float]:
        padded = [*values, *[None] * len(points)][: len(points)]
        return [end if value is None else value for value in padded]

    loss = [column(run, run["measures"]["loss"], math.inf) for run in runs]
    seconds = [column(run, run["seconds"], math.nan) for run in runs]
    return Curve(points, np.nanmedian(seconds, axis=0), np.median(loss, axis=0))


def table(results: dict[str, Any]) -> str:
    """A row for each optimizer, with how soon it has Adam's (or AdamW's) best loss."""
    entries = results["optimizers"]
    known = [name for name in ("adam", "adamw") if name in entries]
    target = median_curve(entries[known[0]]).loss.min() if known else None
    whose = optimizers.LABELS[known[0] if known else "adam"]
    header = (
        *("optimizer", "setting", "steps", "loss", "best", "seconds", "ms/step", "slowest/median"),
        *("compile s", f"steps to {whose}'s best", f"seconds to {whose}'s best"),
    )
    rows = [_row(name, entry, target) for name, entry in entries.items()]
    return text.table(header, rows, str.rjust)


def _row(name: str, entry: Entry, target: float | None) -> list[str]:
    curve = median_curve(entry)
    at = None if target is None else curve.first_at_most(target)
    median, slowest, compiling = (
        float(np.median([run[what] for run in entry["runs"]]))
        for what in ("median_step_seconds", "slowest_step_seconds", "compile_seconds")
    )
    return [
        optimizers.LABELS[name],
        ", ".join(f"{key} {value:g}" for key, value in entry["setting"].items()),
        str(curve.steps[-1]),
        f"{curve.loss[-1]:.4g}",
        f"{curve.loss.min():.4g}",
        f"{curve.seconds[-1]:.1f}",
        f"{1e3 * median:.1f}",
        f"{slowest / median:.1f}",
        f"{compiling:.1f}",
        "never" if at is None else str(curve.steps[at]),
        "never" if at is None else f"{curve.seconds[at]:.1f}",
    ]


def split_table(results: dict[str, Any]) -> str:
    """Milliseconds of the parts of a step of ours; empty where there are none."""
    splits = {name: e["split"] for name, e in results["optimizers"].items() if e["split"]}
    if not splits:
        return ""
    parts = ("forward_backward", "statistics", "refresh", "apply")
    rows = [
        [optimizers.LABELS[name], *(f"{1e3 * split[part]:.1f}" for part in parts)]
        for name, split in splits.items()
    ]
    return "\n" + text.table(("ms of a step in", *parts), rows, str.rjust)
