"""Trains a decoder-only transformer on bytes of Python sources, with curvature or without.

Rotary positions, grouped-query attention, gated layers, a tied embedding; blocks in a loop that is
traced once. From 0.1 M to over 100 M parameters, on one device, a mesh, or several processes, by
flags alone. Writes metrics.json and training.png, and while it trains metrics.jsonl, TensorBoard
events and checkpoints.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from digits import options, report
from digits.folder import RunFolder
from transformer import place, plots, recipes
from transformer.config import DTYPES, Config
from transformer.run import Plan, Result, Trainer, count

EPILOG = """\
examples:
  python scripts/train.py --model transformer                      0.1 M parameters, a minute
  python scripts/train.py --model transformer --framework nnx --layers 4 --width 128 --context 64
  python scripts/train.py --model transformer --optimizer adamw --out runs/adamw
  python scripts/train.py --model transformer --layers 12 --width 768 --heads 12 --kv-heads 4 \\
      --context 1024 --batch-size 32 --dtype bfloat16 --statistics-every 10 \\
      --statistics-batch 0.25 --refresh-every 50 --checkpoint-every 500        an accelerator
  python scripts/train.py --model transformer --mesh data=2,model=4            eight devices
  python scripts/train.py --model transformer --coordinator localhost:1234 --processes 2 \\
      --process 0                                   and the same with --process 1 beside it
