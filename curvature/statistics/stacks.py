"""Layers of one shape as one layer, with all their copies along one axis.

An optimizer keeps its state by stacks: one batched product, factorisation or change of basis does
for all layers of a shape, so that what is compiled for a step does not grow with depth, and copies
can be taken a few at a time or dealt to devices. Only gathering gradients and statistics, and
scattering updates, go layer by layer.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from curvature.block_diagonal import BlockDiagonal
from curvature.meshes import devices, divided, whole
from curvature.precision import accumulator
from curvature.sides import unit
from curvature.statistics.eigenbasis import BASES
from curvature.statistics.estimator import Estimator, operator_of
from curvature.statistics.factors import Statistics
from curvature.trace.layers import Layer
from curvature.trace.views import Shape, View

Arrays = dict[str, Statistics]
"""By stack, then by name."""


@dataclasses.dataclass(frozen=True)
class Stack(Layer):
    """Layers with the same block and shape.

    Its block coordinates are theirs one after another, `(copies,) + shape of one copy`; copies that
    a layer has in a stack of its own (scanned ones, experts) are among them.

    Attributes:
      members: the layers.
      over: how copies are divided over devices, which are then as many more as divides them
        equally; None where every device has all.
    """

    members: tuple[Layer, ...] = ()
    over: NamedSharding | None = None

    @classmethod
    def of(cls, members: Sequence[Layer], over: NamedSharding | None = None) -> Stack:
        """The stack of some layers; of one, it has its name."""
        first, others = members[0], len(members) - 1
        fields = {x.name: getattr(first, x.name) for x in dataclasses.fields(first)}
        fields |= {
            "name": f"{first.name} (+{others})" if others else first.name,
            "parameters": tuple(path for layer in members for path in layer.parameters),
            "views": tuple(view for layer in members for view in layer.views),
        }
        count = sum(map(copies_of, members))
        fields["stack"] = (count + -count % devices(over),)
        return cls(**fields, members=tuple(members), over=over)

    @property
    def leaves(self) -> tuple[View, ...]:
        """One view for each of `parameters`."""
        return tuple(view for layer in self.members for view in layer.leaves)

    @property
    def bias(self) -> bool:
        """Whether the last row of every copy is a bias."""
        return self.members[0].bias

    @property
    def shape(self) -> Shape:
        """The shape of the block coordinates."""
        return (*self.stack, *copy_shape(self.members[0]))

    def gather(self, leaves: Sequence[jax.Array] | Mapping[int, jax.Array]) -> jax.Array:
        """The block coordinates of all members, from the leaves of a tree; zero beyond them."""
        joined = self._joined([layer.gather(leaves) for layer in self.members])
        return self._filled(joined, jnp.zeros_like)

    def scatter(self, block: jax.Array) -> dict[int, jax.Array]:
        """Leaf-shaped arrays by leaf; zero outside the members' views."""
        found: dict[int, jax.Array] = {}
        parts = self.split(whole(block, self.over))
        for layer, part in zip(self.members, parts, strict=True):
            for leaf, x in layer.scatter(part).items():
                found[leaf] = found[leaf] + x if leaf in found else x
        return found

    def joined(self, name: str, arrays: Sequence[jax.Array]) -> jax.Array:
        """One of the members' statistics; beyond them, those of the identity."""
        found = self._joined(arrays)
        matrix = name in BASES or self.outer or not name.startswith("values")

        def one(like: Any) -> jax.Array:
            return unit(like, 0) if matrix and found.ndim > 1 else jnp.ones_like(like)

        return self._filled(found, one)

    def _filled(self, array: jax.Array, one: Callable[[Any], jax.Array]) -> jax.Array:
        """An array with all copies, and others to divide over devices, like one of these."""
        missing = self.stack[0] - len(array)
        if missing:
            more = one(jax.ShapeDtypeStruct(array.shape[1:], array.dtype))
            array = jnp.concatenate([array, jnp.broadcast_to(more, (missing, *more.shape))])
        # From whole arrays: what the compiler finds between two divisions is many times dearer.
        return divided(whole(array, self.over), self.over)

    def _joined(self, arrays: Sequence[jax.Array]) -> jax.Array:
        """An array of each member, whose first axes are its own stack's, along one axis."""
        pairs = zip(self.members, arrays, strict=True)
        flat = [x.reshape(copies_of(layer), *x.shape[len(layer.stack) :]) for layer, x in pairs]
        return flat[0] if len(flat) == 1 else jnp.concatenate(flat)

    def split(self, array: jax.Array) -> list[jax.Array]:
        """Each member's part of an array with all copies along its first axis."""
        parts, start = [], 0
        for layer in self.members:
            stop = start + copies_of(layer)
            parts.append(array[start:stop].reshape(*layer.stack, *array.shape[1:]))
            start = stop
        return parts


