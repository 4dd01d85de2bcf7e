"""The damped inverse of every block, renewed turn by turn.

What is kept of a layer, by name:

- Kronecker blocks under `Cholesky` and `NewtonSchulz`: `input` and `output`, the inverses of the
  damped factors;
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

from curvature.blocks import BlockDiagonal, Dense, EigenKronecker, Kronecker, block_of
from curvature.blocks.block import safe_power
from curvature.estimator import Estimator
from curvature.estimator.bases import BASES, carried_over, identity, known, products
from curvature.estimator.factors import Statistics, factors_of
from curvature.linalg import diagonal, multiples_of_identity
from curvature.meshes import automatic
from curvature.refresh.batches import Job, Key, Solved, devices, solved
from curvature.refresh.control import finite
from curvature.refresh.methods import QR, Eigh, Method
from curvature.refresh.plain import plain
from curvature.refresh.turns import SIDES, Unit, dealt, units
from curvature.registry import Layer

Arrays = dict[str, Statistics]
_MARGIN = 10.0  # rounding errors of a factorisation, in units of that of the matrix


class Refreshed(NamedTuple):
    """What a refresh changes.

    Attributes:
      statistics: bases of EKFAC layers, and the corrections in them.
      inverse: inverses.
      failed: whether one of them was not finite, so that the previous one was kept.
      staleness: the largest that was found, before the refresh.
    """

    statistics: Arrays
    inverse: Arrays
    failed: jax.Array
    staleness: jax.Array


class Now(NamedTuple):
    """What a refresh starts from, beyond what it changes.

    Attributes:
      weight: the weight of the averages: statistics are the averages over it.
      damping: added to the curvature.
      first: whether there are no inverses yet.
      restart: whether EKFAC layers' corrections were taken in no eigenbasis yet.
    """

    weight: jax.Array
    damping: jax.Array
    first: jax.Array
    restart: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Inverses:
    """How the blocks of an estimator are inverted.

    Attributes:
      estimator: whose blocks.
      method: how factors are inverted.
      turns: in how many turns everything is renewed once.
      relative: whether damping is a multiple of each block's mean eigenvalue.
      over: how factors of one size are divided over devices to be inverted; None where each device
        inverts all of them.
    """

    estimator: Estimator
    method: Method
    turns: int
    relative: bool
    over: NamedSharding | None = None

    @functools.cached_property
    def schedule(self) -> tuple[tuple[Unit, ...], ...]:
        """What is renewed at each turn."""
        zeros, eigen = self.estimator.zeros(), isinstance(self.method, Eigh | QR)
        found = [units(layer, zeros[layer.name], eigen=eigen) for layer in self.estimator.layers]
        return dealt([unit for some in found for unit in some], self.turns, devices(self.over))

    def zeros(self) -> Arrays:
        """Inverses of nothing."""
        found: Arrays = {}
        statistics = self.estimator.zeros()
        for unit in (unit for turn in self.schedule for unit in turn):
            layer, like = unit.layer, dict(statistics[unit.layer.name])
            if layer.factored:
                like |= identity(like, len(layer.stack))
                like["values"] = jnp.zeros(layer.shape, like["input"].dtype)
            fields = {field: jnp.zeros_like(like[field]) for field in _fields(unit)}
            found[layer.name] = found.get(layer.name, {}) | fields
        return found

    def operator(self, statistics: Arrays, inverse: Arrays) -> BlockDiagonal:
        """The inverse as an operator on parameter trees."""
        whole = self.estimator.operator(
            {name: _bases(statistics[name]) | found for name, found in inverse.items()}
        )
        precision = self.estimator.precision
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
        for layer in (x for x in self.estimator.layers if x.factored and x.block != "ekfac"):
            averages = {k: x / weight.astype(x.dtype) for k, x in statistics[layer.name].items()}
            factors = factors_of(layer, averages)
            block = Kronecker(factors["input"], factors["output"], stack_ndim=len(layer.stack))
            shifts = block.factored_damping(1.0)
            for side, shift in zip(SIDES, shifts, strict=True):
                factor = factors[side]
                if factor.ndim == len(layer.stack) + 1:
                    continue
                lost = _MARGIN * float(np.finfo(factor.dtype).eps) * _norm(factor)
                root = lost / jnp.where(shift > 0, shift, 1)
                least = jnp.maximum(least, jnp.max(root**2).astype(least.dtype))
        return least

    def part(self, turn: int, statistics: Arrays, inverse: Arrays) -> tuple[Arrays, Arrays]:
        """What the refresh of one turn changes: of EKFAC layers' statistics, and of inverses."""
        moving: Arrays = {}
        mine: Arrays = {}
        for unit in self.schedule[turn]:
            name = unit.layer.name
            mine.setdefault(name, {}).update({f: inverse[name][f] for f in _fields(unit)})
            if unit.layer.block == "ekfac":
                moving[name] = {f: statistics[name][f] for f in (*BASES, "values")}
        return moving, mine

    def refresh(self, turn: int, statistics: Arrays, now: Now, old: Refreshed) -> Refreshed:
        """Renews the inverses of one turn.

        Args:
          turn: index into `schedule`.
          statistics: the averages of all statistics, times their weight.
          now: what else a refresh starts from.
          old: `part` of the turn, and what happened so far.
        """
        return automatic(functools.partial(self._refreshed, turn), statistics, now, old)

    def _refreshed(self, turn: int, statistics: Arrays, now: Now, old: Refreshed) -> Refreshed:
        group = self.schedule[turn]
        layers = {unit.layer.name: unit.layer for unit in group}
        averages = {
            name: {
                field: x if field in BASES else x / now.weight.astype(x.dtype)
                for field, x in statistics[name].items()
            }
            for name in old.inverse
        }
        found = {name: factors_of(layers[name], x) for name, x in averages.items()}
        solutions, staleness = self._solved(group, found, old.inverse, now)
        moving, inverse, failed = dict(old.statistics), dict(old.inverse), old.failed
        renewed: dict[str, tuple[Statistics, Statistics]] = {}
        for unit in group:
            moved, new = self._renewed(unit, found[unit.layer.name], solutions, now)
            so_far = renewed.get(unit.layer.name, ({}, {}))
            renewed[unit.layer.name] = so_far[0] | moved, so_far[1] | new
        for name, (moved, new) in renewed.items():
            layer = layers[name]
            good = finite(_telling(new, len(layer.stack)))
            failed |= ~good
            # A first inverse that cannot be had must not freeze its layer.
            kept = _replaced(inverse[name], self._plain(layer, found[name], now, new), now.first)
            inverse[name] = _replaced(kept, new, good)
            if moved:
                moved["values"] *= now.weight.astype(moved["values"].dtype)
                moving[name] = _replaced(moving[name], moved, good)
        stale = [x.astype(old.staleness.dtype) for x in staleness]
        return Refreshed(
            moving, inverse, failed, functools.reduce(jnp.maximum, stale, old.staleness)
        )

    def _solved(
        self, group: Sequence[Unit], found: Arrays, inverse: Arrays, now: Now
    ) -> tuple[Solved, list[jax.Array]]:
        """Every factor of a group inverted, or its eigenvalues and eigenvectors."""
        solutions: Solved = {}
        jobs: dict[Key, Job] = {}
        for unit in group:
            layer, name, eigen = unit.layer, unit.layer.name, len(unit.sides) == 2
            statistics, kept = found[name], inverse[name] | _bases(found[name])
            shifts = {} if eigen else self._shifts(unit, statistics, now.damping)
            for side in unit.sides:
                factor, key = statistics[side], (name, side)
                matrix = factor.ndim == len(layer.stack) + 2
                if eigen and matrix:
                    jobs[key] = Job(factor, kept[f"{side}_basis"], eigen=True)
                elif eigen:
                    solutions[key] = (factor, jnp.ones_like(factor))
                elif matrix:
                    damped = factor + multiples_of_identity(shifts[side], factor.shape[-1])
                    jobs[key] = Job(damped, kept[side], eigen=False)
                else:
                    solutions[key] = (safe_power(factor + shifts[side][..., None], -1.0),)
        batched, staleness = solved(jobs, self.method, now.first, self.over)
        return solutions | batched, staleness

    def _renewed(
        self, unit: Unit, found: Statistics, solutions: Solved, now: Now
    ) -> tuple[Statistics, Statistics]:
        """A unit's statistics, where they change, and its inverse."""
        layer, depth = unit.layer, len(unit.layer.stack)
        if len(unit.sides) == 1:
            return {}, {side: solutions[layer.name, side][0] for side in unit.sides}
        if not unit.sides:
            return {}, {"values": self._damped(block_of(layer, found), depth, now.damping)}
        values, vectors = zip(*(solutions[layer.name, side] for side in SIDES), strict=True)
        bases = dict(zip(BASES, vectors, strict=True))
        if layer.block == "ekfac":
            precision = self.estimator.precision
            moved = carried_over(found, bases, values, depth, now.restart, precision)
            kept: Statistics = {}
            block: Any = block_of(layer, found | moved)
        else:
            moved, kept = {}, bases
            block = EigenKronecker(vectors[0], vectors[1], products(*values), depth)
        if isinstance(self.method, Eigh | QR) and not self.method.factored:
            return moved, kept | {"values": self._damped(block, depth, now.damping)}
        shifts = self._shifts(unit, found, now.damping)
        damping = _in_eigenbasis(values, tuple(shifts[side] for side in SIDES))
        return moved, kept | {"values": block.damped_inverse(damping).values}

    def _plain(self, layer: Layer, found: Statistics, now: Now, fields: Statistics) -> Statistics:
        """What `plain` gives for some fields of a layer's inverse."""
        shifts = self._shifts(Unit(layer, SIDES if layer.factored else (), 0), found, now.damping)
        arrays = plain(layer, found, shifts, now.damping)
        return {field: arrays[field].astype(x.dtype) for field, x in fields.items()}

    def _shifts(self, unit: Unit, found: Statistics, damping: jax.Array) -> Statistics:
        """What factored damping adds to the diagonals of a unit's factors."""
        if not unit.sides:
            return {}
        block = Kronecker(found["input"], found["output"], stack_ndim=len(unit.layer.stack))
        pair = block.factored_damping(damping, relative=self.relative)
        return dict(zip(SIDES, pair, strict=True))

    def _damped(self, block: Any, depth: int, damping: jax.Array) -> jax.Array:
        """The values of a block's damped inverse; all these blocks are linear in them."""
        values, scale = block.values, jnp.ones((), block.values.dtype)
        if self.relative:
            diagonal = block.diagonal() if isinstance(block, Dense) else values
            mean = jnp.mean(diagonal, axis=tuple(range(depth, diagonal.ndim)))
            mean = jnp.where(mean > 0, mean, 1)
            scale = mean.reshape(mean.shape + (1,) * (values.ndim - depth))
        return (
            dataclasses.replace(block, values=values / scale).damped_inverse(damping).values / scale
        )


