"""The entries that a view holds, as ranges: nothing of the size of the array is made.

An axis of a view that only reshapes, transposes, slices and reverses is a number in a mixed radix:
index i is split into digits, and each digit moves by its own stride through the flattened array.
Two views are the same if their digits are. The entries of several views are boxes in a grid whose
axes lie between the strides that occur, so they overlap where boxes do, and what is left of the
array is boxes again.

Where it cannot be written so (a slice that cuts through flattened axes), answers are None, and
`views` counts entries instead.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

Shape = tuple[int, ...]
Digit = tuple[int, int]  # (size, stride)
Box = tuple[tuple[int, int], ...]  # (start, stop) along every axis of a grid


@dataclasses.dataclass(frozen=True)
class Ranges:
    """Where each entry of a view lies in the flattened array.

    Attributes:
      offset: of the first entry.
      axes: for each axis of the view its digits, outermost first; as few as can be.
    """

    offset: int
    axes: tuple[tuple[Digit, ...], ...]

    @classmethod
    def of(cls, shape: Shape) -> Ranges:
        """The whole of an array."""
        return cls(0, tuple(_merged([digit]) for digit in zip(shape, _strides(shape), strict=True)))

    def moved(self, kind: str, argument: tuple[Any, ...]) -> Ranges | None:
        """After one move of a view; None where that is no such number."""
        if kind == "transpose":
            return Ranges(self.offset, tuple(self.axes[a] for a in argument))
        if kind == "reshape":
            return self._reshaped(argument)
        if kind == "slice":
            return self._sliced(argument)
        if kind == "reverse":
            return self._reversed(argument)
        return None

    def _reshaped(self, shape: Shape) -> Ranges | None:
        left = list(_merged([digit for axis in self.axes for digit in axis]))
        axes = []
        for size in reversed(shape):
            axis: list[Digit] = []
            while size > 1:
                last, stride = left.pop()
                common = min(size, last)
                if size % common or last % common:
                    return None
                axis.append((common, stride))
                size //= common
                if last > common:
                    left.append((last // common, stride * common))
            axes.append(_merged(axis[::-1]))
        return Ranges(self.offset, tuple(axes[::-1]))

    def _sliced(self, slices: Sequence[tuple[int, int, int]]) -> Ranges | None:
        offset, axes = self.offset, []
        for (start, stop, step), axis in zip(slices, self.axes, strict=True):
            if (start, stop, step) == (0, math.prod(size for size, _ in axis), 1):
                axes.append(axis)
                continue
            inside = math.prod(size for size, _ in axis[1:])
            if inside > 1 and (step != 1 or start % inside or stop % inside):
                return None  # it cuts through what was flattened
            first, last = start // inside, stop // inside
            stride = axis[0][1] if axis else 0
            offset += first * stride
            axes.append(_merged([(len(range(first, last, step)), stride * step), *axis[1:]]))
        return Ranges(offset, tuple(axes))

    def _reversed(self, axes: Sequence[int]) -> Ranges:
        turned = [digit for a in axes for digit in self.axes[a]]
        offset = self.offset + sum((size - 1) * stride for size, stride in turned)
        back = tuple(tuple((size, -stride) for size, stride in axis) for axis in self.axes)
        return Ranges(offset, tuple(back[a] if a in axes else x for a, x in enumerate(self.axes)))

    def positive(self) -> tuple[int, tuple[Digit, ...]]:
        """The entries without their order: the first one, and as few digits as can be."""
        digits = [digit for axis in self.axes for digit in axis]
        first = self.offset + sum((size - 1) * min(stride, 0) for size, stride in digits)
        by_stride = sorted((abs(stride), size) for size, stride in digits)
        return first, _merged([(size, stride) for stride, size in by_stride[::-1]])


def boxes(size: int, shape: Shape, views: Sequence[Ranges]) -> tuple[Shape, list[Box]] | None:
    """A grid of an array's entries, and the box of each view in it; None where there is none.

    The grid has the array's own axes where that can be.
    """
    entries = [view.positive() for view in views]
    strides = {stride for _, digits in entries for _, stride in digits}
    for chosen in (strides | set(_strides(shape)), strides | {1}):
        chain = sorted({s for s in chosen if 0 < s < size} | {1, size}, reverse=True)
        if any(outer % inner for outer, inner in itertools.pairwise(chain)):
            continue
        grid = tuple(outer // inner for outer, inner in itertools.pairwise(chain))
        found = [_box(first, digits, grid) for first, digits in entries]
        known = [box for box in found if box is not None]
        if len(known) == len(found):
            return grid, known
    return None


def _box(first: int, digits: Sequence[Digit], grid: Shape) -> Box | None:
    """The box of entries in a grid."""
    starts, left = [], first
    for stride in _strides(grid):
        starts.append(left // stride)
        left %= stride
    sizes = dict.fromkeys(_strides(grid), 1)
    for size, stride in digits:
        sizes[stride] = size
    box: list[tuple[int, int]] = []
    carried = 1  # digits that go on through the next axis
    for axis, stride in reversed(list(enumerate(_strides(grid)))):
        size, start = sizes[stride] * carried, starts[axis]
        if carried > 1 and sizes[stride] > 1:
            return None
        carried, whole = 1, grid[axis]
        if start + size > whole:
            if start or size % whole:
                return None
            carried, size = size // whole, whole
        box.append((start, start + size))
    return tuple(box[::-1]) if carried == 1 else None


def meet(one: Box, other: Box) -> bool:
    """Whether two boxes have an entry in common."""
    return all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(one, other, strict=True))


def outside(grid: Shape, held: Sequence[Box]) -> list[Box]:
    """What is left of a grid without some disjoint boxes, as disjoint boxes."""
    left: list[Box] = [tuple((0, n) for n in grid)]
    for box in held:
        left = [piece for whole in left for piece in _without(whole, box)]
    return left


def _without(whole: Box, box: Box) -> list[Box]:
    if not meet(whole, box):
        return [whole]
    pieces = []
    rest = list(whole)
    for axis, ((start, stop), (low, high)) in enumerate(zip(whole, box, strict=True)):
        for side in ((start, min(low, stop)), (max(high, start), stop)):
            if side[0] < side[1]:
                pieces.append((*rest[:axis], side, *rest[axis + 1 :]))
        rest[axis] = (max(start, low), min(stop, high))
    return pieces


def _merged(digits: Sequence[Digit]) -> tuple[Digit, ...]:
    """Digits without those of size one, and neighbours that move as one number joined."""
    merged: list[Digit] = []
    for size, stride in digits:
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return tuple(merged)


def _strides(shape: Shape) -> Shape:
    """How far apart neighbours along each axis lie in a flattened array."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
