"""The trace of a loss with more examples: the difference in shapes shows the batch axis."""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax

from curvature import _jax
from curvature.losses import TAG
from curvature.trace.layouts import Batch, Examples

PyTree = Any
Outputs = list[tuple[int, ...]]
_MOST_BATCHES = 4
_MOST_SIZES = 4  # that are tried along an axis: each takes some traces


def more_examples(
    loss_fn: Callable[..., Any],
    params: PyTree,
    args: tuple[PyTree, ...],
    jaxpr: _jax.Jaxpr,
    known: Sequence[Batch | None] = (),
    larger: int | None = None,
) -> tuple[_jax.Jaxpr | None, tuple[Examples, ...]]:
    """The jaxpr of `loss_fn` on larger batches, and how many examples they have.

    The batch is a size of the arguments' arrays along one axis, the commonest that makes the
    network's output grow. Model state may happen to have that size, too: where growing every such
    array fails, growing fewer arguments is tried. None where no such trace can be had. Where the
    outputs at some tagged losses do not grow with it, they may have a batch of their own.

    One more example is tried before twice as many (which devices or micro-batches divide), and what
    leaves loops as long as they were before what does not: a longer loop means that the axis was
    time, unless examples are looped over. Axes other than the leading one are tried where the
    leading one can grow, but is not the batch; where it cannot, the batch size may be fixed in the
    function, and another axis that can grow would be mistaken for it.

    What was found before (`known`, as `batch_axes` returns it) is tried first: a search may trace
    the function ten times. So is a `larger` number of examples, for which it may be traced already.
    """
    outputs = _outputs(jaxpr)
    rows = {shape[0] for shape in outputs if shape}

    def traced(grown: tuple[PyTree, ...]) -> _jax.Jaxpr | None:
        try:
            twin, _ = _jax.trace(loss_fn, params, *grown)
        except Exception:  # whatever the user's function raises at shapes that do not fit
            return None
        return twin if _jax.alike(jaxpr, twin) and _outputs(twin) != outputs else None

    for grown, batches in _as_known(args, known, larger):
        twin = traced(grown)
        if twin is not None:
            return twin, batches
    longer, leading_grows = None, False
    tried = {_signature(args)}
    ndim = max((getattr(leaf, "ndim", 0) for leaf in jax.tree.leaves(args)), default=0)
    others = [(axis, False) for axis in range(1, ndim)]
    for axis, doubled in [(0, False), (0, True), *others, (None, False)]:
        if axis and not leading_grows:
            continue
        for grown, batch in _grown(args, axis, doubled, rows):
            signature = _signature(grown)
            if signature in tried:
                continue
            tried.add(signature)
            try:
                twin, _ = _jax.trace(loss_fn, params, *grown)
            except Exception:
                continue
            leading_grows |= axis == 0
            if not _jax.alike(jaxpr, twin) or _outputs(twin) == outputs:
                continue
            if _jax.alike(jaxpr, twin, lengths=True):
                return _more_batches(traced, args, grown, twin, (batch,), outputs)
            if axis is not None:
                longer = longer or (twin, (batch,))
    return longer or (None, (Examples(1),))


def _more_batches(
    traced: Callable[[tuple[PyTree, ...]], _jax.Jaxpr | None],
    args: tuple[PyTree, ...],
    grown: tuple[PyTree, ...],
    twin: _jax.Jaxpr,
    batches: tuple[Examples, ...],
    outputs: Outputs,
) -> tuple[_jax.Jaxpr, tuple[Examples, ...]]:
    """The same with more examples in the batches of losses whose outputs have not grown yet."""
    for _ in range(_MOST_BATCHES - 1):
        left = sum(a == b for a, b in zip(outputs, _outputs(twin), strict=True))
        found = None
        for larger, batch in _grown_more(args, grown, batches) if left else ():
            other = traced(larger)
            if other is None or not _jax.alike(twin, other, lengths=True):
                continue
            if sum(a == b for a, b in zip(outputs, _outputs(other), strict=True)) < left:
                found = larger, other, (*batches, batch)
                break
        if found is None:
            break
        grown, twin, batches = found
    return twin, batches


def _grown_more(
    args: tuple[PyTree, ...], grown: tuple[PyTree, ...], batches: tuple[Examples, ...]
) -> Iterator[tuple[tuple[PyTree, ...], Examples]]:
    """Arguments in which arrays of another leading size are larger as well."""
    leaves, structure = jax.tree.flatten(args)
    larger = jax.tree.leaves(grown)
    free = [
        x.shape == y.shape and getattr(x, "ndim", 0) > 0 and not _is_key(x)
        for x, y in zip(leaves, larger, strict=True)
    ]
    sizes = collections.Counter(x.shape[0] for x, on in zip(leaves, free, strict=True) if on)
    for size, _ in sizes.most_common(5):
        for more in (1, size * (len(batches) + 1)):  # no two batches grow in the same ratio
            batch = Examples(size, more)
            if size == 0 or any(b.more * size == more * b.number for b in batches):
                continue
            chosen = [on and x.shape[0] == size for x, on in zip(leaves, free, strict=True)]
            try:
                new = [
                    _jax.resized(x, (size + more, *x.shape[1:])) if on else y
                    for x, y, on in zip(leaves, larger, chosen, strict=True)
                ]
            except ValueError:  # that many examples do not divide over the mesh
                continue
            yield jax.tree.unflatten(structure, new), batch


