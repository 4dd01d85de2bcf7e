"""The eigenbases of all layers' factors, renewed turn by turn, and what is kept in them.

State in the coordinates of a basis follows it into the next one: vectors exactly, a diagonal as
well as a diagonal can (see `curvature.estimator.bases`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from curvature.blocks.eigen_kronecker import from_basis
from curvature.estimator.bases import BASES, identity, moved_diagonal, overlap
from curvature.estimator.factors import factors_of
from curvature.meshes import automatic
from curvature.precision import Precision
from curvature.refresh.batches import Job, Key, devices, solved
from curvature.refresh.control import finite
from curvature.refresh.inverses import Arrays
from curvature.refresh.methods import QR, Eigh
from curvature.refresh.turns import SIDES, dealt, units
from curvature.registry import Layer

Blocks = dict[str, jax.Array]
"""Block coordinates by layer."""


class Moved(NamedTuple):
    """What a refresh changes.

    Attributes:
      bases: `input_basis` and `output_basis` by layer.
      vectors: what is rotated with a basis.
      diagonals: what is kept of operators in a basis: their diagonals.
      failed: whether a basis was not finite, so that the previous one was kept.
      staleness: the largest that was found, before the refresh.
    """

    bases: Arrays
    vectors: tuple[Blocks, ...]
    diagonals: tuple[Blocks, ...]
    failed: jax.Array
    staleness: jax.Array

    def part(self, names: Sequence[str]) -> Moved:
        """Of some layers only."""
        bases = {name: self.bases[name] for name in names}
        vectors, diagonals = (
            tuple({name: blocks[name] for name in names} for blocks in some)
            for some in (self.vectors, self.diagonals)
        )
        return self._replace(bases=bases, vectors=vectors, diagonals=diagonals)

    def updated(self, part: Moved) -> Moved:
        """With a part that has moved."""
        vectors, diagonals = (
            tuple(old | new for old, new in zip(olds, news, strict=True))
            for olds, news in zip(self[1:3], part[1:3], strict=True)
        )
        return Moved(self.bases | part.bases, vectors, diagonals, *part[3:])


@dataclasses.dataclass(frozen=True, eq=False)
class Eigenbases:
    """The eigenbases of some layers' factors.

    Attributes:
      layers: layers with Kronecker factors.
      factors: shapes of their factors, by layer.
      method: how bases are found.
      turns: in how many turns everything is renewed once.
      precision: of changes of basis.
      over: as `Inverses` has it.
    """

    layers: tuple[Layer, ...]
    factors: Mapping[str, Any]
    method: Eigh | QR
    turns: int
    precision: Precision
    over: NamedSharding | None = None

    @functools.cached_property
    def schedule(self) -> tuple[tuple[Layer, ...], ...]:
        """Whose bases are renewed at each turn."""
        found = [unit for x in self.layers for unit in units(x, self.factors[x.name], eigen=True)]
        hands = dealt(found, self.turns, devices(self.over))
        return tuple(tuple(unit.layer for unit in turn) for turn in hands)

    def identity(self) -> Arrays:
        """The coordinates themselves."""
        return {
            layer.name: {
                name: jnp.array(x)
                for name, x in identity(self.factors[layer.name], len(layer.stack)).items()
            }
            for layer in self.layers
        }

    def refresh(
        self, turn: int, statistics: Arrays, weight: jax.Array, first: jax.Array, old: Moved
    ) -> Moved:
        """Renews the bases of one turn.

        Args:
          turn: index into `schedule`.
          statistics: the averages of all statistics, times their weight.
          weight: that weight.
          first: whether the bases are the coordinates themselves so far.
          old: the part of that turn's layers.
        """
        act = functools.partial(self._refreshed, turn)
        return automatic(act, statistics, weight, first, old)

    def _refreshed(
        self, turn: int, statistics: Arrays, weight: jax.Array, first: jax.Array, old: Moved
    ) -> Moved:
        layers = self.schedule[turn]
        solutions, staleness = self._solved(layers, statistics, weight, first, old.bases)
        bases, failed = dict(old.bases), old.failed
        vectors, diagonals = ([dict(blocks) for blocks in some] for some in old[1:3])
        for layer in layers:
            name, depth = layer.name, len(layer.stack)
            before = bases[name]
            new = {basis: solutions[name, s] for basis, s in zip(BASES, SIDES, strict=True)}
            good = finite(new)
            failed |= ~good
            after = {basis: jnp.where(good, x, before[basis]) for basis, x in new.items()}
            rest = (depth, self.precision)
            overlaps = [overlap(before[basis], after[basis], *rest) for basis in BASES]
            # What is kept of a layer in another shape, as by a factored second moment, stays.
            for blocks in (x for x in vectors if x[name].shape == layer.shape):
                moved = from_basis(_like(overlaps, blocks[name]), blocks[name], *rest)
                blocks[name] = jnp.where(good, moved.astype(blocks[name].dtype), blocks[name])
            for blocks in (x for x in diagonals if x[name].shape == layer.shape):
                moved = moved_diagonal(_like(overlaps, blocks[name]), blocks[name], *rest)
                blocks[name] = jnp.where(good, moved.astype(blocks[name].dtype), blocks[name])
            bases[name] = after
        stale = functools.reduce(jnp.maximum, staleness, old.staleness)
        return Moved(bases, tuple(vectors), tuple(diagonals), failed, stale)

    def _solved(
        self,
        layers: Sequence[Layer],
        statistics: Arrays,
        weight: jax.Array,
        first: jax.Array,
        bases: Arrays,
    ) -> tuple[dict[Key, jax.Array], list[jax.Array]]:
        """The eigenvectors of every factor, ones where it is diagonal, and their staleness."""
        found: dict[Key, jax.Array] = {}
        jobs: dict[Key, Job] = {}
        for layer in layers:
            averages = {k: x / weight.astype(x.dtype) for k, x in statistics[layer.name].items()}
            factors = factors_of(layer, averages)
            for side, basis in zip(SIDES, BASES, strict=True):
                factor, key = factors[side], (layer.name, side)
                if factor.ndim == len(layer.stack) + 1:
                    found[key] = jnp.ones_like(factor)
                else:
                    jobs[key] = Job(factor, bases[layer.name][basis], eigen=True)
        solutions, staleness = solved(jobs, self.method, first, self.over)
        stale = [x.astype(weight.dtype) for x in staleness]
        return found | {key: vectors for key, (_, vectors) in solutions.items()}, stale


def _like(overlaps: Sequence[jax.Array], x: jax.Array) -> list[jax.Array]:
    return [overlap.astype(x.dtype) for overlap in overlaps]
