"""Parameter views: which entries of a leaf meet the data, and in which shape.

A view is a selection and permutation of the entries of one array (its *source*), written as a
chain of reshapes, transposes, slices and reversals. Casts do not matter to it. The same chain runs
on gradients (`view(leaf)`, to bring them into view space) and backwards (`view.adjoint`, to bring
them home). Views are compared as ranges (`ranges`), or else by running the chain on index arrays.

A leaf that a scan slices keeps its scanned axes in front: they are the *stack* of the view, and
inside the scan's body only the axes behind them are seen.

Leaves that are concatenated before they are used (the gates of a recurrent cell) are a source of
their own, `Joined`: each leaf is a range of it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from curvature.trace import ranges
from curvature.trace.ranges import Ranges
from curvature.trace.ranges import Shape as Shape  # re-exported


@dataclasses.dataclass(frozen=True)
class Move:
    """One step of a view: `argument` is a shape, permutation, slices, axes to reverse, indices."""

    kind: Literal["reshape", "transpose", "slice", "reverse", "take"]
    argument: tuple[Any, ...]

    def __call__(self, x: Any) -> Any:
        """Applies the step to a NumPy or JAX array."""
        if self.kind == "reshape":
            return x.reshape(self.argument)
        if self.kind == "transpose":
            return x.transpose(self.argument)
        if self.kind == "reverse":
            back, keep = slice(None, None, -1), slice(None)
            return x[tuple(back if a in self.argument else keep for a in range(x.ndim))]
        if self.kind == "take":
            return x[np.asarray(self.argument)]
        return x[tuple(slice(*s) for s in self.argument)]


@dataclasses.dataclass(frozen=True)
class View:
    """The entries of `source` that an operand holds, with shape `stack sizes + inner`.

    Attributes:
      source: what is viewed (a leaf's index, several leaves joined, or a layer's output).
      source_shape: the shape of the source.
      shape: the shape of the view, stacked axes in front.
      moves: the chain from the source to the view.
      stack: the numbers of the scans that slice the leading axes, outermost first. They are the
        same in every trace of one function: views are static parts of operators.
      scale: the constant that multiplies the entries. No part of the map: a view selects.
      curved: whether what is met is an elementwise function of the entries.
    """

    source: Any
    source_shape: Shape
    shape: Shape
    moves: tuple[Move, ...] = ()
    stack: Shape = ()
    scale: float = 1.0
    curved: bool = False

    @classmethod
    def of(cls, source: Any, shape: Shape) -> View:
        """The whole of an array as it is."""
        return cls(source, tuple(shape), tuple(shape))

    @property
    def inner(self) -> Shape:
        """The shape without the stacked axes."""
        return self.shape[len(self.stack) :]

    @property
    def stacked(self) -> Shape:
        """The sizes of the stacked axes."""
        return self.shape[: len(self.stack)]

    def _then(self, move: Move, shape: Shape) -> View:
        return dataclasses.replace(self, moves=(*self.moves, move), shape=shape)

    def reshape(self, shape: Shape) -> View:
        """Reshapes the inner axes."""
        full = (*self.stacked, *(int(s) for s in shape))
        return self if full == self.shape else self._then(Move("reshape", full), full)

    def transpose(self, permutation: Shape) -> View:
        """Permutes the inner axes."""
        depth = len(self.stack)
        full = (*range(depth), *(depth + int(p) for p in permutation))
        if full == tuple(range(len(full))):
            return self
        return self._then(Move("transpose", full), tuple(self.shape[p] for p in full))

    def slice(self, starts: Shape, stops: Shape, strides: Shape | None) -> View:
        """Slices the inner axes."""
        steps = strides or (1,) * len(starts)
        inner = tuple(
            (int(a), int(b), int(c)) for a, b, c in zip(starts, stops, steps, strict=True)
        )
        full = (*((0, n, 1) for n in self.stacked), *inner)
        shape = tuple(len(range(*s)) for s in full)
        return self if shape == self.shape else self._then(Move("slice", full), shape)

    def reverse(self, axes: Shape) -> View:
        """Reverses inner axes."""
        return self._then(
            Move("reverse", tuple(len(self.stack) + int(a) for a in axes)), self.shape
        )

    def scaled(self, factor: float) -> View:
        """The view of entries multiplied by a constant."""
        return dataclasses.replace(self, scale=self.scale * factor)

    def pushed(self, scan: int) -> View:
        """The view inside the body of a scan that slices its leading inner axis."""
        return dataclasses.replace(self, stack=(*self.stack, scan))

    def divided(self, axis: int, parts: int, stack: int) -> View:
        """The view on a device that has one of so many parts of an inner axis."""
        n = self.inner[axis]
        split = self.reshape((*self.inner[:axis], parts, n // parts, *self.inner[axis + 1 :]))
        rest = [a for a in range(len(split.inner)) if a != axis]
        return split.transpose((axis, *rest)).pushed(stack)

    def gathered(self, stack: int, axis: int, *, tiled: bool) -> View:
        """The view of what all devices have along a stacked axis, along an inner one."""
        place, depth = self.stack.index(stack), len(self.stack) - 1
        order = [a for a in range(len(self.shape)) if a != place]
        order.insert(depth + axis, place)
        shape = tuple(self.shape[a] for a in order)
        moved = self._then(Move("transpose", tuple(order)), shape)
        kept = tuple(s for s in self.stack if s != stack)
        whole = dataclasses.replace(moved, stack=kept)
        if not tiled:
            return whole
        before, (n, each, *after) = whole.inner[:axis], whole.inner[axis:]
        return whole.reshape((*before, n * each, *after))

    def __call__(self, x: Any) -> Any:
        """The view of an array of the source's shape."""
        for move in self.moves:
            x = move(x)
        return x

    def adjoint(self, x: jax.Array) -> jax.Array:
        """The transposed map: an array of the source's shape, zero where the view does not look."""
        if not self.moves:
            return x
        source = jax.ShapeDtypeStruct(self.source_shape, x.dtype)
        (out,) = jax.linear_transpose(self.__call__, source)(x)
        return jnp.asarray(out)

    def leaves(self) -> Iterator[View]:
        """The views of leaves that this view is made of: itself, or what its source joins."""
        if not isinstance(self.source, Joined):
            yield self
            return
        for part in self.source.parts:
            yield from part.leaves()

    def read(self, leaves: Sequence[jax.Array] | Mapping[int, jax.Array], dtype: Any) -> jax.Array:
        """The view of the leaves of a tree, in another dtype."""
        if not isinstance(self.source, Joined):
            return self(leaves[self.source].astype(dtype))
        parts = [part.read(leaves, dtype) for part in self.source.parts]
        return self(jnp.concatenate(parts, self.source.axis))

    def write(self, x: jax.Array) -> dict[int, jax.Array]:
        """The transpose of `read`: leaf-shaped arrays by leaf."""
        home = self.adjoint(x)
        if not isinstance(self.source, Joined):
            return {self.source: home}
        ends = np.cumsum([part.shape[self.source.axis] for part in self.source.parts])
        pieces = jnp.split(home, ends[:-1], self.source.axis)
        written: dict[int, jax.Array] = {}
        for part, piece in zip(self.source.parts, pieces, strict=True):
            for leaf, array in part.write(piece).items():
                written[leaf] = written[leaf] + array if leaf in written else array
        return written

    def indices(self) -> np.ndarray:
        """Where each entry of the view lies in the flattened source."""
        size = int(np.prod(self.source_shape, dtype=np.int64))
        dtype = np.int32 if size < 2**31 else np.int64
        index: np.ndarray = self(np.arange(size, dtype=dtype).reshape(self.source_shape))
        return index

    def ranges(self) -> Ranges | None:
        """The same as ranges; None where they are none."""
        if 0 in self.shape:
            return None
        found: Ranges | None = Ranges.of(self.source_shape)
        for move in self.moves:
            found = found and found.moved(move.kind, move.argument)
        return found

    def same_as(self, other: View) -> bool:
        """Whether two views hold the same entries of the same source in the same order."""
        if (self.source, self.shape) != (other.source, other.shape):
            return False
        if len(self.stack) != len(other.stack):
            return False
        if self.moves == other.moves:
            return True
        mine, others = self.ranges(), other.ranges()
        if mine is not None and others is not None:
            return mine == others
        return bool(np.array_equal(self.indices(), other.indices()))


