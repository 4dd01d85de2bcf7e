"""Compares true Fisher, empirical Fisher and Gauss-Newton matrix of a model, layer by layer.

The model is a function of your own, a checkpoint of train.py, or a built-in example. Prints what
was found, and writes a report (comparison.html), a plot (comparison.png) and every number
(comparison.json). How to read them is in docs/compare.md.
"""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
import traceback
from collections.abc import Sequence
from pathlib import Path

import jax

import curvature
from comparing import examples, kinds, source
from curvature.comparison.compare import STRUCTURED
from curvature.comparison.structured import NAMES
from curvature.report.words import summary
from digits import options, plots

EPILOG = f"""\
a function of your own takes no arguments and returns (loss_fn, params, batches), or with has_aux as
a fourth where loss_fn returns (loss, aux):
  def model():
      def loss_fn(params, x, y):  # a loss of curvature.losses, as for curvature.register
          logits = jnp.tanh(x @ params["w1"]) @ params["w2"]
          losses = curvature.losses.softmax_cross_entropy_with_integer_labels(logits, y)
          return losses.mean()
      return loss_fn, params, [(x, y)]  # batches: tuples of loss_fn's other arguments

built-in examples:
  {", ".join(examples.EXAMPLES[:4])},
  {", ".join(examples.EXAMPLES[4:])}

examples:
  python scripts/compare.py --example digits_deep --train-steps 300
  python scripts/compare.py my_project.nets:model --batches 10 --kinds fisher:4 empirical
  python scripts/compare.py my_file.py:model --blocks 'encoder/*' --damping 0.01
  python scripts/train.py --checkpoint-every 100 --out runs/digits
  python scripts/compare.py --checkpoint runs/digits --out runs/digits/compared
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="compare.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=options.HelpFormatter,
        allow_abbrev=False,
    )
    _add_model(result.add_argument_group("model (one of these)"))
    _add_data(result.add_argument_group("training and data"))
    _add_comparison(result.add_argument_group("comparison"))
    _add_output(result.add_argument_group("output"))
    return result


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "function",
        nargs="?",
        metavar="MODULE:FUNCTION",
        help="or FILE.py:FUNCTION: what it has to return is below",
    )
    group.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FOLDER",
        help="of train.py --checkpoint-every N; the last checkpoint is taken",
    )
    group.add_argument(
        "--example", choices=examples.EXAMPLES, metavar="NAME", help="see below for the names"
    )


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--train-steps",
        type=options.positive_int,
        metavar="N",
        help="steps of Adam before an --example is compared (default: none)",
    )
    group.add_argument(
        "--batches",
        type=options.positive_int,
        metavar="N",
        help="compare on the first N batches (default: all)",
    )
    group.add_argument(
        "--seed",
        type=options.seed,
        default=0,
        metavar="N",
        help="of sampled targets, of projections, of an --example's start (default: 0)",
    )


def _add_comparison(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--kinds",
        nargs="+",
        type=kinds.kind,
        metavar="KIND",
        help="fisher, empirical, gauss-newton; fisher:4 and gauss-newton:4 are estimates from 4 "
        "samples; the first is the reference (default: all that differ, exact up to 32 outputs)",
    )
    group.add_argument(
        "--blocks",
        nargs="+",
        metavar="PATTERN",
        help="only layers whose names match a glob (default: all, and the whole network)",
    )
    group.add_argument(
        "--damping",
        type=options.positive_float,
        default=1e-3,
        metavar="X",
        help="of natural-gradient steps (default: 0.001)",
    )
    group.add_argument(
        "--limit",
        type=_limit,
        default=1000,
        metavar="N",
        help="largest matrix that is made; larger blocks are projected to so many random "
        "directions or half as many, and figures have errors (default: 1000)",
    )
    group.add_argument(
        "--no-directions", action="store_true", help="leave out natural-gradient steps"
    )
    group.add_argument(
        "--approximations",
        nargs="*",
        choices=NAMES,
        default=STRUCTURED,
        metavar="NAME",
        help=f"to set beside the exact blocks: some of {', '.join(NAMES)}, or nothing for none "
        f"(default: {', '.join(STRUCTURED)})",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--out",
        type=options.out_folder,
        default=Path("runs/compare"),
        metavar="FOLDER",
        help="default: runs/compare",
    )
    group.add_argument("--quiet", action="store_true", help="no progress bars")


def _limit(text: str) -> int:
    value = options.positive_int(text)
    if value < 10:
        raise argparse.ArgumentTypeError(f"{text} is not at least 10")
    return value


def check(command: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stops on options that contradict each other."""
    given = [name for name in (args.function, args.checkpoint, args.example) if name is not None]
    if len(given) != 1:
        found = "nothing" if not given else " and ".join(map(str, given))
        command.error(
            f"expected one model, found {found}: give MODULE:FUNCTION, --checkpoint FOLDER or "
            "--example NAME"
        )
    if args.train_steps and args.example is None:
        command.error("--train-steps needs --example: other models come as they are")
    if args.kinds is not None and len(set(args.kinds)) < max(2, len(args.kinds)):
        command.error("--kinds needs two kinds or more that differ, such as: fisher empirical")


