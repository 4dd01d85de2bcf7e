"""Command lines: tyro fills a dataclass of settings, whose types reject a bad value in a sentence.

The comment beside or above a field is its help, and a `ValueError` of `__post_init__` ends the
program with exit status 2, as every wrong command line does.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, NoReturn, TypeVar, get_args

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from digits.data import TRAIN_IMAGES

MODULES = {"linen": "flax", "nnx": "flax", "haiku": "haiku"}
PACKAGES = {"linen": "flax", "nnx": "flax", "haiku": "dm-haiku"}
RULES = ConstructorRegistry()
T = TypeVar("T")


def read(settings: type[T], argv: Sequence[str] | None, about: str, prog: str = "") -> T:
    """The settings that a command line gives."""
    return tyro.cli(
        settings,
        prog=prog or Path(sys.argv[0]).name,
        description=about,
        args=argv,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
        registry=RULES,
    )


def stop(why: object) -> NoReturn:
    """Ends the program as a wrong command line does, where what is wrong is found out later."""
    print(f"{Path(sys.argv[0]).name}: error: {why}", file=sys.stderr)
    sys.exit(2)


@RULES.primitive_rule
def _optional(found: PrimitiveTypeInfo) -> Any:
    """`X | None` is read as X is, so that what is said of a wrong value is not about unions."""
    inner = [kind for kind in get_args(found.type) if kind is not NoneType]
    if NoneType not in get_args(found.type) or len(inner) > 1:
        return None
    spec = RULES.get_primitive_spec(PrimitiveTypeInfo.make(inner[0], found.markers))
    return dataclasses.replace(spec, str_from_instance=lambda _: ["none"])


@RULES.primitive_rule
def _several(found: PrimitiveTypeInfo) -> Any:
    """A tuple has at least one value, and what is said of a wrong one is what its type says."""
    if found.type_origin is not tuple:
        return None
    one = RULES.get_primitive_spec(PrimitiveTypeInfo.make(get_args(found.type)[0], found.markers))

    def read(words: list[str]) -> tuple[Any, ...]:
        if not words:
            raise ValueError("expected at least one value")
        return tuple(one.instance_from_str([word]) for word in words)

    return dataclasses.replace(
        one,
        nargs="*",
        metavar=f"{one.metavar} [...]",
        instance_from_str=read,
        str_from_instance=list,
    )


def word(read: Callable[[str], Any], metavar: str) -> PrimitiveConstructorSpec[Any]:
    """What is read from one word; `read` raises a `ValueError` about a wrong one."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )


def _number(
    kind: type[int] | type[float], fits: Callable[[Any], bool], must: str
) -> PrimitiveConstructorSpec[Any]:
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise ValueError(f"{text!r} is not {what}") from None
        if not fits(value):
            raise ValueError(f"{text} is not {must}")
        return value

    return word(read, "N" if kind is int else "X")


def _folder(text: str) -> Path:
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{text} is a file, not a folder")
    return path


PositiveInt = Annotated[int, _number(int, lambda n: n >= 1, "at least 1")]
Seed = Annotated[int, _number(int, lambda n: 0 <= n < 2**31, "between 0 and 2**31 - 1")]
_IMAGES = f"between 1 and {TRAIN_IMAGES}, all training images (which make one full batch)"
BatchSize = Annotated[int, _number(int, lambda n: 1 <= n <= TRAIN_IMAGES, _IMAGES)]
PositiveFloat = Annotated[
    float, _number(float, lambda x: 0 < x < math.inf, "a finite number above 0")
]
Share = Annotated[float, _number(float, lambda x: 0 < x <= 1, "above 0 and at most 1")]
Fraction = Annotated[float, _number(float, lambda x: 0 <= x < 1, "in [0, 1)")]
OutFolder = Annotated[Path, word(_folder, "FOLDER")]
"""There, or still to be made."""


def check_framework(framework: str) -> None:
    """Stops before any work if the framework is not installed."""
    if importlib.util.find_spec(MODULES[framework]) is None:
        package = PACKAGES[framework]
        raise ValueError(f"--framework {framework} needs {package}: pip install {package}")
