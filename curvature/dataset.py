"""Datasets: iterables of batches, each a tuple of a function's arguments after the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def shares(
    batches: Iterable[Any],
    weights: Sequence[float] | None,
    averaged: bool,
    count_of: Callable[[tuple[PyTree, ...]], float | None] | None = None,
) -> Iterator[tuple[int, tuple[PyTree, ...], float]]:
    """Every batch's index, arguments and coefficient, up to normalisation.

    Args:
      batches: the data.
      weights: the coefficients; None for the sizes of the batches, or ones.
      averaged: whether they are the sizes.
      count_of: how many examples there are in arguments whose arrays have different leading axes,
        None where it cannot be told.
    """
    known = None if weights is None else [float(w) for w in weights]
    count, shapes = 0, None
    for i, batch in enumerate(batches):
        args, count = arguments(batch), i + 1
        if known is not None:
            yield i, args, known[i] if i < len(known) else 0.0
        elif averaged:
            shapes = _shapes(args) if shapes is None else shapes
            several = len({shape[0] for shape in _shapes(args) if shape}) > 1
            size = count_of(args) if several and count_of is not None else None
            yield i, args, _examples(_shapes(args), shapes) if size is None else size
        else:
            yield i, args, 1.0
    if known is not None and count != len(known):
        raise ValueError(f"There are {count} batches and {len(known)} weights, expected as many.")


def arguments(batch: Any) -> tuple[PyTree, ...]:
    """The arguments a batch stands for: a plain tuple is several, anything else is one."""
    return batch if type(batch) is tuple else (batch,)


def _shapes(args: tuple[PyTree, ...]) -> list[tuple[int, ...]]:
    return [jnp.shape(leaf) for leaf in jax.tree.leaves(args)]


def _examples(shapes: list[tuple[int, ...]], first: list[tuple[int, ...]]) -> float:
    """The number of examples in a batch of these shapes; `first` are the first batch's."""
    sizes = {shape[0]: None for shape in shapes if shape}
    if len(sizes) > 1 and shapes != first:
        raise ValueError(
            "The batches have different sizes, and the arrays of one of them different leading "
            f"axes, {list(sizes)}: how many examples are that? Pass weights=, one for each batch."
        )
    return float(next(iter(sizes), 1))


def first_batch(batches: Iterable[Any]) -> tuple[PyTree, ...]:
    """The first batch's arguments.

    Raises:
      TypeError: `batches` is no iterable of batches, or one that can be iterated only once.
      ValueError: it is empty.
    """
    name = type(batches).__name__
    if isinstance(batches, (dict, str, np.ndarray, jax.Array)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches is of type {name}, expected an iterable of batches, each a tuple of the "
            "function's arguments after params. Put a single batch into a list: [(x, y)]."
        )
    if iter(batches) is batches:
        raise TypeError(
            f"batches is a {name}, which can be iterated only once, but the data is gone "
            "through several times: pass a list, or an object whose __iter__ starts anew."
        )
    for batch in batches:
        return arguments(batch)
    raise ValueError("batches is empty: there is no data to take the curvature of.")