def numbers_of_examples(args: PyTree, known: Sequence[Batch | None]) -> list[int | None]:
    """For each argument, how many examples it has along its known axis; None where it has none."""
    if not any(known):
        return []
    pairs = zip(jax.tree.leaves(args), known, strict=True)
    return [None if b is None else x.shape[b.axis] // b.each for x, b in pairs]


def _as_known(
    args: tuple[PyTree, ...], known: Sequence[Batch | None], larger: int | None
) -> Iterator[tuple[tuple[PyTree, ...], tuple[Examples, ...]]]:
    """Arguments larger along known axes: as asked, by one example, and by as many as there are."""
    leaves, structure = jax.tree.flatten(args)
    numbers = numbers_of_examples(args, known)
    sizes = list(dict.fromkeys(n for n in numbers if n))
    growths = [[1] * len(sizes), [n * (k + 1) for k, n in enumerate(sizes)]]
    if larger is not None and len(sizes) == 1:
        growths.insert(0, [larger - sizes[0]])
    for growth in growths if sizes else ():
        batches = tuple(Examples(n, more) for n, more in zip(sizes, growth, strict=True))
        more_of = dict(zip(sizes, growth, strict=True))
        try:
            grown = [
                x if b is None else _resized(x, b, more_of[n] if n else 0)
                for x, b, n in zip(leaves, known, numbers, strict=True)
            ]
        except ValueError:  # that many examples do not divide over the mesh
            continue
        yield jax.tree.unflatten(structure, grown), batches


def _resized(leaf: Any, batch: Batch, more: int) -> Any:
    shape = list(leaf.shape)
    shape[batch.axis] += more * batch.each
    return _jax.resized(leaf, shape)


def _outputs(jaxpr: _jax.Jaxpr) -> Outputs:
    """The shapes of the predictions at the tagged losses."""
    shapes: Outputs = []
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
    given: Sequence[Any], twin: _jax.Jaxpr | None, batches: tuple[Examples, ...]
) -> tuple[Batch | None, ...]:
    """The axis of examples of every argument but the parameters, None where it has none.

    Args:
      given: the jaxpr's variables for them.
      twin: the jaxpr with more examples; where there is none, a leading axis of the batch's size
        is one of examples.
      batches: how many there are, and how many more the twin has.
    """
    shapes = [tuple(v.aval.shape) for v in given]
    if twin is None:
        number = batches[0].number
        return tuple(Batch(0) if shape[:1] == (number,) else None for shape in shapes)
    found: list[Batch | None] = []
    for shape, other in zip(shapes, twin.invars[len(twin.invars) - len(given) :], strict=True):
        pairs = enumerate(zip(shape, other.aval.shape, strict=True))
        each = [(a, batch.along(n, more)) for a, (n, more) in pairs for batch in batches]
        found.append(next((Batch(a, entries) for a, entries in each if entries), None))
    return tuple(found)


def _is_key(x: Any) -> bool:
    """Whether an array is a raw random key, whose two numbers are no examples."""
    return getattr(x, "shape", None) == (2,) and x.dtype == "uint32"


def _signature(args: tuple[PyTree, ...]) -> tuple[Any, ...]:
    return tuple(getattr(leaf, "shape", ()) for leaf in jax.tree.leaves(args))


def _grown(
    args: tuple[PyTree, ...], axis: int | None, doubled: bool, rows: Collection[int]
) -> Iterator[tuple[tuple[PyTree, ...], Examples]]:
    """Arguments larger along an axis (None: every one of that size), and the batch's size.

    Sizes that predictions have as `rows` come first, then the commonest, which may be that of model
    state. One example is the last thing to believe.
    """
    arrays = [leaf for leaf in jax.tree.leaves(args) if getattr(leaf, "ndim", 0) > (axis or 0)]
    counted = collections.Counter(x.shape[axis or 0] for x in arrays)
    common = [size for size, _ in counted.most_common()]
    for size in sorted(common, key=lambda n: (n == 1, n not in rows))[:_MOST_SIZES]:
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
        yield tuple(grown), Examples(size, growth)
        if len(args) > 1:
            for i in range(len(args)):
                yield (*grown[:i], args[i], *grown[i + 1 :]), Examples(size, growth)
            for i in range(len(args)):
                yield (*args[:i], grown[i], *args[i + 1 :]), Examples(size, growth)