def load(args: argparse.Namespace) -> source.Source:
    """The model and data that the options name."""
    if args.function is not None:
        return source.from_function(args.function)
    if args.checkpoint is not None:
        return examples.checkpoint(args.checkpoint)
    return examples.example(args.example, args.train_steps or 0, args.seed, not args.quiet)


def run(args: argparse.Namespace) -> curvature.Comparison:
    """Compares what the options say."""
    found = load(args)
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(found.params))
    print(f"{found.title}\n{size:,} parameters", flush=True)
    if warning := kinds.warning(args.kinds or (), found.registry):
        print(f"compare.py: {warning}", file=sys.stderr, flush=True)
    batches = source.First(found.batches, args.batches) if args.batches else found.batches
    return curvature.compare(
        found.registry,
        found.params,
        batches,
        key=jax.random.key(args.seed),
        kinds=args.kinds,
        blocks=args.blocks,
        directions=not args.no_directions,
        approximations=tuple(args.approximations),
        damping=args.damping,
        limit=args.limit,
        progress=not args.quiet,
    )


def write(found: curvature.Comparison, out: Path) -> list[Path]:
    """Writes the three files; no plot where nothing could be set side by side."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"comparison.{ending}" for ending in ("html", "json", "png")]
    found.save_html(paths[0])
    found.to_json(paths[1])
    if not any(block.pairs for block in found.blocks):
        return paths[:2]
    plots.save(found.plot(), paths[2])
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit status is 1 if nothing could be compared."""
    command = parser()
    args = command.parse_args(argv)
    check(command, args)
    try:
        found = run(args)
    except source.SourceError as error:
        command.exit(2, f"compare.py: error: {error}\n")
    except (TypeError, ValueError) as error:
        if not _ours(error):
            raise  # of the user's code: the traceback is what helps
        command.exit(2, f"compare.py: error: {error}\n")
    paths = write(found, args.out)
    print("\n" + "\n\n".join(map(_wrapped, summary(found))))
    print(f"\n{found.table()}\n\nwritten   {', '.join(map(str, paths))}")
    return 0 if len(paths) == 3 else 1


def _wrapped(paragraph: str) -> str:
    """In lines, of which none ends between a number and its error."""
    return textwrap.fill(paragraph.replace(" ± ", "\u00a0±\u00a0"), 100).replace("\u00a0", " ")


def _ours(error: BaseException) -> bool:
    """Whether the library refused something, in a sentence that needs no traceback."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(curvature.__file__).parent in Path(last.filename).parents


if __name__ == "__main__":
    sys.exit(main())
