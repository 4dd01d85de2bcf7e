"""Option types shared by the command lines: each rejects a bad value with a sentence."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from digits.data import TRAIN_IMAGES

MODULES = {"linen": "flax", "nnx": "flax", "haiku": "haiku"}
PACKAGES = {"linen": "flax", "nnx": "flax", "haiku": "dm-haiku"}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the layout of the description and of the examples."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=96)


def positive_int(text: str) -> int:
    """At least 1."""
    value = _number(text, int, "a whole number")
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(value)


def add_number(group: argparse._ActionsContainer, name: str, default: int, what: str) -> None:
    """An option that is at least 1; its help ends with its default."""
    group.add_argument(
        f"--{name}",
        type=positive_int,
        default=default,
        metavar="N",
        help=f"{what} (default: {default})",
    )


def seed(text: str) -> int:
    """At least 0, and small enough for every generator that is seeded with it."""
    value = _number(text, int, "a whole number")
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2**31 - 1")
    return int(value)


def positive_float(text: str) -> float:
    """Greater than 0 and finite."""
    value = _number(text, float, "a number")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return value


def fraction(text: str) -> float:
    """At least 0 and less than 1."""
    value = _number(text, float, "a number")
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def batch_size(text: str) -> int:
    """At most the whole training set."""
    value = positive_int(text)
    if value > TRAIN_IMAGES:
        raise argparse.ArgumentTypeError(
            f"{text} is more than the {TRAIN_IMAGES} training images (which make one full batch)"
        )
    return value


def out_folder(text: str) -> Path:
    """A folder, there or still to be made."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file, not a folder")
    return path


def check_framework(parser: argparse.ArgumentParser, framework: str) -> None:
    """Stops before any work if the framework is not installed."""
    if importlib.util.find_spec(MODULES[framework]) is None:
        package = PACKAGES[framework]
        parser.error(f"--framework {framework} needs {package}: pip install {package}")


def _number(text: str, kind: type[int] | type[float], what: str) -> float:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
