"""The whole model's curvature: one block for each layer, acting on parameter trees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from curvature.blocks import BLOCKS, Block
from curvature.meshes import automatic, on_mesh
from curvature.precision import accumulator
from curvature.trace import Layer
from curvature.trees import difference

PyTree = Any
T = TypeVar("T")


def block_of(layer: Layer, statistics: dict[str, jax.Array]) -> Block:
    """The block of a layer from its statistics (see `Estimator.statistics`)."""
    return BLOCKS[layer.block].make(statistics, layer.shape, len(layer.stack))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockDiagonal:
    """A block-diagonal linear operator on trees of the parameters' structure.

    Results have the structure and dtypes of the tree that was given; of whole numbers they are
    floats, and complex if any of its leaves is. Excluded parameters are
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
        return self._map(lambda block, v, damping: block.solve(v, damping), tree, damping)

    def power(self, tree: PyTree, p: float, damping: ArrayLike = 0.0) -> PyTree:
        """(G + damping I)^p v, exactly for the block-diagonal G."""
        return self._map(lambda block, v, damping: block.power(v, p, damping), tree, damping)

    def damped_inverse(self, damping: ArrayLike) -> BlockDiagonal:
        """An operator close to (G + damping I)^-1, cheap to make and apply; see the blocks'."""

        def inverses(blocks: dict[str, Block], damping: ArrayLike) -> dict[str, Block]:
            return {name: block.damped_inverse(damping) for name, block in blocks.items()}

        return dataclasses.replace(self, blocks=self._of_blocks(inverses, damping))

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
        return self._of_blocks(lambda blocks: _total([b.trace() for b in blocks.values()]))

    def logdet(self, damping: ArrayLike = 0.0) -> jax.Array:
        """Log det(G + damping I); -inf for a singular G without damping."""

        def logdet(blocks: dict[str, Block], damping: ArrayLike) -> jax.Array:
            return _total([block.logdet(damping) for block in blocks.values()])

        return self._of_blocks(logdet, damping)

    def eigenvalues(self) -> jax.Array:
        """All eigenvalues, ascending."""

        def values(blocks: dict[str, Block]) -> jax.Array:
            parts = [block.eigenvalues().ravel() for block in blocks.values()]
            return jnp.sort(jnp.concatenate(_alike(parts))) if parts else jnp.zeros((0,))

        return self._of_blocks(values)

    def diagonal(self) -> PyTree:
        """The diagonal, as a tree of the parameters' structure; None for excluded parameters."""

        def leaves(blocks: dict[str, Block]) -> list[jax.Array | None]:
            return self._scatter([blocks[layer.name].diagonal() for layer in self.layers])

        return jax.tree.unflatten(self.structure, self._of_blocks(leaves))

    def _map(self, apply: Callable[..., jax.Array], tree: PyTree, *rest: ArrayLike) -> PyTree:
        leaves, structure = jax.tree.flatten(tree)
        differs = difference(
            tree, jax.tree.unflatten(self.structure, [0] * self.structure.num_leaves)
        )
        if differs is not None:
            raise ValueError(f"The operator acts on trees like the parameters: {differs}.")
        self._check_shapes(leaves)
        if any(jnp.iscomplexobj(leaf) for leaf in leaves):
            real, imag = (jax.tree.map(part, tree) for part in (jnp.real, jnp.imag))
            both = self._map(apply, real, *rest), self._map(apply, imag, *rest)
            return jax.tree.map(lambda *xs: jax.lax.complex(*_alike(list(xs))), *both)
        # A product of whole numbers is none.
        leaves = [v if _inexact(v) else jnp.asarray(v, float) for v in leaves]

        def applied(
            blocks: dict[str, Block], leaves: list[jax.Array], *rest: ArrayLike
        ) -> list[jax.Array]:
            parts = [apply(blocks[x.name], x.gather(leaves), *rest) for x in self.layers]
            pairs = zip(self._scatter(parts), leaves, strict=True)
            return [jnp.zeros_like(v) if x is None else x.astype(v.dtype) for x, v in pairs]

        with on_mesh(leaves, self.blocks):
            out = automatic(applied, self.blocks, leaves, *rest, like=leaves)
        return jax.tree.unflatten(structure, out)

    def _of_blocks(self, function: Callable[..., T], *rest: ArrayLike) -> T:
        with on_mesh(self.blocks):
            return automatic(function, self.blocks, *rest)

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


def _inexact(leaf: jax.Array) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _alike(parts: list[jax.Array]) -> list[jax.Array]:
    dtype = accumulator(*(p.dtype for p in parts))
    return [p.astype(dtype) for p in parts]


def _total(parts: list[jax.Array]) -> jax.Array:
    return jnp.sum(jnp.stack(_alike(parts))) if parts else jnp.zeros(())
