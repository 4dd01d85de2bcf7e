"""The trace of a loss with more examples: the difference in shapes shows the batch axis."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from curvature import _jax
from curvature.losses import TAG
from curvature.registry.taps import Batch

PyTree = Any


def more_examples(
    loss_fn: Callable[..., Any],
    params: PyTree,
    args: tuple[PyTree, ...],
    jaxpr: _jax.Jaxpr,
    known: Sequence[Batch | None] = (),
    larger: int | None = None,
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

    What was found before (`known`, as `batch_axes` returns it) is tried first: a search may trace
    the function ten times. So is a `larger` number of examples, for which it may be traced already.
    """
    outputs = _outputs(jaxpr)
    for grown, growth, size in _as_known(args, known, larger):
        try:
            twin, _ = _jax.trace(loss_fn, params, *grown)
        except Exception:  # one example more may not divide over devices or micro-batches
            continue
        if _jax.alike(jaxpr, twin) and _outputs(twin) != outputs:
            return twin, growth, size
    longer, leading_grows = None, False
    tried = {_signature(args)}
    ndim = max((getattr(leaf, "ndim", 0) for leaf in jax.tree.leaves(args)), default=0)
    others = [(axis, False) for axis in range(1, ndim)]
    for axis, doubled in [(0, False), (0, True), *others, (None, False)]:
        if axis and not leading_grows:
            continue
        for grown, growth, size in _grown(args, axis, doubled):
            signature = _signature(grown)
            if signature in tried:
                continue
            tried.add(signature)
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


def numbers_of_examples(args: PyTree, known: Sequence[Batch | None]) -> set[int]:
    """How many examples arguments have along known axes: one number, if it is right."""
    if not any(known):
        return set()
    pairs = zip(jax.tree.leaves(args), known, strict=True)
    return {x.shape[batch.axis] // batch.each for x, batch in pairs if batch is not None}


def _as_known(
    args: tuple[PyTree, ...], known: Sequence[Batch | None], larger: int | None
) -> Iterator[tuple[tuple[PyTree, ...], int, int]]:
    """Arguments larger along known axes: as asked, by one example, and by as many as there are."""
    leaves, structure = jax.tree.flatten(args)
    sizes = numbers_of_examples(args, known)
    if len(sizes) != 1:
        return
    (size,), pairs = sizes, list(zip(leaves, known, strict=True))

    def grown(leaf: Any, batch: Batch | None, growth: int) -> Any:
        if batch is None:
            return leaf
        shape = list(leaf.shape)
        shape[batch.axis] += growth * batch.each
        return _jax.resized(leaf, shape)

    for growth in (1, size) if larger is None else (larger - size, 1, size):
        try:
            more = [grown(*pair, growth) for pair in pairs]
            yield jax.tree.unflatten(structure, more), growth, size
        except ValueError:  # that many examples do not divide over the mesh
            continue


def _outputs(jaxpr: _jax.Jaxpr) -> list[tuple[int, ...]]:
    """The shapes of the predictions at the tagged losses."""
    shapes = []
    for equation in jaxpr.equations:
        if equation.primitive.name == TAG:
            shapes.append(tuple(equation.invars[0].aval.shape))
        for inner in _jax.nested(equation):
            shapes.extend(_outputs(inner))
    return shapes


def batch_size(jaxpr: _jax.Jaxpr, args: tuple[PyTree, ...]) -> tuple[int, bool]:
    """The batch's size where no larger batch can be traced, and whether the data is closed over.

    It is the leading size of the predictions if some data has it, too: arguments first, then what
    the loss function closes over. Predictions may be flattened: then it is a divisor.
    """
    rows = next((shape[0] for shape in _outputs(jaxpr) if shape), 1)
    given = [x for x in jax.tree.leaves(args) if not _is_key(x)]
    for parts in (False, True):
        for arrays, closed in ((given, False), (jaxpr.consts, True)):
            sizes = [int(x.shape[0]) for x in arrays if getattr(x, "ndim", 0) > 0]
            fitting = [n for n in sizes if n == rows or (parts and n > 1 and rows % n == 0)]
            if fitting:
                return collections.Counter(fitting).most_common(1)[0][0], closed
    return rows, True


def batch_axes(
    given: Sequence[Any], twin: _jax.Jaxpr | None, examples: int, growth: int
) -> tuple[Batch | None, ...]:
    """The axis of examples of every argument but the parameters, None where it has none.

    Args:
      given: the jaxpr's variables for them.
      twin: the jaxpr with `growth` examples more; where there is none, a leading axis of the
        batch's size is one of examples.
      examples: how many there are.
      growth: how many more the twin has.
    """
    shapes = [tuple(v.aval.shape) for v in given]
    if twin is None:
        return tuple(Batch(0) if shape[:1] == (examples,) else None for shape in shapes)
    found: list[Batch | None] = []
    for shape, other in zip(shapes, twin.invars[len(twin.invars) - len(given) :], strict=True):
        pairs = enumerate(zip(shape, other.aval.shape, strict=True))
        grown = [(axis, (more - n) // growth) for axis, (n, more) in pairs if more != n]
        found.append(Batch(*grown[0]) if grown else None)
    return tuple(found)


def _is_key(x: Any) -> bool:
    """Whether an array is a raw random key, whose two numbers are no examples."""
    return getattr(x, "shape", None) == (2,) and x.dtype == "uint32"


def _signature(args: tuple[PyTree, ...]) -> tuple[Any, ...]:
    return tuple(getattr(leaf, "shape", ()) for leaf in jax.tree.leaves(args))


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
