"""A model with its data, as `curvature.compare` takes it, and `module:function`s that give one."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import curvature
from curvature.dataset import first_batch

PyTree = Any
FORM = "(loss_fn, params, batches), or (loss_fn, params, batches, has_aux)"


class SourceError(Exception):
    """What was found, what was expected, and what to do."""


class Source(NamedTuple):
    """A model and its data; `title` is for people."""

    title: str
    registry: curvature.Registry
    params: PyTree
    batches: Iterable[Any]


class First:
    """The first batches of an iterable, again and again."""

    def __init__(self, batches: Iterable[Any], count: int) -> None:
        self._batches, self._count = batches, count

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self._batches, self._count)


def from_function(name: str) -> Source:
    """Calls `module:function` or `file.py:function`.

    Errors from inside the module or the function are left as they are: their traceback says where.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise SourceError(
            f"{name!r} is not of the form module:function or file.py:function. For a folder of "
            "train.py use --checkpoint, for a built-in example --example."
        )
    module = _file(Path(place)) if place.endswith(".py") else _module(place)
    found = _function(module, place, attribute)()
    loss_fn, params, batches, has_aux = _checked(name, found)
    try:
        args = first_batch(batches)
    except (TypeError, ValueError) as error:
        raise SourceError(f"What {name} returns cannot be used: {error}") from error
    registry = curvature.register(loss_fn, params, *args, has_aux=has_aux)
    return Source(name, registry, params, batches)


def _module(name: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:  # as for `python -m`
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # something that the module itself imports
        raise SourceError(
            f"There is no module {error.name!r}: looked in the current folder and on the Python "
            f"path. Run from the folder that holds it, or give its file: path/to/{name}.py:function"
        ) from error


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise SourceError(f"There is no file {path}: expected a Python file with the function.")
    folder = str(path.parent.absolute())
    if folder not in sys.path:  # for what lies beside it, as for `python file.py`
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _function(module: ModuleType, place: str, attribute: str) -> Callable[[], Any]:
    found = getattr(module, attribute, None)
    if callable(found):
        return found
    own = [
        name
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
    ]
    what = "has no" if found is None else f"has a {type(found).__name__}, not a function, as"
    raise SourceError(
        f"{place} {what} {attribute!r}. Functions there: {', '.join(own) or 'none'}. Expected one "
        f"that takes no arguments and returns {FORM}."
    )


def _checked(name: str, found: Any) -> tuple[Callable[..., Any], PyTree, Any, bool]:
    """The parts of what a function returned."""

    def wrong(what: str) -> SourceError:
        return SourceError(f"{name} returned {what}, expected {FORM}.")

    if type(found) not in (tuple, list):
        raise wrong(f"a {type(found).__name__}")
    if len(found) not in (3, 4):
        raise wrong(f"{len(found)} things ({', '.join(type(x).__name__ for x in found)})")
    loss_fn, params, batches = found[:3]
    if not callable(loss_fn):
        raise wrong(f"a {type(loss_fn).__name__} as loss_fn, which cannot be called")
    if len(found) == 4 and not isinstance(found[3], bool):
        raise wrong(f"a {type(found[3]).__name__} as has_aux, which is True or False")
    return loss_fn, params, batches, bool(found[3:] and found[3])
