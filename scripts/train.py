"""Trains a small network on handwritten digits with K-FAC, Adam or SGD, or a large transformer.

One plain-JAX loop serves Flax linen, Flax NNX and Haiku; nothing is downloaded. Writes metrics.json
(settings, versions, curves, final figures) and training.png, and while it trains a line of
metrics.jsonl and a TensorBoard event for each measurement. With --compare-every, true and empirical
Fisher are compared on the way: their figures are among the measurements, comparison.png draws them
over the steps, and comparison.html is a report on the trained network.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import curvature
from digits import data, folder, loop, optimizers, options, plots, problems, report, watch

EPILOG = """\
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

# K-FAC options are None unless given, so that giving one to Adam or SGD can be refused.
KFAC_OPTIONS = (
    "damping",
    "initial_damping",
    "halve_damping_every",
    "fisher",
    "samples",
    "decay",
    "statistics_every",
    "refresh_every",
    "adaptive",
)
TRANSFORMER = "transformer"
ADAPTIVE_DAMPING = curvature.LevenbergMarquardt().initial
DEFAULTS = {field.name: field.default for field in dataclasses.fields(optimizers.Settings)}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="train.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=options.HelpFormatter,
        allow_abbrev=False,
    )
    _add_problem(result.add_argument_group("problem"))
    _add_training(result.add_argument_group("training"))
    _add_kfac(result.add_argument_group("K-FAC (refused with another optimizer)"))
    _add_output(result.add_argument_group("output"))
    return result


def _add_problem(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--framework",
        choices=problems.FRAMEWORKS,
        default="linen",
        help="what the model is written in (default: linen)",
    )
    group.add_argument(
        "--model",
        choices=(*problems.ARCHITECTURES, TRANSFORMER),
        default="mlp",
        help="see below (default: mlp)",
    )


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--optimizer", choices=optimizers.OPTIMIZERS, default="kfac", help="default: kfac"
    )
    group.add_argument(
        "--steps", type=options.positive_int, default=200, metavar="N", help="default: 200"
    )
    group.add_argument(
        "--batch-size",
        type=options.batch_size,
        default=250,
        metavar="N",
        help=f"{data.TRAIN_IMAGES} is the full batch (default: 250)",
    )
    rates = ", ".join(
        f"{rate:g} for {name}" for name, rate in optimizers.DEFAULT_LEARNING_RATE.items()
    )
    group.add_argument(
        "--learning-rate",
        type=options.positive_float,
        metavar="X",
        help=f"default: {rates}",
    )
    group.add_argument(
        "--momentum",
        type=options.fraction,
        default=0.9,
        metavar="X",
        help="in [0, 1); Adam's first decay rate (default: 0.9)",
    )
    group.add_argument(
        "--seed",
        type=options.seed,
        default=0,
        metavar="N",
        help="data split, initialisation, batches, dropout and sampled targets (default: 0)",
    )


