"""K-FAC against Adam and SGD on handwritten digits, and true against empirical Fisher.

Trains one narrow, deep tanh network from one initialisation with each optimizer, every one at the
best of its own learning rates, and then compares the two Fisher matrices of the network that K-FAC
trained. Writes metrics.json and training.png. Nothing is downloaded.

K-FAC gets a fifth of the steps. The clock runs inside steps only: compilation, data, evaluation and
progress bars are excluded, for every optimizer alike. Losses are measured on all training images
after every step.

examples:
  python scripts/demo.py
  python scripts/demo.py --seed 3 --out runs/demo-seed-3
  python scripts/demo.py --batch-size 500
  python scripts/demo.py --quick --steps 5
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax

import curvature
from curvature import text
from digits import data, fisher, loop, optimizers, options, plots, problems, report, search

TARGET = 5
"""K-FAC should reach Adam's final training loss in this many times fewer steps.

So it is given no more than that many, in its search as in the final run.
"""

CANDIDATES: dict[str, tuple[optimizers.Settings, tuple[float, ...]]] = {
    "kfac": (
        optimizers.Settings("kfac", 0.1, damping=1e-4, initial_damping=0.1),
        (0.01, 0.03, 0.1, 0.3, 1.0),
    ),
    "adam": (optimizers.Settings("adam", 0.01), (0.001, 0.003, 0.01, 0.03, 0.1)),
    "sgd": (optimizers.Settings("sgd", 0.1), (0.03, 0.1, 0.3, 1.0, 3.0)),
}
"""What each optimizer may try: five learning rates, half a decade apart, nothing else."""

SEARCH_NOTE = """\
All learning rates are constant, all momenta 0.9; Adam's other settings are optax's defaults. The
damping of K-FAC falls from 0.1 towards 0.0001, halved every 10 steps: set once, on this problem."""

FISHER_NOTE = """\
The empirical Fisher is made of the gradients of the labels given. Once the network fits them, these
gradients vanish, and the empirical Fisher with them, long before the curvature of the loss does."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The command line."""

    steps: options.PositiveInt = 1000  # of Adam and SGD; K-FAC gets one for every 5
    batch_size: options.BatchSize = data.TRAIN_IMAGES  # all of them are the full batch
    framework: Literal[*problems.FRAMEWORKS] = "linen"  # what the model is written in
    seed: options.Seed = 0  # data split, initialisation, batches and sampled targets
    quick: bool = False  # one learning rate each instead of five: to see that everything runs
    out: options.OutFolder = Path("runs/demo")  # for metrics.json and training.png
    quiet: bool = False  # no progress bars

    def __post_init__(self) -> None:
        options.check_framework(self.framework)


