"""The eigenbases of all stacks' factors, renewed turn by turn, and what is kept in them.

State in the coordinates of a basis follows it into the next one: vectors exactly, a diagonal as
well as a diagonal can (see `curvature.statistics.eigenbasis`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from curvature.blocks.eigen_kronecker import from_basis
from curvature.meshes import automatic, devices, divided
from curvature.optimizer.refresh.batches import Job, Key, solved
from curvature.optimizer.refresh.cond import chosen, finite_copies, when
from curvature.optimizer.refresh.methods import QR, Eigh
from curvature.optimizer.refresh.schedule import SIDES, Clock, Unit, Window, dealt, in_turn, units
from curvature.precision import Precision
from curvature.sides import is_diagonal, told_apart
from curvature.statistics.eigenbasis import BASES, identity, moved_diagonal, overlap
from curvature.statistics.factors import Statistics, factors_of
from curvature.statistics.stacks import Arrays, Stack, in_full, unweighted
from curvature.trace import Layer

Blocks = dict[str, jax.Array]
"""Block coordinates by stack."""


class Moved(NamedTuple):
    """What a refresh changes.

    Attributes:
      bases: `input_basis` and `output_basis` by stack.
      vectors: what is rotated with a basis.
      diagonals: what is kept of operators in a basis: their diagonals.
      failed: whether a basis was not finite, so that the previous one was kept.
      staleness: the largest that was found, before the refresh; negative where none was.
    """

    bases: Arrays
    vectors: tuple[Blocks, ...]
    diagonals: tuple[Blocks, ...]
    failed: jax.Array
    staleness: jax.Array


class _Parts(NamedTuple):
    """Of some windows, one after another, what a refresh changes; see `Moved`."""

    bases: list[Statistics]
    vectors: list[list[jax.Array]]
    diagonals: list[list[jax.Array]]
    failed: jax.Array
    staleness: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Eigenbases:
    """The eigenbases of some stacks' factors.

    Attributes:
      layers: stacks of layers with Kronecker factors.
      factors: shapes of their factors, by stack.
      method: how bases are found.
      turns: in how many turns everything is renewed once.
      precision: of changes of basis.
      over: as `Inverses` has it.
      storage: as `Inverses` has it, of bases.
    """

    layers: tuple[Stack, ...]
    factors: Mapping[str, Any]
    method: Eigh | QR
    turns: int
    precision: Precision
    over: NamedSharding | None = None
    storage: DTypeLike | None = None

    @property
    def apart(self) -> bool:
        """Whether every device keeps its share of the bases only."""
        return any(layer.over is not None for layer in self.layers)

    @functools.cached_property
    def windows(self) -> tuple[Window, ...]:
        """Whose bases are renewed at each turn."""
        found = [unit for x in self.layers for unit in units(x, self.factors[x.name], eigen=True)]
        return dealt(found, self.turns, devices(self.over), apart=self.apart)

    def identity(self) -> Arrays:
        """The coordinates themselves."""
        return {
            layer.name: {
                name: divided(jnp.array(x, self.storage), layer.over)
                for name, x in identity(self.factors[layer.name], 1).items()
            }
            for layer in self.layers
        }

    def refresh(
        self, statistics: Arrays, weight: jax.Array, first: jax.Array, clock: Clock, old: Moved
    ) -> Moved:
        """Renews the bases whose turn it is.

        Args:
          statistics: the averages of all statistics, times their weight.
          weight: that weight.
          first: whether the bases are the coordinates themselves so far.
          clock: what is due.
          old: what may change.
        """

        def refreshed(
            statistics: Arrays, weight: jax.Array, first: jax.Array, clock: Clock, old: Moved
        ) -> Moved:
            how = statistics, weight, first
            return in_turn(self.windows, clock, self._refreshed, old, *how)

        return automatic(refreshed, statistics, weight, first, clock, old, like=old)

    def _refreshed(
        self,
        windows: list[Window],
        turn: jax.Array | int,
        due: jax.Array | bool,
        old: Moved,
        statistics: Arrays,
        weight: jax.Array,
        first: jax.Array,
    ) -> Moved:
        """Renews some windows, if that is due."""
        bases = {name: dict(arrays) for name, arrays in old.bases.items()}
        kept = [[dict(blocks) for blocks in some] for some in old[1:3]]
        found, parts = [], _Parts([], [], [], *old[3:])
        for window in windows:
            layer, read = window.unit.layer, functools.partial(window.read, turn=turn)
            found.append(jax.tree.map(read, statistics[layer.name]))
            parts.bases.append(in_full(jax.tree.map(read, bases[layer.name]), found[-1]))
            for part, some in zip(parts[1:3], kept, strict=True):
                part.append([read(blocks[layer.name]) for blocks in _of_shape(some, layer)])
        act = functools.partial(self._renewed, [w.some for w in windows], found, weight, first)
        parts = when(due, act, parts)
        for i, window in enumerate(windows):
            layer, arrays = window.unit.layer, bases[window.unit.layer.name]
            for name, x in parts.bases[i].items():
                arrays[name] = window.written(arrays[name], x.astype(arrays[name].dtype), turn)
            for part, some in zip(parts[1:3], kept, strict=True):
                for blocks, x in zip(_of_shape(some, layer), part[i], strict=True):
                    blocks[layer.name] = window.written(blocks[layer.name], x, turn)
        vectors, diagonals = map(tuple, kept)
        return Moved(bases, vectors, diagonals, parts.failed, parts.staleness)

    def _renewed(
        self,
        units: Sequence[Unit],
        statistics: Sequence[Statistics],
        weight: jax.Array,
        first: jax.Array,
        old: _Parts,
    ) -> _Parts:
        """Windows of some units after their refresh."""
        solutions, stale = self._solved(units, statistics, weight, first, old.bases)
        failed, new = old.failed, _Parts([], [], [], old.failed, old.staleness)
        for i, before in enumerate(old.bases):
            found = {
                basis: self._rounded(solutions[i, side])
                for basis, side in zip(BASES, SIDES, strict=True)
            }
            good = finite_copies(list(found.values()))
            failed |= ~jnp.all(good)
            after = {basis: chosen(good, x, before[basis]) for basis, x in found.items()}
            overlaps = [overlap(before[x], after[x], 1, self.precision) for x in BASES]
            new.bases.append(after)
            for kept, some, move in (
                (new.vectors, old.vectors, from_basis),
                (new.diagonals, old.diagonals, moved_diagonal),
            ):
                moved = [move(_like(overlaps, x), x, 1, self.precision) for x in some[i]]
                pairs = zip(moved, some[i], strict=True)
                kept.append([chosen(good, x.astype(y.dtype), y) for x, y in pairs])
        return new._replace(
            failed=failed, staleness=functools.reduce(jnp.maximum, stale, old.staleness)
        )

    def _rounded(self, basis: jax.Array) -> jax.Array:
        """A basis as it will be kept."""
        return basis if self.storage is None else basis.astype(self.storage).astype(basis.dtype)

    def _solved(
        self,
        units: Sequence[Unit],
        statistics: Sequence[Statistics],
        weight: jax.Array,
        first: jax.Array,
        bases: Sequence[Statistics],
    ) -> tuple[dict[Key, jax.Array], list[jax.Array]]:
        """The eigenvectors of every factor, ones where it is diagonal, and their staleness."""
        found: dict[Key, jax.Array] = {}
        jobs: dict[Key, Job] = {}
        for i, (unit, sums) in enumerate(zip(units, statistics, strict=True)):
            factors = factors_of(unit.layer, unweighted(sums, weight))
            sizes = unit.layer.shape[-2:]
            for side, basis, size in zip(SIDES, BASES, sizes, strict=True):
                if is_diagonal(factors[side], 1):
                    found[i, side] = jnp.ones_like(factors[side])
                else:
                    factor = told_apart(factors[side], size, 1)
                    jobs[i, side] = Job(factor, bases[i][basis], eigen=True)
        solutions, staleness = solved(jobs, self.method, first, self.over, apart=self.apart)
        stale = [x.astype(weight.dtype) for x in staleness]
        return found | {key: vectors for key, (_, vectors) in solutions.items()}, stale


def _of_shape(some: Sequence[Blocks], layer: Layer) -> list[Blocks]:
    """What is kept of a layer in another shape, as by a factored second moment, stays."""
    return [blocks for blocks in some if blocks[layer.name].shape == layer.shape]


def _like(overlaps: Sequence[jax.Array], x: jax.Array) -> list[jax.Array]:
    return [overlap.astype(x.dtype) for overlap in overlaps]
