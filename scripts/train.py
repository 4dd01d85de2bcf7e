"""Trains a small network on handwritten digits with K-FAC, Adam or SGD, or a large transformer.

One plain-JAX loop serves Flax linen, Flax NNX and Haiku; nothing is downloaded. Writes metrics.json
(settings, versions, curves, final figures) and training.png, and while it trains a line of
metrics.jsonl and a TensorBoard event for each measurement. With --compare-every, true and empirical
Fisher are compared on the way: their figures are among the measurements, comparison.png draws them
over the steps, and comparison.html is a report on the trained network.

models (64 inputs, 10 classes):
  mlp        64-64-64-10, ReLU
  deep       64-20-20-20-20-20-10, tanh: narrow and deep, hard for first-order methods
  batchnorm  as mlp, with batch norm (its statistics are model state) and dropout (needs keys)

  transformer  decoder-only, on bytes, 0.1 M to over 100 M parameters, on one device, a mesh or
               several processes; it has options of its own: --model transformer --help

examples:
  python scripts/train.py
  python scripts/train.py --framework haiku --model deep --batch-size 1500 --steps 100
  python scripts/train.py --framework nnx --model batchnorm --fisher exact --damping 0.01
  python scripts/train.py --adaptive --model deep --steps 2000 --checkpoint-every 100 --resume
  python scripts/train.py --optimizer adam --learning-rate 0.01 --out runs/adam
  python scripts/train.py --optimizer adam --compare-every 20 --checkpoint-every 100
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax

import curvature
from digits import data, folder, loop, optimizers, options, plots, problems, report, watch

TRANSFORMER = "transformer"


@dataclasses.dataclass(frozen=True)
class Kfac:
    """Refused with another optimizer."""

    # None unless given, so that giving one to Adam or SGD can be refused.

    damping: options.PositiveFloat | None = None  # added to the curvature; 0.03 unless given
    # where damping starts, to fall towards --damping
    initial_damping: options.PositiveFloat | None = None
    # steps in which the difference of the two is halved; 10 unless given
    halve_damping_every: options.PositiveInt | None = None
    # targets drawn from the model, as unless given, all of its targets in closed form, or the
    # data's own labels
    fisher: Literal[*optimizers.FISHERS] | None = None
    # draws an example, for --fisher sampled; 1 unless given
    samples: options.PositiveInt | None = None
    # of the running average of the curvature, in [0, 1); 0.95 unless given
    decay: options.Fraction | None = None
    # steps between curvature estimates; 1 unless given
    statistics_every: options.PositiveInt | None = None
    refresh_every: options.PositiveInt | None = None  # steps between inversions; 1 unless given
    # learning rate and momentum chosen for every step by the quadratic model, and damping adapted
    # from --damping, which is 1 then unless given
    adaptive: bool = False

    @property
    def given(self) -> dict[str, Any]:
        """What the command line has of these."""
        return {k: v for k, v in vars(self).items() if v is not None and v is not False}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The command line."""

    framework: Literal[*problems.FRAMEWORKS] = "linen"  # what the model is written in
    model: Literal[*problems.ARCHITECTURES, TRANSFORMER] = "mlp"  # see above
    optimizer: Literal[*optimizers.OPTIMIZERS] = "kfac"  # sgd has momentum
    steps: options.PositiveInt = 200  # of training
    batch_size: options.BatchSize = 250  # images; 1500 is the full batch
    # 0.03 for kfac, 0.003 for adam, 0.1 for sgd unless given
    learning_rate: options.PositiveFloat | None = None
    momentum: options.Fraction = 0.9  # in [0, 1); Adam's first decay rate
    seed: options.Seed = 0  # data split, initialisation, batches, dropout and sampled targets
    out: options.OutFolder = Path("runs/train")  # for everything that is written
    record_every: options.PositiveInt = 1  # steps between measurements on the training set
    # steps between checkpoints, of which the last is kept
    checkpoint_every: options.PositiveInt | None = None
    # go on from the checkpoint in --out, as if never stopped, or start without one; --steps may be
    # larger than before, other settings must be the same
    resume: bool = False
    # steps between comparisons of true and empirical Fisher on 500 training images, about a second
    # each, and a report at the end
    compare_every: options.PositiveInt | None = None
    quiet: bool = False  # no progress bar and no layer table
    kfac: Kfac = Kfac()

    def __post_init__(self) -> None:
        given = [flag(name) for name in self.kfac.given]
        if given and self.optimizer != "kfac":
            names = ", ".join(given)
            raise ValueError(f"--optimizer {self.optimizer} has no {names}: only kfac does")
        if self.kfac.samples and self.kfac.fisher not in (None, "sampled"):
            raise ValueError(f"--samples needs --fisher sampled, not --fisher {self.kfac.fisher}")
        if self.kfac.halve_damping_every and not self.kfac.initial_damping:
            raise ValueError("--halve-damping-every needs --initial-damping to start from")
        rates = {"learning_rate": self.learning_rate, "initial_damping": self.kfac.initial_damping}
        fixed = " and ".join(flag(name) for name, value in rates.items() if value)
        if self.kfac.adaptive and fixed:
            raise ValueError(f"--adaptive chooses what {fixed} would fix: leave that out")
        options.check_framework(self.framework)

    @property
    def recipe(self) -> optimizers.Settings:
        """The optimizer that these describe."""
        given = self.kfac.given
        if self.kfac.adaptive:
            given.setdefault("damping", curvature.LevenbergMarquardt().initial)
        rate = self.learning_rate or optimizers.DEFAULT_LEARNING_RATE[self.optimizer]
        return optimizers.Settings(self.optimizer, rate, self.momentum, **given)


