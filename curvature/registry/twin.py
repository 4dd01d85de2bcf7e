"""The trace of a loss with one more example: the difference in shapes shows the batch axis."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import Any

import jax

from curvature import _jax

PyTree = Any


def one_more_example(
    loss_fn: Callable[..., Any], params: PyTree, args: tuple[PyTree, ...], jaxpr: _jax.Jaxpr
) -> _jax.Jaxpr | None:
    """The jaxpr of `loss_fn` on a batch one larger; None where no such trace can be had.

    The batch is the commonest leading size of the arguments' arrays. Model state may happen to have
    that size, too: where growing every such array fails, each argument is tried alone.
    """
    for grown in _grown(args):
        try:
            twin, _ = _jax.trace(loss_fn, params, *grown)
        except Exception:  # whatever the user's function raises at shapes that do not fit
            continue
        if _jax.alike(jaxpr, twin):
            return twin
    return None


def _grown(args: tuple[PyTree, ...]) -> Iterator[tuple[PyTree, ...]]:
    leading = [leaf.shape[0] for leaf in jax.tree.leaves(args) if getattr(leaf, "ndim", 0)]
    if not leading:
        return
    size, _ = collections.Counter(leading).most_common(1)[0]

    def grow(leaf: Any) -> Any:
        if getattr(leaf, "ndim", 0) and leaf.shape[0] == size:
            return jax.ShapeDtypeStruct((size + 1, *leaf.shape[1:]), leaf.dtype)
        return leaf

    yield tuple(jax.tree.map(grow, arg) for arg in args)
    if len(args) > 1:
        for i, arg in enumerate(args):
            yield (*args[:i], jax.tree.map(grow, arg), *args[i + 1 :])