"""
MODELS = ("linen", "nnx")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="train.py --model transformer",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=options.HelpFormatter,
        allow_abbrev=False,
    )
    _add_network(result.add_argument_group("network"))
    _add_training(result.add_argument_group("training"))
    _add_place(result.add_argument_group("devices"))
    _add_output(result.add_argument_group("output"))
    return result


def _add_network(group: argparse._ArgumentGroup) -> None:
    usual = Config()
    group.add_argument("--model", choices=("transformer",), default="transformer")
    group.add_argument("--framework", choices=MODELS, default="linen", help="default: linen")
    for name, what in (
        ("layers", "blocks"),
        ("width", "of the residual stream"),
        ("heads", "of queries"),
        ("kv-heads", "of keys and values"),
        ("context", "positions of a window"),
    ):
        options.add_number(group, name, getattr(usual, name.replace("-", "_")), what)
    group.add_argument(
        "--dtype", choices=tuple(DTYPES), default=usual.dtype, help="of the computation"
    )
    group.add_argument(
        "--no-remat",
        dest="remat",
        action="store_false",
        help="keep activations for the backward pass instead of computing them again",
    )


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--optimizer", choices=recipes.OPTIMIZERS, default="eigen_adam", help="default: eigen_adam"
    )
    for name, default, what in (
        ("steps", 600, "of training"),
        ("batch-size", 16, "windows, over all devices"),
        ("statistics-every", 5, "steps between statistics"),
        ("refresh-every", 5, "steps in which every basis is renewed once"),
    ):
        options.add_number(group, name, default, what)
    group.add_argument(
        "--statistics-batch",
        type=options.positive_float,
        metavar="X",
        help="the share of a batch that statistics are taken of (default: all of it)",
    )
    group.add_argument(
        "--gather",
        choices=("inverses", "updates"),
        default="inverses",
        help="on a mesh: every device keeps all bases, or its share of them (default: inverses)",
    )
    group.add_argument(
        "--learning-rate",
        type=options.positive_float,
        metavar="X",
        help=f"at its highest (default: {recipes.RATE['eigen_adam']:g}, and "
        f"{recipes.RATE['adamw']:g} for adamw, times {recipes.WIDTH} / width for wider networks)",
    )
    group.add_argument(
        "--weight-decay", type=options.fraction, default=0.0, metavar="X", help="default: 0"
    )
    group.add_argument("--seed", type=options.seed, default=0, metavar="N", help="default: 0")


def _add_place(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--mesh",
        type=_mesh,
        metavar="AXIS=N,...",
        help="data, fsdp and model, whose product is the number of devices (default: all data)",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of several processes")
    group.add_argument("--processes", type=options.positive_int, metavar="N", help="how many")
    group.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--out",
        type=options.out_folder,
        default=Path("runs/transformer"),
        metavar="FOLDER",
        help="default: runs/transformer",
    )
    group.add_argument(
        "--record-every",
        type=options.positive_int,
        default=20,
        metavar="N",
        help="steps between measurements on what is held out (default: 20)",
    )
    group.add_argument(
        "--checkpoint-every", type=options.positive_int, metavar="N", help="default: none"
    )
    group.add_argument(
        "--stop-after",
        type=options.positive_int,
        metavar="N",
        help="stop there, where time is limited, and go on another time with --resume",
    )
    group.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    group.add_argument("--quiet", action="store_true", help="no progress bar and no layer table")


def _mesh(text: str) -> dict[str, int]:
    sizes = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in place.AXES or name in sizes:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(place.AXES)}")
        sizes[name] = options.positive_int(size)
    return sizes


def build(framework: str, config: Config) -> Any:
    """`init` and `apply` of the network in a framework."""
    if framework == "linen":
        from transformer import linen_model

        return linen_model.build(config)
    from transformer import nnx_model

    return nnx_model.build(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit status is 1 if the training diverged."""
    command = parser()
    args = command.parse_args(argv)
    options.check_framework(command, args.framework)
    place.connect(args.coordinator, args.processes, args.process)
    rate = args.learning_rate or recipes.default_rate(args.optimizer, args.width)
    recipe = recipes.Recipe(
        args.optimizer,
        rate,
        args.weight_decay,
        args.statistics_every,
        args.statistics_batch,
        args.refresh_every,
        args.gather,
    )
    fields = [field.name for field in dataclasses.fields(Config) if hasattr(args, field.name)]
    plan = Plan(
        args.steps, args.batch_size, args.seed, args.record_every, not args.quiet, args.stop_after
    )
    try:
        config = Config(**{name: getattr(args, name) for name in fields})
        mesh = place.mesh(args.mesh)
        trainer = Trainer(*build(args.framework, config), config.context, plan, recipe, mesh)
        settings = {"framework": args.framework, "seed": args.seed, "batch_size": args.batch_size}
        settings |= dataclasses.asdict(config) | dataclasses.asdict(recipe)
        settings |= {"steps": args.steps}  # the schedule's
        folder = RunFolder(
            args.out,
            settings,
            args.steps,
            args.checkpoint_every,
            args.resume,
            writes=place.is_first(),
        )
    except ValueError as error:
        command.error(str(error))
    if place.is_first() and not args.quiet:
        print(trainer.registry, flush=True)
    with contextlib.closing(folder):
        result = trainer.train(folder)
    if place.is_first():
        _report(args, trainer, result, settings)
    return 1 if result.stopped else 0


def _report(
    args: argparse.Namespace, trainer: Trainer, result: Result, settings: dict[str, Any]
) -> None:
    size = count(trainer.params)
    content = {
        "program": "train, transformer",
        "parameters": size,
        "coverage": trainer.registry.coverage,
        "settings": settings,
        "mesh": dict(trainer.mesh.shape),
        "processes": jax.process_count(),
        "setup_seconds": result.setup_seconds,
        "median_step_seconds": result.median_step_seconds,
        "stopped": result.stopped,
        "curve": result.rows,
        "environment": report.environment(),
    }
    report.write_json(args.out / "metrics.json", content)
    label = recipes.LABELS[args.optimizer]
    plots.curve(args.out / "training.png", result.rows, f"{label}, {size:,} parameters")
    if result.rows:
        last = result.rows[-1]
        print(f"{label} on {size:,} parameters: held-out loss {last['held_out']:.3f} nats a byte")
        print(
            f"time      {last['seconds']:.1f} s in steps (median "
            f"{1e3 * result.median_step_seconds:.1f} ms), {result.setup_seconds:.1f} s to compile"
        )
    print(f"written   {args.out / 'metrics.json'}, {args.out / 'training.png'}")
    if result.stopped:
        print(f"train.py: {result.stopped}", file=sys.stderr)