@dataclasses.dataclass(frozen=True)
class Joined:
    """Views concatenated along an axis (counted with stacked axes in front)."""

    parts: tuple[View, ...]
    axis: int

    def view(self, scale: float = 1.0) -> View:
        """The view of the whole, with the scale and the stack of its parts."""
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        whole = View.of(self, tuple(shape))
        return dataclasses.replace(whole, stack=self.parts[0].stack, scale=scale)


def overlap(views: Sequence[View]) -> bool:
    """Whether an entry of the source is in two of the views."""
    if len(views) < 2:
        return False
    boxes = _boxes(views)
    if boxes is not None:
        return any(ranges.meet(a, b) for a, b in itertools.combinations(boxes[1], 2))
    seen = np.zeros(_size(views[0]), np.int32)
    for view in views:
        np.add.at(seen, view.indices().ravel(), 1)
    return bool(seen.max(initial=0) > 1)


def remainder(views: Sequence[View]) -> list[View]:
    """The entries of the source that none of the (disjoint) views holds, as disjoint views."""
    source, shape, size = views[0].source, views[0].source_shape, _size(views[0])
    if sum(math.prod(view.shape) for view in views) == size:
        return []
    boxes = _boxes(views)
    if boxes is not None:
        grid, held = boxes
        whole = View.of(source, shape).reshape(grid)
        pieces = (zip(*box, strict=True) for box in ranges.outside(grid, held))
        return [whole.slice(tuple(starts), tuple(stops), None) for starts, stops in pieces]
    left = np.ones(size, bool)
    for view in views:
        left[view.indices().ravel()] = False
    where = tuple(int(i) for i in np.flatnonzero(left))
    moves = (Move("reshape", (size,)), Move("take", where))
    return [View(source, shape, (len(where),), moves)]


def _boxes(views: Sequence[View]) -> tuple[Shape, list[ranges.Box]] | None:
    """The boxes of views of one source in a grid of its entries; None where they are none."""
    found = [view.ranges() for view in views]
    known = [one for one in found if one is not None]
    if len(known) < len(found):
        return None
    return ranges.boxes(_size(views[0]), views[0].source_shape, known)


def _size(view: View) -> int:
    return math.prod(view.source_shape)
