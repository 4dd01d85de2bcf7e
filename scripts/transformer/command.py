"""Trains a decoder-only transformer on bytes of Python sources, with curvature or without.

Rotary positions, grouped-query attention, gated layers, a tied embedding; blocks in a loop that is
traced once. From 0.1 M to over 100 M parameters, on one device, a mesh, or several processes, by
flags alone. Writes metrics.json and training.png, and while it trains metrics.jsonl, TensorBoard
events and checkpoints.

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

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax

from digits import options, report
from digits.folder import RunFolder
from transformer import place, plots, recipes
from transformer.config import DTYPES, Config
from transformer.run import Plan, Result, Trainer, count

MODELS = ("linen", "nnx")


def _mesh(text: str) -> dict[str, int]:
    sizes = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in place.AXES or name in sizes:
            raise ValueError(f"{name!r} is not one of {', '.join(place.AXES)}")
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"{part} has no number of devices, such as {name}=2")
        sizes[name] = int(size)
    return sizes


@dataclasses.dataclass(frozen=True)
class Devices:
    """On one process, unless there is a coordinator."""

    # data, fsdp and model, whose product is the number of devices; all data unless given
    mesh: Annotated[dict[str, int], options.word(_mesh, "AXIS=N,...")] | None = None
    coordinator: str | None = None  # HOST:PORT of several processes
    processes: options.PositiveInt | None = None  # how many
    process: int | None = None  # which of them this is, from 0


@dataclasses.dataclass(frozen=True)
class Settings:
    """The command line."""

    model: Literal["transformer"] = "transformer"  # other models have options of their own
    framework: Literal[*MODELS] = "linen"  # what the model is written in
    layers: options.PositiveInt = 2  # blocks
    width: options.PositiveInt = 64  # of the residual stream
    heads: options.PositiveInt = 4  # of queries
    kv_heads: options.PositiveInt = 2  # of keys and values
    context: options.PositiveInt = 48  # positions of a window
    dtype: Literal[*DTYPES] = "float32"  # of the computation
    no_remat: bool = False  # keep activations for the backward pass, not computing them again
    optimizer: Literal[*recipes.OPTIMIZERS] = "eigen_adam"  # with warm-up and cosine decay
    steps: options.PositiveInt = 600  # of training
    batch_size: options.PositiveInt = 16  # windows, over all devices
    statistics_every: options.PositiveInt | None = None  # steps between statistics; 5 unless given
    # the share of a batch that statistics are taken of; all of it unless given
    statistics_batch: options.Share | None = None
    # steps in which every basis is renewed once; 5 unless given
    refresh_every: options.PositiveInt | None = None
    # on a mesh: every device keeps all bases (inverses), as it does unless given, or its share
    gather: Literal["inverses", "updates"] | None = None
    # at its highest; unless given 0.01, and 0.003 for adamw, times 128 / width for wider networks
    learning_rate: options.PositiveFloat | None = None
    weight_decay: options.Fraction = 0.0  # decoupled
    seed: options.Seed = 0  # of the start and of batches
    out: options.OutFolder = Path("runs/transformer")  # for everything that is written
    record_every: options.PositiveInt = 20  # steps between measurements on what is held out
    checkpoint_every: options.PositiveInt | None = None  # steps
    # stop there, where time is limited, and go on another time with --resume
    stop_after: options.PositiveInt | None = None
    resume: bool = False  # go on from the checkpoint in --out
    quiet: bool = False  # no progress bar and no layer table
    devices: Devices = Devices()

    def __post_init__(self) -> None:
        options.check_framework(self.framework)
        for name in recipes.NOT_TAKEN[self.optimizer]:
            if getattr(self, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"--optimizer {self.optimizer} has no {flag}")


def build(framework: str, config: Config) -> Any:
    """`init` and `apply` of the network in a framework."""
    if framework == "linen":
        from transformer import linen_model

        return linen_model.build(config)
    from transformer import nnx_model

    return nnx_model.build(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit status is 1 if the training diverged."""
    args = options.read(Settings, argv, __doc__, "train.py --model transformer")
    devices = args.devices
    place.connect(devices.coordinator, devices.processes, devices.process)
    rate = args.learning_rate or recipes.default_rate(args.optimizer, args.width)
    recipe = recipes.Recipe(
        args.optimizer,
        rate,
        args.weight_decay,
        args.statistics_every or recipes.PERIOD,
        args.statistics_batch,
        args.refresh_every or recipes.PERIOD,
        args.gather or "inverses",
    )
    fields = [field.name for field in dataclasses.fields(Config) if hasattr(args, field.name)]
    plan = Plan(
        args.steps, args.batch_size, args.seed, args.record_every, not args.quiet, args.stop_after
    )
    try:
        config = Config(**{name: getattr(args, name) for name in fields}, remat=not args.no_remat)
        mesh = place.mesh(devices.mesh)
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
    except (ValueError, OSError) as error:
        options.stop(error)
    if place.is_first() and not args.quiet:
        print(trainer.registry, flush=True)
    with contextlib.closing(folder):
        result = trainer.train(folder)
    if place.is_first():
        _report(args, trainer, result, settings)
    return 1 if result.stopped else 0


def _report(args: Settings, trainer: Trainer, result: Result, settings: dict[str, Any]) -> None:
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
        took = report.steps_took(last["seconds"], result.median_step_seconds)
        print(f"time      {took}, {result.setup_seconds:.1f} s to compile")
    print(f"written   {args.out / 'metrics.json'}, {args.out / 'training.png'}")
    if result.stopped:
        print(f"train.py: {result.stopped}", file=sys.stderr)
