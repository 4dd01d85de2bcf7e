"""The damped inverse of every block, renewed turn by turn.

What is kept of a layer, by name:

- Kronecker blocks under `Cholesky` and `NewtonSchulz`: `input` and `output`, the inverses of the
  damped factors, and of what fills up blocks along a diagonal, so that one can be told to be fresh;
- under `Eigh` and `QR`: `input_basis` and `output_basis`, and `values`, the inverses of the damped
  eigenvalues;
- `ekfac` blocks: `values`, the inverses of the damped corrections. Their bases are among the
  statistics, because corrections are averaged in them;
- other blocks: `values`, of the inverse.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from curvature.block_diagonal import BlockDiagonal, block_of
from curvature.blocks import EigenKronecker, Kronecker
from curvature.blocks.block import safe_power
from curvature.blocks.kronecker import damped_side
from curvature.linalg import diagonal, without_rounding
from curvature.meshes import automatic, devices, divided
from curvature.optimizer.refresh.batches import Job, Key, Solved, solved
from curvature.optimizer.refresh.cond import chosen, finite_copies, when
from curvature.optimizer.refresh.methods import QR, Eigh, Method
from curvature.optimizer.refresh.plain import plain
from curvature.optimizer.refresh.schedule import SIDES, Clock, Unit, Window, dealt, in_turn, units
from curvature.optimizer.refresh.typical import Typical, kronecker_of, typical
from curvature.sides import is_diagonal, joined, told_apart
from curvature.statistics.eigenbasis import BASES, carried_over, identity, products
from curvature.statistics.factors import Statistics, factors_of
from curvature.statistics.stacks import Arrays, Stacks, copies_of, in_full, unweighted
from curvature.trace import Layer

_MARGIN = 10.0  # rounding errors of a factorisation, in units of that of the matrix


class Refreshed(NamedTuple):
    """What a refresh changes.

    Attributes:
      statistics: bases of EKFAC layers, and the corrections in them.
      inverse: inverses.
      failed: whether one of them was not finite, so that the previous one was kept.
      staleness: the largest that was found, before the refresh; negative where none was.
    """

    statistics: Arrays
    inverse: Arrays
    failed: jax.Array
    staleness: jax.Array


class _Parts(NamedTuple):
    """Of some windows, one after another, what a refresh changes; see `Refreshed`."""

    statistics: list[Statistics]
    inverse: list[Statistics]
    failed: jax.Array
    staleness: jax.Array


class Now(NamedTuple):
    """What a refresh starts from, beyond what it changes.

    Attributes:
      weight: the weight of the averages: statistics are the averages over it.
      damping: added to the curvature.
      first: whether there are no inverses yet.
      restart: whether EKFAC layers' corrections were taken in no eigenbasis yet.
      least: what relative damping takes for a block's mean eigenvalue where that is less.
    """

    weight: jax.Array
    damping: jax.Array
    first: jax.Array
    restart: jax.Array
    least: Typical | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Inverses:
    """How the blocks of some stacks are inverted.

    Attributes:
      stacks: the blocks' layers.
      method: how factors are inverted.
      turns: in how many turns everything is renewed once.
      relative: whether damping is a multiple of each block's mean eigenvalue, or of a share of the
        net's `typical` one where that is larger.
      over: how factors of one size are divided over devices to be inverted; None where each device
        inverts all of them.
      storage: what inverses are kept in; None for the dtype of their statistics.
    """

    stacks: Stacks
    method: Method
    turns: int
    relative: bool
    over: NamedSharding | None = None
    storage: DTypeLike | None = None

    @property
    def apart(self) -> bool:
        """Whether every device keeps its share of the inverses only."""
        return self.stacks.over is not None

    @functools.cached_property
    def windows(self) -> tuple[Window, ...]:
        """What is renewed at each turn."""
        shapes, eigen = jax.eval_shape(self.stacks.zeros), isinstance(self.method, Eigh | QR)
        found = [units(layer, shapes[layer.name], eigen=eigen) for layer in self.stacks.layers]
        every = [unit for some in found for unit in some]
        return dealt(every, self.turns, devices(self.over), apart=self.apart)

    def zeros(self) -> Arrays:
        """Inverses of nothing."""
        found: Arrays = {}
        statistics = jax.eval_shape(self.stacks.zeros)
        for layer, fields in ((w.unit.layer, _fields(w.unit)) for w in self.windows):
            like = dict(statistics[layer.name])
            if layer.factored:
                like |= jax.eval_shape(functools.partial(identity, stack_ndim=1), like)
                like["values"] = jax.ShapeDtypeStruct(layer.shape, like["input"].dtype)
            shapes = ((field, like[field]) for field in fields)
            arrays = {name: jnp.zeros(x.shape, self.storage or x.dtype) for name, x in shapes}
            found[layer.name] = found.get(layer.name, {}) | arrays
        return divided(found, self.stacks.over)

    def operator(self, statistics: Arrays, inverse: Arrays) -> BlockDiagonal:
        """The inverse as an operator on parameter trees."""
        whole = self.stacks.operator(
            {
                name: _bases(statistics[name]) | in_full(found, statistics[name])
                for name, found in inverse.items()
            }
        )
        precision = self.stacks.estimator.precision
        blocks = {
            name: dataclasses.replace(block, precision=precision)
            if isinstance(block, Kronecker | EigenKronecker)
            else block
            for name, block in whole.blocks.items()
        }
        return dataclasses.replace(whole, blocks=blocks)

    def smallest_damping(self, statistics: Arrays, weight: jax.Array) -> jax.Array:
        """The damping below which a damped factor cannot be told from a singular one.

        The smallest eigenvalue of a factor A is lost to rounding below about eps |A|; factored
        damping puts sqrt(damping) pi there, and sqrt(damping) / pi in the other factor. Zero for
        eigenbases, which need no damping to be found.

        Args:
          statistics: the averages of all statistics, times their weight.
          weight: that weight.
        """
        if isinstance(self.method, Eigh | QR):
            return jnp.zeros_like(weight)
        return automatic(self._smallest_damping, statistics, weight)

    def _smallest_damping(self, statistics: Arrays, weight: jax.Array) -> jax.Array:
        least = jnp.zeros_like(weight)
        weight = jnp.where(weight > 0, weight, 1)
        for layer in (x for x in self.stacks.layers if x.factored and x.block != "ekfac"):
            count = sum(map(copies_of, layer.members))
            sums = {name: x[:count] for name, x in statistics[layer.name].items()}
            factors = factors_of(layer, unweighted(sums, weight))
            shifts = kronecker_of(layer, factors).factored_damping(1.0)
            for side, shift in zip(SIDES, shifts, strict=True):
                factor = factors[side]
                if is_diagonal(factor, 1):
                    continue
                lost = _MARGIN * float(np.finfo(factor.dtype).eps) * _norm(factor)
                root = lost / jnp.where(shift > 0, shift, 1)
                least = jnp.maximum(least, jnp.max(root**2).astype(least.dtype))
        return least

    def moving(self, statistics: Arrays) -> Arrays:
        """The statistics that a refresh changes: bases of EKFAC layers, and corrections in them."""
        layers = (layer for layer in self.stacks.layers if layer.block == "ekfac")
        return {
            layer.name: {field: statistics[layer.name][field] for field in (*BASES, "values")}
            for layer in layers
        }

    def refresh(self, statistics: Arrays, now: Now, clock: Clock, old: Refreshed) -> Refreshed:
        """Renews the inverses whose turn it is.

        Args:
          statistics: the averages of all statistics, times their weight.
          now: what else a refresh starts from.
          clock: what is due.
          old: `moving` statistics, inverses, and what happened so far.
        """

        def refreshed(statistics: Arrays, now: Now, clock: Clock, old: Refreshed) -> Refreshed:
            if self.relative:
                least = typical(self.stacks.layers, statistics, now.weight)
                now = now._replace(least=least)
            return in_turn(self.windows, clock, self._refreshed, old, statistics, now)

        return automatic(refreshed, statistics, now, clock, old, like=old)

    def _refreshed(
        self,
        windows: list[Window],
        turn: jax.Array | int,
        due: jax.Array | bool,
        old: Refreshed,
        statistics: Arrays,
        now: Now,
    ) -> Refreshed:
        """Renews some windows, if that is due."""
        moving, inverse = ({k: dict(x) for k, x in some.items()} for some in old[:2])
        found, parts = [], _Parts([], [], *old[2:])
        for window in windows:
            name, read = window.unit.layer.name, functools.partial(window.read, turn=turn)
            corrected = moving.get(name, {})
            found.append(jax.tree.map(read, statistics[name] | corrected))
            parts.statistics.append(jax.tree.map(read, corrected))
            kept = {k: read(inverse[name][k]) for k in _fields(window.unit)}
            parts.inverse.append(in_full(kept, found[-1]))
        act = functools.partial(self._renewed, [window.some for window in windows], found, now)
        parts = when(due, act, parts)
        for window, *changed in zip(windows, *parts[:2], strict=True):
            name = window.unit.layer.name
            for arrays, new in zip((moving, inverse), changed, strict=True):
                for field, x in new.items():
                    array = arrays[name][field]
                    arrays[name][field] = window.written(array, x.astype(array.dtype), turn)
        return Refreshed(moving, inverse, *parts[2:])

    def _renewed(
        self, units: Sequence[Unit], statistics: Sequence[Statistics], now: Now, old: _Parts
    ) -> _Parts:
        """Windows of some units after their refresh."""
        found = [
            factors_of(unit.layer, unweighted(arrays, now.weight))
            for unit, arrays in zip(units, statistics, strict=True)
        ]
        shifts = [self._shifts(unit.layer, x, now) for unit, x in zip(units, found, strict=True)]
        solutions, staleness = self._solved(units, found, shifts, old.inverse, now.first)
        new = [
            self._inverted(unit, i, found[i], shifts[i], solutions, now)
            for i, unit in enumerate(units)
        ]
        good: dict[str, jax.Array] = {}  # both sides are kept where one of them fails
        for unit, (_, arrays) in zip(units, new, strict=True):
            fine = finite_copies(_telling(arrays))
            good[unit.layer.name] = fine & good.get(unit.layer.name, True)
        moving, inverse = [], []
        for i, (unit, (moved, arrays)) in enumerate(zip(units, new, strict=True)):
            # A first inverse that cannot be had must not freeze its layer.
            stand_in = plain(unit.layer, found[i], shifts[i], now.damping, arrays)
            kept = _replaced(old.inverse[i], stand_in, now.first)
            inverse.append(_replaced(kept, arrays, good[unit.layer.name]))
            if moved:
                moved["values"] *= now.weight.astype(moved["values"].dtype)
            moving.append(_replaced(old.statistics[i], moved, good[unit.layer.name]))
        failed = functools.reduce(jnp.logical_or, (~jnp.all(x) for x in good.values()), old.failed)
        stale = [x.astype(old.staleness.dtype) for x in staleness]
        return _Parts(moving, inverse, failed, functools.reduce(jnp.maximum, stale, old.staleness))

    def _solved(
        self,
        units: Sequence[Unit],
        found: Sequence[Statistics],
        shifts: Sequence[Statistics],
        inverse: Sequence[Statistics],
        first: jax.Array,
    ) -> tuple[Solved, list[jax.Array]]:
        """Every factor of some windows inverted, or its eigenvalues and eigenvectors."""
        solutions: Solved = {}
        jobs: dict[Key, Job] = {}
        for i, (unit, statistics) in enumerate(zip(units, found, strict=True)):
            kept, eigen = inverse[i] | _bases(statistics), len(unit.sides) == 2
            for side in unit.sides:
                factor, key, size = statistics[side], (i, side), _size(unit.layer, side)
                if eigen and is_diagonal(factor, 1):
                    solutions[key] = (factor, jnp.ones_like(factor))
                elif eigen:
                    factor = told_apart(factor, size, 1)
                    jobs[key] = Job(factor, kept[f"{side}_basis"], eigen=True)
                elif is_diagonal(factor, 1):
                    solutions[key] = (safe_power(factor + shifts[i][side][..., None], -1.0),)
                else:
                    damped = damped_side(factor, shifts[i][side], size, 1)
                    jobs[key] = Job(damped, kept[side], eigen=False)
        batched, staleness = solved(jobs, self.method, first, self.over, apart=self.apart)
        for (i, side), (values, *vectors) in batched.items():
            if vectors and values.ndim == 3:
                values = joined(values, _size(units[i].layer, side))
                batched[i, side] = (values, *vectors)
        return solutions | batched, staleness

    def _inverted(
        self,
        unit: Unit,
        number: int,
        found: Statistics,
        shifts: Statistics,
        solutions: Solved,
        now: Now,
    ) -> tuple[Statistics, Statistics]:
        """A window's statistics, where they change, and its inverse."""
        layer = unit.layer
        if len(unit.sides) == 1:
            return {}, {side: solutions[number, side][0] for side in unit.sides}
        if not unit.sides:
            return {}, {"values": self._damped(block_of(layer, found), now)}
        values, vectors = zip(*(solutions[number, side] for side in SIDES), strict=True)
        bases = dict(zip(BASES, vectors, strict=True))
        if layer.block == "ekfac":
            precision = self.stacks.estimator.precision
            moved = carried_over(found, bases, values, 1, now.restart, precision)
            kept: Statistics = {}
            block: Any = block_of(layer, found | moved)
        else:
            moved, kept = {}, bases
            block = EigenKronecker(vectors[0], vectors[1], products(*values), 1)
        if isinstance(self.method, Eigh | QR) and not self.method.factored:
            return moved, kept | {"values": self._damped(block, now)}
        damping = _in_eigenbasis(values, tuple(shifts[side] for side in SIDES))
        return moved, kept | {"values": block.damped_inverse(damping).values}

    def _shifts(self, layer: Layer, found: Statistics, now: Now) -> Statistics:
        """What factored damping adds to the diagonals of a layer's factors, if it has any."""
        if not layer.factored:
            return {}
        block, least = kronecker_of(layer, found), now.least.output if now.least else 0.0
        pair = block.factored_damping(now.damping, relative=self.relative, least=least)
        return dict(zip(SIDES, pair, strict=True))

    def _damped(self, block: Any, now: Now) -> jax.Array:
        """The values of a block's damped inverse; all these blocks are linear in them."""
        values, scale = block.values, jnp.ones((), block.values.dtype)
        if now.least:
            # The mean of the eigenvalues is that of the diagonal, which is dearer to have.
            diagonal = values if isinstance(block, EigenKronecker) else block.diagonal()
            mean = jnp.mean(diagonal, axis=tuple(range(1, diagonal.ndim)))
            mean = jnp.maximum(mean, now.least.whole.astype(mean.dtype))
            mean = jnp.where(mean > 0, mean, 1)
            scale = mean.reshape(mean.shape + (1,) * (values.ndim - 1))
        block = dataclasses.replace(block, values=values / scale)
        return block.damped_inverse(now.damping).values / scale