def stacks(
    layers: Sequence[Layer],
    params: Any,
    *,
    alone: bool = False,
    over: NamedSharding | None = None,
) -> tuple[Stack, ...]:
    """The stacks of some layers, in the order of their first members.

    Args:
      layers: the layers.
      params: the parameters, or their shapes.
      alone: whether every layer is a stack of its own.
      over: how copies are divided over devices.
    """
    leaves = jax.tree.leaves(params)
    found: dict[Hashable, list[Layer]] = {}
    for layer in layers:
        dtype = accumulator(*(leaves[view.source].dtype for view in layer.leaves))
        kind = (layer.block, layer.one_hot, layer.flipped, copy_shape(layer), dtype)
        found.setdefault(layer.name if alone else kind, []).append(layer)
    return tuple(Stack.of(members, over) for members in found.values())


@dataclasses.dataclass(frozen=True, eq=False)
class Stacks:
    """The layers of an estimator by stacks, and their statistics.

    Attributes:
      estimator: whose layers.
      alone: whether every layer is a stack of its own.
      over: how copies are divided over devices; None where every device has all.
    """

    estimator: Estimator
    alone: bool = False
    over: NamedSharding | None = None

    @functools.cached_property
    def layers(self) -> tuple[Stack, ...]:
        """The stacks."""
        return self.of(self.estimator.layers)

    def of(self, layers: Sequence[Layer]) -> tuple[Stack, ...]:
        """The stacks of some layers of the registry."""
        return stacks(layers, self.estimator.registry.params, alone=self.alone, over=self.over)

    def zeros(self) -> Arrays:
        """Statistics of nothing."""
        return self.together(self.estimator.zeros())

    def together(self, arrays: Mapping[str, Statistics]) -> Arrays:
        """Arrays by stack, from those by layer."""
        return {
            stack.name: {
                name: stack.joined(name, [arrays[layer.name][name] for layer in stack.members])
                for name in arrays[stack.members[0].name]
            }
            for stack in self.layers
        }

    def apart(self, arrays: Arrays) -> dict[str, Statistics]:
        """Arrays by layer, from those of some stacks."""
        found: dict[str, Statistics] = {}
        for stack in self.layers:
            for name, array in arrays.get(stack.name, {}).items():
                parts = stack.split(whole(array, stack.over))
                for layer, part in zip(stack.members, parts, strict=True):
                    found.setdefault(layer.name, {})[name] = part
        return found

    def operator(self, statistics: Arrays) -> BlockDiagonal:
        """The operator made from (averages of) statistics by stack, or from blocks' arrays."""
        return operator_of(self.layers, statistics, self.estimator.registry.params)


def unweighted(statistics: Statistics, weight: jax.Array) -> Statistics:
    """A stack's statistics from their averages times a weight; bases are no averages."""
    return {k: x if k in BASES else x / weight.astype(x.dtype) for k, x in statistics.items()}


def in_full(kept: Statistics, statistics: Statistics) -> Statistics:
    """What is kept of a stack, in the dtype of its statistics."""
    dtype = next(iter(statistics.values())).dtype
    return {name: x.astype(dtype) for name, x in kept.items()}


def copies_of(layer: Layer) -> int:
    """How many copies there are in a layer's own stack."""
    return math.prod(layer.stack)


def copy_shape(layer: Layer) -> Shape:
    """The shape of one copy's block coordinates."""
    return layer.shape[len(layer.stack) :]
