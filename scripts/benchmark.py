"""Trains the benchmark problems with every optimizer and compares them.

Each optimizer gets the same number of trials on one seed, then runs with the best setting on others
from the same initialisations and on the same batches. Writes a JSON file and a plot for each
problem; results that a JSON file already has are kept.

examples:
  python scripts/benchmark.py --problem digits_classifier --optimizer adam kfac
  python scripts/benchmark.py --kfac-jax ../kfac-jax
  python scripts/benchmark.py --problem language_0.1M
  python scripts/benchmark.py --side-by-side --kfac-jax ../kfac-jax
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # see README.md; processes started here too

import jax

from benchmarks import (
    kfac_jax,
    language,
    optimizers,
    physics,
    plots,
    problems,
    protocol,
    results,
    side_by_side,
    split,
)
from benchmarks.problems import Problem
from digits import options, report

QUICK_STEPS = 3
PROBLEMS = {**problems.PROBLEMS, **language.PROBLEMS, **physics.PROBLEMS}
Data = Literal[*side_by_side.DATA]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The command line."""

    # unless given all but physics and language models, of which two need an accelerator
    problem: tuple[Literal[*PROBLEMS], ...] = tuple(problems.PROBLEMS)
    optimizer: tuple[Literal[*optimizers.OPTIMIZERS], ...] = optimizers.OPTIMIZERS  # to measure
    seeds: options.PositiveInt = 3  # of runs with the best setting
    # of a run; unless given the problem's, more without curvature
    steps: options.PositiveInt | None = None
    # in the steps of a run, after which it stops
    seconds: options.PositiveFloat | None = None
    kfac_jax: Path | None = None  # checkout of kfac-jax, else it is left out
    out: options.OutFolder | None = None  # docs/benchmarks unless given
    fresh: bool = False  # measure again what the JSON files have
    quick: bool = False  # a few steps, to runs/benchmarks: does all of it run?
    side_by_side: bool = False  # only the time of a step, ours and kfac-jax's
    data: Data = "curves"  # for --side-by-side

    @property
    def folder(self) -> Path:
        """Where results are written."""
        return self.out or Path("runs/benchmarks" if self.quick else "docs/benchmarks")


def measure(name: str, problem: Problem, plan: protocol.Protocol) -> results.Entry:
    """Tunes and runs one optimizer."""
    trials = protocol.tune(name, problem, plan)
    setting = protocol.best(trials)
    runs = [
        protocol.run(name, problem, setting, seed, plan.steps, plan.seconds)
        for seed in range(1, plan.seeds + 1)
    ]
    return {
        "protocol": dataclasses.asdict(plan),
        "trials": trials,
        "setting": setting,
        "runs": [dataclasses.asdict(run) for run in runs],
        "split": split.seconds(name, problem, setting) if name in optimizers.OURS else None,
        "environment": report.environment(),
    }


def plan_for(name: str, problem: Problem, args: Settings) -> protocol.Protocol:
    """How long an optimizer runs and what is tried."""
    if args.quick:
        return protocol.Protocol(QUICK_STEPS, seeds=1, trials=2)
    usual = problem.steps if name in optimizers.WITH_CURVATURE else problem.first_order_steps
    return protocol.Protocol(args.steps or usual, args.seeds, seconds=args.seconds)


def run_problem(problem: Problem, names: Sequence[str], args: Settings) -> None:
    """Measures what is missing, writing as it goes, and prints the table."""
    path = args.folder / f"{problem.name}.json"
    found = results.start(problem, path)
    print(report.heading(f"{problem.name}: {problem.description}"), flush=True)
    for name in names:
        plan = plan_for(name, problem, args)
        if name in found["optimizers"] and not args.fresh:
            results.check_kept(name, found["optimizers"][name], plan)
            print(f"  {name}: kept from {path}")
            continue
        found["optimizers"][name] = measure(name, problem, plan)
        report.write_json(path, found)
    found = results.start(problem, path)  # as readers find it: JSON has no infinities
    plots.draw(path.with_suffix(".png"), found)
    print(results.table(found) + results.split_table(found))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program."""
    args = options.read(Settings, argv, __doc__)
    skipped = "no --kfac-jax"
    if args.kfac_jax is not None:
        skipped = kfac_jax.add_checkout(args.kfac_jax)
    if skipped:
        print(f"kfac-jax is left out: {skipped}")
    if args.side_by_side:
        return compare_steps(args, None if skipped else args.kfac_jax)
    names = optimizers.names(args.optimizer, not skipped)
    if not names:
        options.stop("no optimizer is left to run")
    print(f"optax has no {' and no '.join(optimizers.NOT_IN_OPTAX)}: SOAP is eigen_adam's")
    for name in args.problem:
        problem = PROBLEMS[name]()
        with jax.enable_x64(True) if problem.double else contextlib.nullcontext():
            run_problem(problem, names, args)
    return 0


def compare_steps(args: Settings, checkout: Path | None) -> int:
    """Runs `--side-by-side`."""
    steps = QUICK_STEPS if args.quick else args.steps or 60
    compared = side_by_side.compare(args.data, steps, checkout)
    report.write_json(args.folder / "side_by_side.json", compared)
    print(side_by_side.table(compared))
    return 0


if __name__ == "__main__":
    sys.exit(main())
