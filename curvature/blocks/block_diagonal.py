"""The whole model's curvature: one block for each layer, acting on parameter trees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from curvature.blocks.block import Block
from curvature.blocks.dense import Dense
from curvature.blocks.diagonal import Diagonal
from curvature.blocks.eigen_kronecker import EigenKronecker
from curvature.blocks.identity import Identity
from curvature.blocks.kronecker import Kronecker
from curvature.precision import accumulator
from curvature.registry import Layer
from curvature.trees import difference

PyTree = Any


def block_of(layer: Layer, statistics: dict[str, jax.Array]) -> Block:
    """The block of a layer from its statistics (see `Estimator.statistics`)."""
    depth = len(layer.stack)
    if layer.factored and "values" in statistics:  # in an eigenbasis
        fields = ("input_basis", "output_basis", "values")
        return EigenKronecker(**{name: statistics[name] for name in fields}, stack_ndim=depth)
    if layer.factored:
        return Kronecker(**statistics, stack_ndim=depth)
    if layer.block == "dense":
        return Dense(**statistics, shape=layer.shape, stack_ndim=depth)
    if layer.block == "identity":
        return Identity(**statistics, shape=layer.shape, stack_ndim=depth)
    return Diagonal(**statistics, stack_ndim=depth)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockDiagonal:
    """A block-diagonal linear operator on trees of the parameters' structure.

    Results have the structure and dtypes of the tree that was given. Excluded parameters are
    outside the operator: zero in results.

    Attributes:
      blocks: the block of each layer, by name.
      layers: the layers, in the same order.
      structure: the tree structure of the parameters.
    """

    blocks: dict[str, Block]
    layers: tuple[Layer, ...] = dataclasses.field(metadata={"static": True})
    structure: Any = dataclasses.field(metadata={"static": True})

    def __matmul__(self, tree: PyTree) -> PyTree:
        """G v for a parameter-shaped tree v."""
        return self._map(lambda block, v: block @ v, tree)

    def solve(self, tree: PyTree, damping: ArrayLike = 0.0) -> PyTree:
        """(G + damping I)^-1 v, exactly for the block-diagonal G."""
        return self._map(lambda block, v: block.solve(v, damping), tree)

    def power(self, tree: PyTree, p: float, damping: ArrayLike = 0.0) -> PyTree:
        """(G + damping I)^p v, exactly for the block-diagonal G."""
        return self._map(lambda block, v: block.power(v, p, damping), tree)

    def damped_inverse(self, damping: ArrayLike) -> BlockDiagonal:
        """An operator close to (G + damping I)^-1, cheap to make and apply; see the blocks'."""
        inverses = {name: block.damped_inverse(damping) for name, block in self.blocks.items()}
        return dataclasses.replace(self, blocks=inverses)

    def arrays(self) -> dict[str, dict[str, jax.Array]]:
        """The blocks' arrays by layer and field; `Estimator.operator` takes them as statistics."""
        return {
            name: {
                field.name: getattr(block, field.name)
                for field in dataclasses.fields(cast(Any, block))
                if not field.metadata.get("static")
            }
            for name, block in self.blocks.items()
        }

    def trace(self) -> jax.Array:
        """The trace."""
        return _total([block.trace() for block in self.blocks.values()])

    def logdet(self, damping: ArrayLike = 0.0) -> jax.Array:
        """Log det(G + damping I); -inf for a singular G without damping."""
        return _total([block.logdet(damping) for block in self.blocks.values()])

    def eigenvalues(self) -> jax.Array:
        """All eigenvalues, ascending."""
        parts = [block.eigenvalues().ravel() for block in self.blocks.values()]
        return jnp.sort(jnp.concatenate(_alike(parts))) if parts else jnp.zeros((0,))

    def diagonal(self) -> PyTree:
        """The diagonal, as a tree of the parameters' structure; None for excluded parameters."""
        leaves = self._scatter([self.blocks[layer.name].diagonal() for layer in self.layers])
        return jax.tree.unflatten(self.structure, leaves)

    def _map(self, apply: Callable[[Block, jax.Array], jax.Array], tree: PyTree) -> PyTree:
        leaves, structure = jax.tree.flatten(tree)
        differs = difference(tree, jax.tree.unflatten(self.structure, [0] * len(leaves)))
        if differs is not None:
            raise ValueError(f"The operator acts on trees like the parameters: {differs}.")
        self._check_shapes(leaves)
        parts = [apply(self.blocks[layer.name], layer.gather(leaves)) for layer in self.layers]
        out = self._scatter(parts)
        pairs = zip(out, leaves, strict=True)
        return jax.tree.unflatten(
            structure,
            [jnp.zeros_like(v) if x is None else x.astype(v.dtype) for x, v in pairs],
        )

    def _check_shapes(self, leaves: Sequence[jax.Array]) -> None:
        for layer in self.layers:
            for path, view in zip(layer.parameters, layer.leaves, strict=True):
                shape = tuple(leaves[view.source].shape)
                if shape != view.source_shape:
                    raise ValueError(
                        f"The tree's {path} has shape {list(shape)}, expected that of the "
                        f"parameter, {list(view.source_shape)}."
                    )

    def _scatter(self, parts: Sequence[jax.Array]) -> list[jax.Array | None]:
        """Leaves from the block coordinates of every layer; None for excluded parameters."""
        leaves: list[Any] = [None] * self.structure.num_leaves
        for layer, part in zip(self.layers, parts, strict=True):
            for leaf, x in layer.scatter(part).items():
                leaves[leaf] = x if leaves[leaf] is None else leaves[leaf] + x
        return leaves


def _alike(parts: list[jax.Array]) -> list[jax.Array]:
    dtype = accumulator(*(p.dtype for p in parts))
    return [p.astype(dtype) for p in parts]


def _total(parts: list[jax.Array]) -> jax.Array:
    return jnp.sum(jnp.stack(_alike(parts))) if parts else jnp.zeros(())
