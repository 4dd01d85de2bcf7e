"""Where two pytrees differ in structure, in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
_LONGEST = 300


def difference(found: PyTree, expected: PyTree) -> str | None:
    """What differs first between the structures of two trees; None where they are the same.

    >>> from curvature.trees import difference
    >>> difference({"a": 1, "b": 2}, {"a": 1})
    "['b'] is not expected (2 leaves for 1)"
    """
    have: Any = jax.tree.structure(found)
    want: Any = jax.tree.structure(expected)
    if have == want:
        return None
    mine, others = _paths(found), _paths(expected)
    counts = f"({len(mine)} leaves for {len(others)})"
    extra = next((path for path in mine if path not in others), None)
    missing = next((path for path in others if path not in mine), None)
    if extra is not None and missing is not None:
        text = f"found {extra or 'a leaf'}, expected {missing or 'a leaf'} {counts}"
    elif extra is not None:
        text = f"{extra or 'the leaf'} is not expected {counts}"
    elif missing is not None:
        text = f"{missing or 'the leaf'} is missing {counts}"
    else:
        text = f"the containers are others: found {have}, expected {want}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def different_shape(found: PyTree, expected: PyTree) -> str | None:
    """The first leaf of another shape in two trees of one structure; None without any."""
    return _first(found, expected, "has shape", lambda leaf: list(jnp.shape(leaf)))


def different_dtype(found: PyTree, expected: PyTree) -> str | None:
    """The first leaf of another dtype in two trees of one structure; None without any."""
    return _first(found, expected, "is", jnp.result_type)


def _first(found: PyTree, expected: PyTree, verb: str, of: Callable[[Any], Any]) -> str | None:
    pairs = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, leaf), other in pairs:
        if of(leaf) != of(other):
            return f"{jax.tree_util.keystr(path)} {verb} {of(leaf)}, expected {of(other)}"
    return None


def check_real(tree: PyTree, what: str) -> None:
    """Raises where a leaf is complex or of whole numbers: results have the dtypes of the tree.

    Raises:
      TypeError: they would lose their imaginary part, or fraction.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.floating):
            continue
        hint = "convert it, x.astype(jnp.float32)"
        if jnp.issubdtype(dtype, jnp.complexfloating):
            hint = "take its real and imaginary parts one by one"
        where = jax.tree_util.keystr(path)
        raise TypeError(f"{what}{where} is of {dtype}, expected real floating point: {hint}.")


def _paths(tree: PyTree) -> dict[str, None]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return dict.fromkeys(jax.tree_util.keystr(path) for path, _ in leaves)
