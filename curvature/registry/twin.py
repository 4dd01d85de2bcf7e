"""The trace of a loss with more examples: the difference in shapes shows the batch axis."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import Any

import jax

from curvature import _jax
from curvature.losses import TAG

PyTree = Any


def more_examples(
    loss_fn: Callable[..., Any], params: PyTree, args: tuple[PyTree, ...], jaxpr: _jax.Jaxpr
) -> tuple[_jax.Jaxpr | None, int]:
    """The jaxpr of `loss_fn` on a larger batch, and how many examples more it has.

    The batch is a leading size of the arguments' arrays, the commonest that makes the network's
    output grow. Model state may happen to have that size, too: where growing every such array
    fails, growing fewer arguments is tried. One more example is tried first, then twice as many,
    which devices or micro-batches divide. None where no such trace can be had.
    """
    outputs = _outputs(jaxpr)
    for doubled in (False, True):
        for grown, growth in _grown(args, doubled):
            try:
                twin, _ = _jax.trace(loss_fn, params, *grown)
            except Exception:  # whatever the user's function raises at shapes that do not fit
                continue
            same = _jax.alike(jaxpr, twin, lengths=doubled)
            if same and _outputs(twin) != outputs:
                return twin, growth
    return None, 1


def _outputs(jaxpr: _jax.Jaxpr) -> list[tuple[int, ...]]:
    """The shapes of the predictions at the tagged losses."""
    shapes = []
    for equation in jaxpr.equations:
        if equation.primitive.name == TAG:
            shapes.append(tuple(equation.invars[0].aval.shape))
        for inner in _jax.nested(equation):
            shapes.extend(_outputs(inner))
    return shapes


def _grown(args: tuple[PyTree, ...], doubled: bool) -> Iterator[tuple[tuple[PyTree, ...], int]]:
    """Larger arguments, each with how much larger."""
    leading = [leaf.shape[0] for leaf in jax.tree.leaves(args) if getattr(leaf, "ndim", 0)]
    sizes = [size for size, _ in collections.Counter(leading).most_common(3)]
    for size in sorted(sizes, key=lambda n: n == 1):  # one example is the last thing to believe
        growth = max(size, 1) if doubled else 1

        def grow(leaf: Any, size: int = size, growth: int = growth) -> Any:
            if getattr(leaf, "ndim", 0) and leaf.shape[0] == size:
                return jax.ShapeDtypeStruct((size + growth, *leaf.shape[1:]), leaf.dtype)
            return leaf

        grown = [jax.tree.map(grow, arg) for arg in args]
        yield tuple(grown), growth
        if len(args) > 1:
            for i in range(len(args)):
                yield (*grown[:i], args[i], *grown[i + 1 :]), growth
            for i in range(len(args)):
                yield (*args[:i], grown[i], *args[i + 1 :]), growth
