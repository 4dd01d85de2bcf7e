"""Compares true Fisher, empirical Fisher and Gauss-Newton matrix of a model, layer by layer.

The model is a function of your own, a checkpoint of train.py, or a built-in example. Prints what
was found, and writes a report (comparison.html), a plot (comparison.png) and every number
(comparison.json). How to read them is in docs/compare.md.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import textwrap
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
from tyro import conf

import curvature
from comparing import examples, kinds, source
from curvature.comparison.compare import STRUCTURED
from curvature.comparison.structured import NAMES
from curvature.report.words import summary
from digits import options, plots

ABOUT = f"""{__doc__}
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
Kind = Annotated[Any, options.word(kinds.kind, "KIND")]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The command line."""

    # or FILE.py:FUNCTION: what it has to return is above
    function: conf.Positional[Annotated[str, options.word(str, "MODULE:FUNCTION")] | None] = None
    # of train.py --checkpoint-every N; the last checkpoint is taken
    checkpoint: Path | None = None
    example: Literal[*examples.EXAMPLES] | None = None  # a built-in model
    # steps of Adam before an --example is compared
    train_steps: options.PositiveInt | None = None
    batches: options.PositiveInt | None = None  # compare on the first N; all unless given
    seed: options.Seed = 0  # of sampled targets, of projections, of an --example's start
    # fisher, empirical, gauss-newton; fisher:4 and gauss-newton:4 are estimates from 4 samples; the
    # first is the reference; unless given all that differ, exact up to 32 outputs
    kinds: tuple[Kind, ...] | None = None
    # only layers whose names match a glob; unless given all, and the whole network
    blocks: tuple[str, ...] | None = None
    damping: options.PositiveFloat = 1e-3  # of natural-gradient steps
    # largest matrix that is made, at least 10; larger blocks are projected to so many random
    # directions or half as many, and figures have errors
    limit: options.PositiveInt = 1000
    no_directions: bool = False  # leave out natural-gradient steps
    # to set beside the exact blocks; nothing for none
    approximations: Sequence[Literal[*NAMES]] = STRUCTURED
    out: options.OutFolder = Path("runs/compare")  # for the three files
    quiet: bool = False  # no progress bars

    def __post_init__(self) -> None:
        given = [x for x in (self.function, self.checkpoint, self.example) if x is not None]
        if len(given) != 1:
            found = "nothing" if not given else " and ".join(map(str, given))
            raise ValueError(
                f"expected one model, found {found}: give MODULE:FUNCTION, --checkpoint FOLDER or "
                "--example NAME"
            )
        if self.train_steps and self.example is None:
            raise ValueError("--train-steps needs --example: other models come as they are")
        if self.kinds is not None and len(set(self.kinds)) < max(2, len(self.kinds)):
            raise ValueError("--kinds needs two kinds or more that differ: fisher empirical")
        if self.limit < 10:
            raise ValueError(f"--limit {self.limit} is not at least 10")


def load(args: Settings) -> source.Source:
    """The model and data that the options name."""
    if args.function is not None:
        return source.from_function(args.function)
    if args.checkpoint is not None:
        return examples.checkpoint(args.checkpoint)
    return examples.example(args.example, args.train_steps or 0, args.seed, not args.quiet)


def run(args: Settings) -> curvature.Comparison:
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
    args = options.read(Settings, argv, ABOUT)
    try:
        found = run(args)
    except source.SourceError as error:
        options.stop(error)
    except (TypeError, ValueError) as error:
        if not _ours(error):
            raise  # of the user's code: the traceback is what helps
        options.stop(error)
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
