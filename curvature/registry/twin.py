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
) -> tuple[_jax.Jaxpr | None, int, int]:
    """The jaxpr of `loss_fn` on a larger batch, how many examples more it has, and how many it had.

    The batch is a size of the arguments' arrays along one axis, the commonest that makes the
    network's output grow. Model state may happen to have that size, too: where growing every such
    array fails, growing fewer arguments is tried. None where no such trace can be had.

    One more example is tried before twice as many (which devices or micro-batches divide), and what
    leaves loops as long as they were before what does not: a longer loop means that the axis was
    time, unless examples are looped over. Axes other than the leading one are tried where the
    leading one can grow, but is not the batch; where it cannot, the batch size may be fixed in the
    function, and another axis that can grow would be mistaken for it.
    """
    outputs = _outputs(jaxpr)
    longer, leading_grows = None, False
    ndim = max((getattr(leaf, "ndim", 0) for leaf in jax.tree.leaves(args)), default=0)
    others = [(axis, False) for axis in range(1, ndim)]
    for axis, doubled in [(0, False), (0, True), *others, (None, False)]:
        if axis and not leading_grows:
            continue
        for grown, growth, size in _grown(args, axis, doubled):
            try:
                twin, _ = _jax.trace(loss_fn, params, *grown)
            except Exception:  # whatever the user's function raises at shapes that do not fit
                continue
            leading_grows |= axis == 0
            if not _jax.alike(jaxpr, twin) or _outputs(twin) == outputs:
                continue
            if _jax.alike(jaxpr, twin, lengths=True):
                return twin, growth, size
            if axis is not None:
                longer = longer or (twin, growth, size)
    return longer or (None, 1, 1)


def _outputs(jaxpr: _jax.Jaxpr) -> list[tuple[int, ...]]:
    """The shapes of the predictions at the tagged losses."""
    shapes = []
    for equation in jaxpr.equations:
        if equation.primitive.name == TAG:
            shapes.append(tuple(equation.invars[0].aval.shape))
        for inner in _jax.nested(equation):
            shapes.extend(_outputs(inner))
    return shapes


def _grown(
    args: tuple[PyTree, ...], axis: int | None, doubled: bool
) -> Iterator[tuple[tuple[PyTree, ...], int, int]]:
    """Arguments larger along an axis (None: every one of that size), by how much, from what."""
    arrays = [leaf for leaf in jax.tree.leaves(args) if getattr(leaf, "ndim", 0) > (axis or 0)]
    sizes = [n for n, _ in collections.Counter(x.shape[axis or 0] for x in arrays).most_common(3)]
    for size in sorted(sizes, key=lambda n: n == 1):  # one example is the last thing to believe
        growth = max(size, 1) if doubled else 1

        def grow(leaf: Any, size: int = size, growth: int = growth) -> Any:
            where = range(getattr(leaf, "ndim", 0)) if axis is None else (axis,)
            shape = list(getattr(leaf, "shape", ()))
            for a in where:
                if a < len(shape) and shape[a] == size:
                    shape[a] = size + growth
            if shape == list(getattr(leaf, "shape", ())):
                return leaf
            return _jax.resized(leaf, shape)

        try:
            grown = [jax.tree.map(grow, arg) for arg in args]
        except ValueError:  # that many examples do not divide over the mesh
            continue
        yield tuple(grown), growth, size
        if len(args) > 1:
            for i in range(len(args)):
                yield (*grown[:i], args[i], *grown[i + 1 :]), growth, size
            for i in range(len(args)):
                yield (*args[:i], grown[i], *args[i + 1 :]), growth, size
