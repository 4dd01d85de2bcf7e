"""When each factor is refreshed: the work of a refresh, spread over the steps until the next one.

A pure function of the stacks' shapes. Of every stack a window of its copies is renewed at a time.
Windows are dealt to turns by their costs, the most expensive first and each to the turn that has
least to do so far, so that no step is much slower than others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from curvature.optimizer.refresh.cond import loop, when
from curvature.statistics.factors import Statistics
from curvature.trace import Layer

SIDES = ("input", "output")
T = TypeVar("T")


class Unit(NamedTuple):
    """What is refreshed together of each copy in a stack.

    Attributes:
      layer: the stack.
      sides: the Kronecker factors that are inverted, or whose eigenbases are found; none where a
        block is stored as one array.
      copies: how many there are.
      cost: of one copy: size^3 of its matrices, summed; its number of entries without.
    """

    layer: Layer
    sides: tuple[str, ...]
    copies: int
    cost: int


class Window(NamedTuple):
    """The copies of a unit that are refreshed at each turn: a few of every part of the stack.

    Attributes:
      unit: the unit.
      size: how many copies at a time, of all parts together.
      starts: the first of them in each part, by turn; -1 where there are none.
      parts: in how many equal parts the stack is divided over devices.
    """

    unit: Unit
    size: int
    starts: tuple[int, ...]
    parts: int = 1

    @property
    def some(self) -> Unit:
        """The unit of a window's copies alone."""
        layer = dataclasses.replace(self.unit.layer, stack=(self.size,))
        return self.unit._replace(layer=layer, copies=self.size)

    @property
    def turns(self) -> tuple[bool, ...]:
        """At which turns something is refreshed."""
        return tuple(start >= 0 for start in self.starts)

    def read(self, array: jax.Array, turn: jax.Array | int) -> jax.Array:
        """The window of an array with all copies along its first axis."""
        if self.size == self.unit.copies:
            return array
        start, each = self._start(turn), self.size // self.parts
        found = jax.lax.dynamic_slice_in_dim(self._apart(array), start, each, axis=1)
        return found.reshape(self.size, *array.shape[1:])

    def written(self, array: jax.Array, part: jax.Array, turn: jax.Array | int) -> jax.Array:
        """The array with another window."""
        if self.size == self.unit.copies:
            return part
        apart, new = self._apart(array), self._apart(part)
        found = jax.lax.dynamic_update_slice_in_dim(apart, new, self._start(turn), axis=1)
        return found.reshape(array.shape)

    def _apart(self, array: jax.Array) -> jax.Array:
        return array.reshape(self.parts, -1, *array.shape[1:])

    def _start(self, turn: jax.Array | int) -> jax.Array:
        return jnp.asarray(np.maximum(self.starts, 0).astype(np.int32))[turn]


def units(layer: Layer, statistics: Statistics, *, eigen: bool) -> list[Unit]:
    """The units of a stack: both sides at once in an eigenbasis, one by one otherwise.

    Args:
      layer: the stack.
      statistics: arrays of the shapes of its statistics.
      eigen: whether eigenbases are wanted, not inverses.
    """
    (copies,) = layer.stack

    def cost(name: str) -> int:
        shape = statistics[name].shape[1:]
        matrices = layer.outer or (name != "values" and len(shape) > 1)
        return math.prod(shape) * (shape[-1] if matrices else 1)

    if not layer.factored:
        return [Unit(layer, (), copies, cost("values"))]
    if eigen or layer.block == "ekfac":
        return [Unit(layer, SIDES, copies, sum(map(cost, SIDES)))]
    return [Unit(layer, (side,), copies, cost(side)) for side in SIDES]


class Clock(NamedTuple):
    """What is due.

    Attributes:
      due: whether anything is.
      everything: whether all turns are due at once.
      turn: which one is.
    """

    due: jax.Array
    everything: jax.Array
    turn: jax.Array


Act = Callable[..., T]
"""From windows with the same turns, a turn, whether it is theirs and due, what may change, and
operands to what may change."""


def in_turn(windows: Sequence[Window], clock: Clock, act: Act[T], value: T, *operands: Any) -> T:
    """What may change, after the turns that are due.

    Stacks that take several turns are renewed in a loop over the turns that are due, mostly one or
    none, so that its work is compiled once. What is renewed in one turn needs no loop.
    """
    groups: dict[tuple[bool, ...], list[Window]] = {}
    for window in windows:
        groups.setdefault(window.turns, []).append(window)
    often = [turns for turns in groups if sum(turns) > 1]
    for turns in (turns for turns in groups if sum(turns) == 1):
        turn = turns.index(True)
        due = clock.due & (clock.everything | (clock.turn == turn))
        value = act(groups[turns], turn, due, value, *operands)
    if not often:
        return value

    def one(turn: jax.Array, value: T, *operands: Any) -> T:
        for turns in often:
            due = True if all(turns) else jnp.asarray(turns)[turn]
            value = act(groups[turns], turn, due, value, *operands)
        return value

    count = len(often[0])
    first = jnp.where(clock.everything, 0, clock.turn)
    last = jnp.where(clock.everything, count, clock.turn + 1)
    return _loop(one, count)(first, jnp.where(clock.due, last, first), value, *operands)


def _loop(one: Callable[..., T], count: int) -> Callable[..., T]:
    """`one` for the turns from a first to before a last; where differentiated, over all of them.

    A loop with bounds that are computed has no derivative in reverse.
    """

    def few(first: jax.Array, last: jax.Array, value: T, *operands: Any) -> T:
        return loop(first, last, lambda turn, x: one(turn, x, *operands), value)

    def every(first: jax.Array, last: jax.Array, value: T, *operands: Any) -> T:
        def step(value: T, turn: jax.Array) -> tuple[T, None]:
            due = (first <= turn) & (turn < last)
            return when(due, lambda x: one(turn, x, *operands), value), None

        return jax.lax.scan(step, value, jnp.arange(count, dtype=first.dtype))[0]

    turns = jax.custom_jvp(few)

    @turns.defjvp
    def derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[T, T]:
        return jax.jvp(every, primals, tangents)

    return turns


def dealt(
    units: Sequence[Unit], turns: int, devices: int = 1, *, apart: bool = False
) -> tuple[Window, ...]:
    """The windows of some units, dealt to a number of turns.

    Args:
      units: what is refreshed.
      turns: in how many turns all of it is, once.
      devices: how many of them share a window.
      apart: whether each of them has an equal part of every stack, and takes copies of its own.
    """
    parts = devices if apart else 1
    costs = [0] * turns
    windows = []
    for unit in sorted(units, key=lambda unit: -unit.cost * unit.copies):
        each = math.ceil(math.ceil(unit.copies / devices) / turns)  # of a device, at a turn
        there = unit.copies // parts
        size = min(there, each * devices // parts)
        count = math.ceil(there / size)
        starts = [-1] * turns
        for i, turn in enumerate(sorted(sorted(range(turns), key=costs.__getitem__)[:count])):
            starts[turn] = min(i * size, there - size)
            costs[turn] += each * unit.cost
        windows.append(Window(unit, size * parts, tuple(starts), parts))
    return tuple(windows)