def _in_eigenbasis(values: tuple[jax.Array, ...], shifts: tuple[jax.Array, ...]) -> jax.Array:
    """What factored damping adds to the eigenvalues a b: (a + s) (b + t) - a b."""
    a, b = map(without_rounding, values)
    s, t = (x[..., None, None] for x in shifts)
    return s * b[..., None, :] + t * (a[..., :, None] + s)


def _fields(unit: Unit) -> tuple[str, ...]:
    """The names of a unit's inverse arrays."""
    if not unit.sides or unit.layer.block == "ekfac":
        return ("values",)
    return (*BASES, "values") if len(unit.sides) == 2 else unit.sides


def _telling(inverse: Statistics) -> list[jax.Array]:
    """Arrays that are finite only where all of an inverse is: it is positive semi-definite."""
    if "values" in inverse:
        return [inverse["values"]]
    return [x if is_diagonal(x, 1) else diagonal(x) for x in inverse.values()]


def _norm(matrices: jax.Array) -> jax.Array:
    """The Frobenius norms, which bound the largest eigenvalues."""
    return jnp.sqrt(jnp.sum(matrices**2, axis=tuple(range(1, matrices.ndim))))


def _size(layer: Layer, side: str) -> int:
    return layer.shape[-2:][SIDES.index(side)]


def _bases(statistics: Statistics) -> Statistics:
    return {name: x for name, x in statistics.items() if name in BASES}


def _replaced(old: Statistics, new: Statistics, good: jax.Array) -> Statistics:
    return old | {field: chosen(good, x, old[field]) for field, x in new.items()}
