"""The whole model's curvature: one block for each layer, acting on parameter trees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from curvature.blocks.block import Block
from curvature.blocks.diagonal import Diagonal
from curvature.blocks.kronecker import Kronecker
from curvature.registry import Layer

PyTree = Any


def block_of(layer: Layer, statistics: dict[str, jax.Array]) -> Block:
    """The block of a layer from its statistics (see `Estimator.statistics`)."""
    kind = Kronecker if layer.block == "kronecker" else Diagonal
    return kind(**statistics, stack_ndim=len(layer.stack))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockDiagonal:
    """A block-diagonal linear operator on trees of the parameters' structure.

    Results have the structure and dtypes of the tree that was given.

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
        """The blocks' arrays by layer and field, the layout of `Estimator.statistics`."""
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
        return sum((b.trace() for b in self.blocks.values()), start=jnp.zeros(()))

    def logdet(self, damping: ArrayLike = 0.0) -> jax.Array:
        """Log det(G + damping I); -inf for a singular G without damping."""
        return sum((b.logdet(damping) for b in self.blocks.values()), start=jnp.zeros(()))

    def eigenvalues(self) -> jax.Array:
        """All eigenvalues, ascending."""
        parts = [block.eigenvalues().ravel() for block in self.blocks.values()]
        dtype = jnp.result_type(*parts)
        return jnp.sort(jnp.concatenate([p.astype(dtype) for p in parts]))

    def diagonal(self) -> PyTree:
        """The diagonal, as a tree."""
        leaves: list[Any] = [None] * self.structure.num_leaves
        for layer in self.layers:
            for leaf, part in layer.scatter(self.blocks[layer.name].diagonal()).items():
                leaves[leaf] = part if leaves[leaf] is None else leaves[leaf] + part
        return jax.tree.unflatten(self.structure, leaves)

    def _map(self, apply: Callable[[Block, jax.Array], jax.Array], tree: PyTree) -> PyTree:
        leaves, structure = jax.tree.flatten(tree)
        if structure != self.structure:
            raise ValueError(
                f"The operator acts on trees of the parameters' structure {self.structure}, "
                f"found {structure}."
            )
        out: list[Any] = [None] * len(leaves)
        for layer in self.layers:
            v = layer.gather(leaves)
            v = v.astype(jnp.promote_types(v.dtype, jnp.float32))
            for leaf, part in layer.scatter(apply(self.blocks[layer.name], v)).items():
                part = part.astype(leaves[leaf].dtype)
                out[leaf] = part if out[leaf] is None else out[leaf] + part
        return jax.tree.unflatten(structure, out)