def flag(name: str) -> str:
    """How a setting is called on the command line."""
    return "--" + name.replace("_", "-")


def asks_for_transformer(argv: Sequence[str]) -> bool:
    """Whether the model is the one with a command line of its own."""
    pairs = itertools.pairwise(argv)
    return f"--model={TRANSFORMER}" in argv or ("--model", TRANSFORMER) in pairs


def run_folder(args: Settings, settings: optimizers.Settings) -> folder.RunFolder:
    """Opens --out, and says where the run begins if it is resumed."""
    fixed = ("framework", "model", "optimizer", "seed", "batch_size", "record_every")
    same = {name: getattr(args, name) for name in fixed} | settings.describe()
    if args.compare_every:  # said only then, so that runs from before the option can be resumed
        same["compare_every"] = args.compare_every
    del same["name"]  # the optimizer's
    try:
        place = folder.RunFolder(args.out, same, args.steps, args.checkpoint_every, args.resume)
    except (ValueError, OSError) as error:
        options.stop(error)
    if args.resume:
        found = f"resumed after step {place.step}" if place.step else "no checkpoint, a new run"
        print(f"{args.out}: {found}", flush=True)
    return place


def metrics(problem: problems.Problem, plan: loop.Plan, run: loop.Run) -> dict[str, Any]:
    """Everything that metrics.json holds."""
    return {
        "program": "train",
        "problem": problem.name,
        "network": str(problem.architecture),
        "optimizer": run.settings.describe(),
        "plan": dataclasses.asdict(plan),
        "final": {
            "training_loss": run.curve.loss[-1],
            "training_accuracy": run.curve.accuracy[-1],
            "test_loss": run.test_loss,
            "test_accuracy": run.test_accuracy,
        },
        "seconds_in_steps": run.curve.seconds[-1],
        "setup_seconds": run.setup_seconds,
        "median_step_seconds": run.median_step_seconds,
        "stopped": run.stopped,
        "curve": dataclasses.asdict(run.curve),
        "environment": report.environment(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit status is 1 if the training diverged."""
    argv = sys.argv[1:] if argv is None else argv
    if asks_for_transformer(argv):
        from transformer import command as transformer

        return transformer.main(argv)
    args = options.read(Settings, argv, __doc__)
    settings = args.recipe
    place = run_folder(args, settings)

    digits = data.load(args.seed)
    problem = problems.make(args.framework, args.model)
    plan = loop.Plan(args.steps, args.batch_size, args.seed, args.record_every, not args.quiet)
    registry = loop.register(problem, digits.train, plan)
    if settings.name == "kfac" and not args.quiet:
        print(registry, flush=True)

    comparing = None
    if args.compare_every:
        comparing = watch.Watch(problem, digits.train, args.compare_every, args.seed, place.rows)
    with contextlib.closing(place):
        run = loop.train(problem, digits, settings, plan, registry, folder=place, watch=comparing)
    report.write_json(args.out / "metrics.json", metrics(problem, plan, run))
    title = f"{settings.label}, {problem.name} network ({problem.architecture})"
    plots.single(args.out / "training.png", run, title)
    _print_result(problem, run, args.out)
    if comparing:
        _compare(comparing, run, args.out)
    return 1 if run.stopped else 0


def _print_result(problem: problems.Problem, run: loop.Run, out: Path) -> None:
    parameters = sum(leaf.size for leaf in jax.tree.leaves(run.state.params))
    print(f"{run.settings.label} on the {problem.name} network, {parameters:,} parameters")
    print(f"training  loss {run.curve.loss[-1]:.3e}, accuracy {run.curve.accuracy[-1]:.2%}")
    print(f"test      loss {run.test_loss:.3e}, accuracy {run.test_accuracy:.2%}")
    took = report.steps_took(run.curve.seconds[-1], run.median_step_seconds)
    print(f"time      {took}, {run.setup_seconds:.1f} s to compile")
    print(f"written   {out / 'metrics.json'}, {out / 'training.png'}")
    if run.stopped:
        print(f"train.py: {run.stopped}", file=sys.stderr)


def _compare(comparing: watch.Watch, run: loop.Run, out: Path) -> None:
    """Writes what was compared, and prints the last comparison."""
    plots.save(comparing.history.plot(), out / "comparison.png")
    print(f"written   {out / 'comparison.png'}", end="\n" if run.stopped else ", ", flush=True)
    if not run.stopped:  # else there is nothing to compare
        state = run.state
        found = comparing.full(state.params, state.model_state, run.plan.progress)
        found.save_html(out / "comparison.html")
        print(f"{out / 'comparison.html'}\n\n{found.table()}")


if __name__ == "__main__":
    sys.exit(main())