def _in_eigenbasis(values: tuple[jax.Array, ...], shifts: tuple[jax.Array, ...]) -> jax.Array:
    """What factored damping adds to the eigenvalues a b: (a + s) (b + t) - a b."""
    a, b = (known(x) for x in values)
    s, t = (x[..., None, None] for x in shifts)
    return s * b[..., None, :] + t * (a[..., :, None] + s)


def _fields(unit: Unit) -> tuple[str, ...]:
    """The names of a unit's inverse arrays."""
    if not unit.sides or unit.layer.block == "ekfac":
        return ("values",)
    return (*BASES, "values") if len(unit.sides) == 2 else unit.sides


def _telling(inverse: Statistics, depth: int) -> list[jax.Array]:
    """Arrays that are finite only where all of an inverse is: it is positive semi-definite.

    A side has `depth` axes of copies in front, and then one axis where it is diagonal, else two.
    """
    if "values" in inverse:
        return [inverse["values"]]
    return [x if x.ndim == depth + 1 else diagonal(x) for x in inverse.values()]


def _norm(matrices: jax.Array) -> jax.Array:
    """The Frobenius norms, which bound the largest eigenvalues."""
    return jnp.sqrt(jnp.sum(matrices**2, axis=(-2, -1)))


def _bases(statistics: Statistics) -> Statistics:
    return {name: x for name, x in statistics.items() if name in BASES}


def _replaced(old: Statistics, new: Statistics, good: jax.Array) -> Statistics:
    return old | {field: jnp.where(good, x, old[field]) for field, x in new.items()}
