"""The blocks that layers can have: a line for each, and all that the rest has to know of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from curvature.blocks.block import Block
from curvature.blocks.dense import Dense
from curvature.blocks.diagonal import Diagonal
from curvature.blocks.eigen_kronecker import EigenKronecker
from curvature.blocks.identity import Identity
from curvature.blocks.kronecker import Kronecker

Statistics = Mapping[str, jax.Array]
Shape = tuple[int, ...]

_MATRICES = ("dense", "conv", "embedding")
_KNOWN = (*_MATRICES, "scale", "shift")
_ALL = (*_KNOWN, "generic")


def _everything(squares: jax.Array, depth: int) -> jax.Array:
    del depth
    return squares


@dataclasses.dataclass(frozen=True)
class BlockKind:
    """How a layer's curvature is kept.

    Attributes:
      layers: the kinds of layers that can have it.
      make: the block, from its statistics, the shape of its coordinates (`stack + ...`), and how
        many axes the stack has.
      factored: whether there are statistics of Kronecker factors, `input` and `output`.
      squares: whether there are `values`, sums over examples of their gradients' squares.
      summary: what is kept of such squares: a function of them and of the number of stack axes.
      outer: whether `values` are of outer products instead: matrices over flat coordinates.
    """

    layers: tuple[str, ...]
    make: Callable[[Statistics, Shape, int], Block]
    factored: bool = False
    squares: bool = True
    summary: Callable[[jax.Array, int], jax.Array] = _everything
    outer: bool = False

    def values_shape(self, shape: Shape, depth: int) -> Shape:
        """The shape of `values`, for block coordinates of a shape with a stack of `depth` axes."""
        if self.outer:
            size = math.prod(shape[depth:])
            return (*shape[:depth], size, size)
        squares = jax.ShapeDtypeStruct(shape, jnp.float32)
        kept: Shape = jax.eval_shape(lambda x: self.summary(x, depth), squares).shape
        return kept


def _factored(statistics: Statistics, shape: Shape, depth: int) -> Block:
    if "values" not in statistics:
        factors = statistics["input"], statistics["output"]
        return Kronecker(*factors, depth, sizes=(shape[-2], shape[-1]))
    bases = statistics["input_basis"], statistics["output_basis"]
    return EigenKronecker(*bases, statistics["values"], depth)


def _diagonal(statistics: Statistics, shape: Shape, depth: int) -> Block:
    del shape
    return Diagonal(statistics["values"], depth)


def _dense(statistics: Statistics, shape: Shape, depth: int) -> Block:
    return Dense(statistics["values"], shape, depth)


def _identity(statistics: Statistics, shape: Shape, depth: int) -> Block:
    return Identity(statistics["values"], shape, depth)


def _mean(squares: jax.Array, depth: int) -> jax.Array:
    return jnp.mean(squares, axis=tuple(range(depth, squares.ndim)))


_KRONECKER = BlockKind(_MATRICES, _factored, factored=True, squares=False)

BLOCKS: dict[str, BlockKind] = {
    "kronecker": _KRONECKER,
    "kronecker_reduce": _KRONECKER,
    "kronecker_weighted": _KRONECKER,
    "ekfac": BlockKind(_MATRICES, _factored, factored=True),
    "foof": _KRONECKER,
    "diagonal": BlockKind(_ALL, _diagonal),
    "dense": BlockKind(_KNOWN, _dense, outer=True),
    "identity": BlockKind(_ALL, _identity, summary=_mean),
}


def blocks_for(layer_kind: str) -> tuple[str, ...]:
    """The names of the blocks that a kind of layer can have."""
    return tuple(name for name, kind in BLOCKS.items() if layer_kind in kind.layers)