def plan_for(name: str, plan: loop.Plan) -> loop.Plan:
    """The plan of one optimizer: K-FAC's is shorter."""
    if name != "kfac":
        return plan
    return dataclasses.replace(plan, steps=max(1, plan.steps // TARGET))


def rates_to_try(name: str, quick: bool) -> tuple[float, ...]:
    """The learning rates of one optimizer's search."""
    settings, rates = CANDIDATES[name]
    return (settings.learning_rate,) if quick else rates


def search_all(
    problem: problems.Problem, digits: data.Digits, plan: loop.Plan, registry: Any, quick: bool
) -> dict[str, search.Search]:
    """Finds the learning rate of every optimizer, and prints what was tried."""
    searches = {}
    for name, (settings, _) in CANDIDATES.items():
        rates = rates_to_try(name, quick)
        sparse = dataclasses.replace(plan_for(name, plan), record_every=max(1, plan.steps // 20))
        searches[name] = search.search(problem, digits, settings, rates, sparse, registry)
        print(search_line(searches[name]), flush=True)
    return searches


def search_line(done: search.Search) -> str:
    """The final training loss at every learning rate of one optimizer."""
    cells = [f"{done.best.settings.label:18}{done.best.plan.steps:>5} steps "]
    for run in done.runs:
        loss = "diverged" if run.stopped else f"{run.curve.loss[-1]:.1e}"
        mark = "*" if run is done.best else " "
        cells.append(f"{run.settings.learning_rate:>6g}: {loss:>8}{mark}")
    return "".join(cells).rstrip()


def results_table(runs: dict[str, loop.Run]) -> str:
    """Where every optimizer ended."""
    header = (
        "optimizer",
        "learning rate",
        "steps",
        "training loss",
        "accuracy",
        "test loss",
        "accuracy",
        "median step",
        "compiled in",
    )
    rows = [
        (
            run.settings.label,
            f"{run.settings.learning_rate:g}",
            f"{run.curve.steps[-1]}",
            f"{run.curve.loss[-1]:.3e}",
            f"{run.curve.accuracy[-1]:.2%}",
            f"{run.test_loss:.3f}",
            f"{run.test_accuracy:.2%}",
            f"{1e3 * run.median_step_seconds:.2f} ms",
            f"{run.setup_seconds:.1f} s",
        )
        for run in runs.values()
    ]
    return text.table(header, rows, str.rjust)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How many times fewer steps K-FAC took to the loss that Adam ended at."""

    target_loss: float
    adam_steps: int
    adam_seconds: float
    kfac_steps: int | None
    kfac_seconds: float | None

    @property
    def ratio(self) -> float | None:
        """Adam's steps for each of K-FAC's."""
        return None if self.kfac_steps is None else self.adam_steps / max(1, self.kfac_steps)

    @property
    def met(self) -> bool:
        return self.ratio is not None and self.ratio >= TARGET

    def as_dict(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "steps_ratio": self.ratio,
            "target_ratio": TARGET,
            "target_met": self.met,
        }

    def __str__(self) -> str:
        adam = f"Adam's final training loss, {self.target_loss:.2e} after {self.adam_steps} steps"
        if self.ratio is None:
            return f"K-FAC did not reach {adam}. Target ({TARGET}x fewer steps): missed."
        return (
            f"K-FAC reached {adam}, in {self.kfac_steps} steps: {self.ratio:.1f}x fewer "
            f"({self.kfac_seconds:.2f} s of {self.adam_seconds:.2f} s).\n"
            f"Target (at least {TARGET}x fewer steps): {'met' if self.met else 'missed'}."
        )


def judge(kfac: loop.Curve, adam: loop.Curve) -> Verdict:
    """Compares the two curves at Adam's last loss."""
    target = adam.loss[-1]
    position = kfac.first_at_most(target)
    return Verdict(
        target_loss=target,
        adam_steps=adam.steps[-1],
        adam_seconds=adam.seconds[-1],
        kfac_steps=None if position is None else kfac.steps[position],
        kfac_seconds=None if position is None else kfac.seconds[position],
    )


def metrics(
    problem: problems.Problem,
    plan: loop.Plan,
    runs: dict[str, loop.Run],
    searches: dict[str, search.Search],
    verdict: Verdict,
    fishers: dict[str, curvature.Comparison],
) -> dict[str, Any]:
    """Everything that metrics.json holds."""
    return {
        "program": "demo",
        "problem": problem.name,
        "network": str(problem.architecture),
        "plan": dataclasses.asdict(plan),
        "seconds": "inside steps only: compilation, data and evaluation excluded, for all alike",
        "verdict": verdict.as_dict(),
        "runs": {name: _run_metrics(run, searches[name]) for name, run in runs.items()},
        "fisher": {when: fisher.figures(found) for when, found in fishers.items()},
        "environment": report.environment(),
    }


def _run_metrics(run: loop.Run, done: search.Search) -> dict[str, Any]:
    return {
        "settings": run.settings.describe(),
        "search": [
            {"learning_rate": trial.settings.learning_rate, "training_loss": trial.curve.loss[-1]}
            for trial in done.runs
        ],
        "best_is_at_edge_of_search": done.at_edge,
        "test_loss": run.test_loss,
        "test_accuracy": run.test_accuracy,
        "setup_seconds": run.setup_seconds,
        "median_step_seconds": run.median_step_seconds,
        "stopped": run.stopped,
        "curve": dataclasses.asdict(run.curve),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program."""
    args = options.read(Settings, argv, __doc__)
    began = time.perf_counter()

    digits = data.load(args.seed)
    problem = problems.make(args.framework, "deep")
    plan = loop.Plan(args.steps, args.batch_size, args.seed, progress=not args.quiet)
    print(report.heading("What the library finds in the model"))
    registry = loop.register(problem, digits.train, plan)
    print(registry, flush=True)

    print(report.heading("Learning rates: training loss at the end (* chosen)"))
    searches = search_all(problem, digits, plan, registry, args.quick)
    print(SEARCH_NOTE)

    print(report.heading("Training (loss and accuracy on all training images)"), flush=True)
    runs = {
        name: loop.train(problem, digits, done.best.settings, plan_for(name, plan), registry)
        for name, done in searches.items()
    }
    print(results_table(runs))
    verdict = judge(runs["kfac"].curve, runs["adam"].curve)
    print(f"\n{verdict}")
    print("Seconds exclude compilation, data and evaluation, for every optimizer alike.")

    print(
        report.heading(
            "True (F) and empirical (EF) Fisher of the network K-FAC trained (ratio = tr EF / tr F)"
        ),
        flush=True,
    )
    fishers = compare_fishers(problem, digits, plan, registry, runs["kfac"])
    print(fisher.table(fishers["trained"], fishers["initial"]))
    print(FISHER_NOTE)

    write(args.out, problem, plan, runs, searches, verdict, fishers)
    print(f"\nDone in {time.perf_counter() - began:.0f} s.")
    return 0


def compare_fishers(
    problem: problems.Problem, digits: data.Digits, plan: loop.Plan, registry: Any, run: loop.Run
) -> dict[str, curvature.Comparison]:
    """Both Fishers on the first batch's worth of images, before and after training."""
    batch = data.Batch(digits.train.x[: plan.batch_size], digits.train.y[: plan.batch_size])
    key = jax.random.key(plan.seed)
    params, model_state = problem.init(key)
    return {
        "initial": fisher.compare(registry, params, model_state, batch, key),
        "trained": fisher.compare(registry, run.state.params, run.state.model_state, batch, key),
    }


def write(
    out: Path,
    problem: problems.Problem,
    plan: loop.Plan,
    runs: dict[str, loop.Run],
    searches: dict[str, search.Search],
    verdict: Verdict,
    fishers: dict[str, curvature.Comparison],
) -> None:
    """Writes both files and says where."""
    content = metrics(problem, plan, runs, searches, verdict, fishers)
    report.write_json(out / "metrics.json", content)
    full = plan.batch_size == data.TRAIN_IMAGES
    batches = f"full batch of {plan.batch_size:,}" if full else f"batches of {plan.batch_size:,}"
    title = (
        f"Handwritten digits, {problem.architecture} tanh network, {batches}\n"
        "rates by search; K-FAC's damping schedule was set for this problem"
    )
    plots.compare(out / "training.png", list(runs.values()), title, (runs["kfac"], runs["adam"]))
    print(f"\nWritten: {out / 'metrics.json'}, {out / 'training.png'}")


if __name__ == "__main__":
    sys.exit(main())
