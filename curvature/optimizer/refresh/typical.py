"""The typical curvature of a net: relative damping takes a share of it for a block's that is less.

Behind layers that start at zero (a head, the last layer of a residual block) cotangents are nearly
zero, and so is a block's curvature: its own mean alone would let the layer take steps of any
length, and the first of them spoil the net for the rest of the run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvature.block_diagonal import block_of
from curvature.blocks import Kronecker
from curvature.optimizer.refresh.schedule import SIDES
from curvature.sides import entries
from curvature.statistics.factors import Statistics, factors_of
from curvature.statistics.stacks import Arrays, Stack, copies_of, unweighted
from curvature.trace import Layer

_SHARE = 0.3  # measured, see docs/architecture.md


class Typical(NamedTuple):
    """What mean eigenvalues count for at least: a share of the mean over blocks, by their traces.

    Attributes:
      output: of the output factors of layers that have factors. The input factor of a table is
        small where its rows are rarely read, which is no reason to damp them.
      whole: of blocks.
    """

    output: jax.Array
    whole: jax.Array


def typical(layers: Iterable[Stack], statistics: Arrays, weight: jax.Array) -> Typical:
    """A share of the typical curvature; zero where there is none.

    Args:
      layers: stacks of layers.
      statistics: the averages of all statistics, times their weight.
      weight: that weight.
    """
    weight = jnp.where(weight > 0, weight, 1)
    outputs, wholes = [], []
    for layer in layers:
        found = factors_of(layer, unweighted(_diagonals(layer, statistics[layer.name]), weight))
        count = sum(map(copies_of, layer.members))  # what fills up a stack does not count
        size = jnp.where(jnp.arange(layer.shape[0]) < count, math.prod(layer.shape[1:]), 0)
        if layer.factored:
            inputs, output = kronecker_of(layer, found).mean_eigenvalues
            mean = inputs * output
            outputs.append((output, mean * size))
        else:
            diagonal = block_of(layer, found).diagonal()
            mean = jnp.mean(diagonal, axis=tuple(range(1, diagonal.ndim)))
        wholes.append((mean, mean * size))
    return Typical(_SHARE * _mean(outputs, weight), _SHARE * _mean(wholes, weight))


def _diagonals(layer: Stack, statistics: Statistics) -> Statistics:
    """Statistics with diagonals in the place of factors: nothing is read in every step but them."""
    sizes = dict(zip(SIDES, layer.shape[-2:], strict=True)) if layer.factored else {}

    def one(name: str, x: jax.Array) -> jax.Array:
        side = name.removesuffix("_flipped")
        return entries(x, sizes[side], 1) if side in sizes else x

    return {name: one(name, x) for name, x in statistics.items()}


def kronecker_of(layer: Layer, factors: Statistics) -> Kronecker:
    """The block A (x) B of a stack's factors."""
    sizes = layer.shape[-2], layer.shape[-1]
    return Kronecker(factors["input"], factors["output"], 1, sizes=sizes)


def _mean(pairs: Sequence[tuple[jax.Array, jax.Array]], like: jax.Array) -> jax.Array:
    """The mean of values with weights, whose products may be too large for their dtype."""
    tops = (jnp.max(weights).astype(like.dtype) for _, weights in pairs)
    top = functools.reduce(jnp.maximum, tops, jnp.zeros_like(like))
    total, weight = jnp.zeros_like(like), jnp.zeros_like(like)
    for values, weights in pairs:
        share = weights.astype(like.dtype) / jnp.where(top > 0, top, 1)
        total += jnp.sum(values.astype(like.dtype) * share)
        weight += jnp.sum(share)
    return total / jnp.where(weight > 0, weight, 1)