def _add_kfac(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--damping",
        type=options.positive_float,
        metavar="X",
        help=f"added to the curvature (default: {DEFAULTS['damping']:g})",
    )
    group.add_argument(
        "--initial-damping",
        type=options.positive_float,
        metavar="X",
        help="where damping starts, to fall towards --damping (default: constant)",
    )
    group.add_argument(
        "--halve-damping-every",
        type=options.positive_int,
        metavar="N",
        help="steps in which the difference of the two is halved "
        f"(default: {DEFAULTS['halve_damping_every']})",
    )
    group.add_argument(
        "--fisher",
        choices=optimizers.FISHERS,
        help="targets drawn from the model, all of the model's targets in closed form, or the "
        f"data's own labels (default: {DEFAULTS['fisher']})",
    )
    group.add_argument(
        "--samples",
        type=options.positive_int,
        metavar="N",
        help=f"draws an example, for --fisher sampled (default: {DEFAULTS['samples']})",
    )
    group.add_argument(
        "--decay",
        type=options.fraction,
        metavar="X",
        help=f"of the running average of the curvature, in [0, 1) (default: {DEFAULTS['decay']:g})",
    )
    group.add_argument(
        "--statistics-every",
        type=options.positive_int,
        metavar="N",
        help=f"steps between curvature estimates (default: {DEFAULTS['statistics_every']})",
    )
    group.add_argument(
        "--refresh-every",
        type=options.positive_int,
        metavar="N",
        help=f"steps between inversions (default: {DEFAULTS['refresh_every']})",
    )
    group.add_argument(
        "--adaptive",
        action="store_true",
        default=None,
        help="learning rate and momentum chosen for every step by the quadratic model, and damping "
        f"adapted from --damping (default then: {ADAPTIVE_DAMPING:g})",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--out",
        type=options.out_folder,
        default=Path("runs/train"),
        metavar="FOLDER",
        help="default: runs/train",
    )
    group.add_argument(
        "--record-every",
        type=options.positive_int,
        default=1,
        metavar="N",
        help="steps between measurements on the whole training set (default: 1)",
    )
    group.add_argument(
        "--checkpoint-every",
        type=options.positive_int,
        metavar="N",
        help="steps between checkpoints, of which the last is kept (default: none)",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on from the checkpoint in --out, as if never stopped, or start without one; "
        "--steps may be larger than before, other settings must be the same",
    )
    group.add_argument(
        "--compare-every",
        type=options.positive_int,
        metavar="N",
        help=f"steps between comparisons of true and empirical Fisher on {watch.IMAGES} training "
        "images, about a second each, and a report at the end (default: none)",
    )
    group.add_argument("--quiet", action="store_true", help="no progress bar and no layer table")


def asks_for_transformer(argv: Sequence[str]) -> bool:
    """Whether the model is the one with a command line of its own."""
    pairs = itertools.pairwise(argv)
    return f"--model={TRANSFORMER}" in argv or ("--model", TRANSFORMER) in pairs


def settings_from(
    command: argparse.ArgumentParser, args: argparse.Namespace
) -> optimizers.Settings:
    """The optimizer that the options describe; stops on options that contradict each other."""
    given = {name: getattr(args, name) for name in KFAC_OPTIONS if getattr(args, name) is not None}
    if given and args.optimizer != "kfac":
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        command.error(f"--optimizer {args.optimizer} has no {names}: only kfac does")
    if "samples" in given and given.get("fisher", "sampled") != "sampled":
        command.error(f"--samples needs --fisher sampled, not --fisher {given['fisher']}")
    if "halve_damping_every" in given and "initial_damping" not in given:
        command.error("--halve-damping-every needs --initial-damping to start from")
    if args.adaptive:
        fixed = [
            "--" + name.replace("_", "-")
            for name in ("learning_rate", "initial_damping")
            if getattr(args, name) is not None
        ]
        if fixed:
            command.error(
                f"--adaptive chooses what {' and '.join(fixed)} would fix: leave that out"
            )
        given.setdefault("damping", ADAPTIVE_DAMPING)
    rate = args.learning_rate or optimizers.DEFAULT_LEARNING_RATE[args.optimizer]
    return optimizers.Settings(args.optimizer, rate, args.momentum, **given)


def run_folder(
    command: argparse.ArgumentParser, args: argparse.Namespace, settings: optimizers.Settings
) -> folder.RunFolder:
    """Opens --out, and says where the run begins if it is resumed."""
    fixed = ("framework", "model", "optimizer", "seed", "batch_size", "record_every")
    same = {name: getattr(args, name) for name in fixed} | settings.describe()
    if args.compare_every:  # said only then, so that runs from before the option can be resumed
        same["compare_every"] = args.compare_every
    del same["name"]  # the optimizer's
    try:
        place = folder.RunFolder(args.out, same, args.steps, args.checkpoint_every, args.resume)
    except ValueError as error:
        command.error(str(error))
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
    command = parser()
    args = command.parse_args(argv)
    settings = settings_from(command, args)
    options.check_framework(command, args.framework)
    place = run_folder(command, args, settings)

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
    median = 1e3 * run.median_step_seconds
    print(
        f"time      {run.curve.seconds[-1]:.2f} s in steps (median {median:.2f} ms), "
        f"{run.setup_seconds:.1f} s to compile"
    )
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
