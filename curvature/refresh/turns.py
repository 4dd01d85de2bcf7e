"""When each factor is refreshed: the work of a refresh, spread over the steps until the next one.

A pure function of the layers' shapes. Factors are dealt to turns by their costs, the most expensive
first and each to the turn that has least to do so far, so that no step is much slower than others.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from curvature.estimator.factors import Statistics
from curvature.registry import Layer

SIDES = ("input", "output")


class Unit(NamedTuple):
    """What is refreshed together.

    Attributes:
      layer: whose inverse it is.
      sides: the Kronecker factors that are inverted, or whose eigenbases are found; none where a
        block is stored as one array.
      cost: size^3 of its matrices, summed; its number of entries without.
    """

    layer: Layer
    sides: tuple[str, ...]
    cost: int


def units(layer: Layer, statistics: Statistics, *, eigen: bool) -> list[Unit]:
    """The units of a layer: both sides at once in an eigenbasis, one by one otherwise.

    Args:
      layer: the layer.
      statistics: arrays of the shapes of its statistics.
      eigen: whether eigenbases are wanted, not inverses.
    """

    def cost(name: str) -> int:
        array = statistics[name]
        matrix = layer.block == "dense" or array.ndim == len(layer.stack) + 2
        return array.size * (array.shape[-1] if matrix else 1)

    if not layer.factored:
        return [Unit(layer, (), cost("values"))]
    if eigen or layer.block == "ekfac":
        return [Unit(layer, SIDES, sum(map(cost, SIDES)))]
    return [Unit(layer, (side,), cost(side)) for side in SIDES]


def dealt(units: Sequence[Unit], turns: int, devices: int = 1) -> tuple[tuple[Unit, ...], ...]:
    """The units of each of a number of turns.

    Units of one cost go together, as many as there are devices to work on them at once.
    """
    hands: list[list[Unit]] = [[] for _ in range(turns)]
    costs = [0] * turns
    ordered = sorted(units, key=lambda unit: -unit.cost)
    for cost, equal in itertools.groupby(ordered, key=lambda unit: unit.cost):
        rest = list(equal)
        while rest:
            turn = costs.index(min(costs))
            hands[turn] += rest[:devices]
            costs[turn] += cost
            del rest[:devices]
    return tuple(tuple(hand) for hand in hands)
