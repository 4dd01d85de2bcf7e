"""One pass over the data: the matrices of every kind on every block, as far as they are needed.

For each batch and pass, the columns of a block (`statistics.per_example`) are projected where it
is large, and their outer products added up: nothing is ever as large as the block's matrix. The
whole network's columns are those of its blocks put together.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from curvature.comparison import projection
from curvature.comparison.compiled import compiled
from curvature.comparison.projection import PARTS, Projection
from curvature.comparison.result import WHOLE
from curvature.meshes import automatic, off_mesh, on_mesh
from curvature.precision import HIGHEST, accumulator
from curvature.statistics.kinds import Kind
from curvature.statistics.per_example import columns
from curvature.trace import Layer, Registry
from curvature.trace.analysis import Analysis

PyTree = Any
T = TypeVar("T")
_REPEATS = 8  # draws of signs for each of an estimate, where examples meet
_FEW = 20  # large layers; with more of them, eigendecompositions would take most of the time


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What is measured; equal plans share what has been compiled.

    Attributes:
      registry: what is in the model.
      kinds: by name.
      layers: the blocks; their examples can be told apart.
      whole: the names of those that the whole network is made of; empty for no such block.
      limit: the largest matrix that is made.
      memory: how large the columns of the layers that are taken together may be, in bytes.
    """

    registry: Registry
    kinds: Mapping[str, Kind]
    layers: tuple[Layer, ...]
    whole: tuple[str, ...]
    limit: int
    memory: int

    def _identity(self) -> tuple[Any, ...]:
        names = tuple(layer.name for layer in self.layers)
        kinds = tuple((name, _identity_of(kind)) for name, kind in self.kinds.items())
        return (id(self.registry), kinds, names, self.whole, self.limit, self.memory)

    def __hash__(self) -> int:
        return hash(self._identity())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self._identity() == other._identity()

    def projections(self, block: str) -> dict[str, Projection]:
        """The map of every layer of a block."""
        layers = [x for x in self.layers if x.name in (self.whole if block == WHOLE else (block,))]
        total = sum(layer.size for layer in layers)
        few = sum(layer.size > self.limit for layer in self.layers) <= _FEW
        dim = self.limit if few or block == WHOLE else self.limit // 2
        width = projection.width(total, self.limit, dim)
        starts = np.cumsum([0, *(layer.size for layer in layers)]).tolist()
        return {
            layer.name: Projection(start, layer.size, total, width)
            for layer, start in zip(layers, starts, strict=False)
        }

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of all blocks."""
        return (*((WHOLE,) if self.whole else ()), *(layer.name for layer in self.layers))

    @functools.cached_property
    def maps(self) -> dict[str, dict[str, Projection]]:
        """The projections of every block."""
        return {block: self.projections(block) for block in self.blocks}

    def dim(self, block: str) -> int:
        """The size of a block's matrices."""
        return next(iter(self.maps[block].values())).dim

    def groups(self, examples: int) -> list[tuple[str, ...]]:
        """The layers in groups whose columns fit into memory together; a layer is never split."""
        groups: list[list[str]] = [[]]
        used = 0
        for layer in self.layers:
            size = 4 * examples * layer.size
            if groups[-1] and used + size > self.memory:
                groups.append([])
                used = 0
            groups[-1].append(layer.name)
            used += size
        return [tuple(group) for group in groups]


def _identity_of(kind: Kind) -> Any:
    """What makes two kinds the same: their fields, or being one object where these are arrays."""
    try:
        hash(kind)
    except TypeError:
        return "one object", id(kind)
    return kind


def estimates(kind: Kind, layers: Sequence[Layer]) -> int:
    """How many independent estimates are made of a kind: one of what is exact."""
    mixed = any(layer.mixed for layer in layers)
    return PARTS if kind.needs_key(pooled=mixed) else 1


class Measurement:
    """The sums over the batches so far, each weighted by its share.

    Attributes:
      matrices: by kind and block, `(draws, dim, dim)`.
      gradient: by block, `(dim,)`.
      mass: the sum of the shares.
      examples: how many there were, as the loss has them: shares count rows of the first argument,
        which may be running statistics.
      batches: how many there were.
    """

    def __init__(self, plan: Plan, key: jax.Array) -> None:
        self.plan = plan
        self.signs = _signs(plan, key)
        self.matrices: dict[tuple[str, str], Any] = {}
        self.gradient: dict[str, Any] = {}
        self.loss, self.mass, self.batches = 0.0, 0.0, 0
        self._examples_of_share = 1.0

    def add(self, params: PyTree, args: tuple[PyTree, ...], share: float, key: jax.Array) -> None:
        """Adds a batch, or nothing where that fails."""
        loss, gradient = off_mesh(_compiled(self.plan, _gradient)(params, args, self.signs))
        if not math.isfinite(float(loss)):
            raise FloatingPointError(f"the loss is {float(loss)}")
        found: dict[tuple[str, str], jax.Array] = {}
        groups = self.plan.groups(max(layer.examples for layer in self.plan.layers))
        for i, name in enumerate(self.plan.kinds):
            whole: jax.Array | None = None
            for group in groups:
                folded = jax.random.fold_in(key, i)
                run = _compiled(self.plan, _group, name, group)
                matrices, part = off_mesh(run(params, args, folded, self.signs))
                found |= {(name, block): matrix for block, matrix in matrices.items()}
                if part is not None:
                    whole = part if whole is None else whole + part
            if whole is not None:
                found[name, WHOLE] = _outer(whole)
        while found:  # and let go of each
            where, matrix = found.popitem()
            self.matrices[where] = self.matrices.get(where, 0.0) + share * matrix
        for block, vector in gradient.items():
            self.gradient[block] = self.gradient.get(block, 0.0) + share * vector
        if not self.batches:
            count = self.plan.registry.analyse(params, args).losses[0].examples
            self._examples_of_share = count / share if count > 1 else 1.0
        self.loss += share * float(loss)
        self.mass += share
        self.batches += 1

    @property
    def examples(self) -> float:
        """See the class."""
        return self.mass * self._examples_of_share

    def matrix(self, kind: str, block: str) -> np.ndarray:
        """The mean over the data, `(draws, dim, dim)`."""
        return np.asarray(self.matrices[kind, block], np.float64) / self.mass

    def resolution(self, kind: str, block: str) -> float:
        """How small an eigenvalue can be, relative to the largest, before rounding hides it."""
        matrix = self.matrices[kind, block]
        return float(np.finfo(np.dtype(matrix.dtype)).eps) * matrix.shape[-1]

    def mean_gradient(self, block: str) -> np.ndarray:
        """The mean gradient, `(dim,)`."""
        return np.asarray(self.gradient[block], np.float64) / self.mass


class Signs(NamedTuple):
    """The random signs of all projections: `folds` by layer, `parts` by block."""

    folds: dict[str, jax.Array]
    parts: dict[str, jax.Array]


def _signs(plan: Plan, key: jax.Array) -> Signs:
    first, second = jax.random.split(key)

    def draw(key: jax.Array, i: int, *shape: int) -> jax.Array:
        return jax.random.rademacher(jax.random.fold_in(key, i), shape, jnp.int8)

    totals = {block: next(iter(maps.values())).total for block, maps in plan.maps.items()}
    return Signs(
        {layer.name: draw(first, i, layer.size) for i, layer in enumerate(plan.layers)},
        {
            block: draw(second, i, PARTS, projection.folded(total))
            for i, (block, total) in enumerate(totals.items())
        },
    )


def _compiled(plan: Plan, function: Callable[..., T], *fixed: Any) -> Callable[..., T]:
    """A function of the plan and other fixed arguments, compiled once for equal ones."""

    def make() -> Callable[..., T]:
        return jax.jit(functools.partial(function, plan, *fixed))

    return compiled(plan.registry, (function, plan, *fixed), make)


def _gradient(
    plan: Plan, params: PyTree, args: tuple[PyTree, ...], signs: Signs
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss, and its gradient on every block."""
    registry = plan.registry
    run = jax.value_and_grad(registry.loss_fn, has_aux=registry.has_aux)

    def projected(leaves: list[jax.Array], signs: Signs) -> dict[str, jax.Array]:
        flat = {layer.name: layer.gather(leaves).reshape((1, -1)) for layer in plan.layers}
        return {
            block: functools.reduce(
                jnp.add,
                (
                    project(flat[name], signs.folds[name], signs.parts[block])[0]
                    for name, project in maps.items()
                ),
            )
            for block, maps in plan.maps.items()
        }

    with on_mesh(params, args):
        out, tree = run(params, *args)
        gradient = automatic(projected, jax.tree.leaves(tree), signs)
    return out[0] if registry.has_aux else out, gradient


def _group(
    plan: Plan,
    kind_name: str,
    names: Sequence[str],
    params: PyTree,
    args: tuple[PyTree, ...],
    key: jax.Array,
    signs: Signs,
) -> tuple[dict[str, jax.Array], jax.Array | None]:
    """The matrices of some layers, `(draws, dim, dim)`, and their part of the whole's columns.

    The latter are of shape `(draws, columns, dim)`.
    """
    with on_mesh(params, args):
        return _grouped(plan, kind_name, names, params, args, key, signs)


def _grouped(
    plan: Plan,
    kind_name: str,
    names: Sequence[str],
    params: PyTree,
    args: tuple[PyTree, ...],
    key: jax.Array,
    signs: Signs,
) -> tuple[dict[str, jax.Array], jax.Array | None]:
    kind, analysis = plan.kinds[kind_name], plan.registry.analyse(params, args)
    whole = plan.maps.get(WHOLE, {})
    mixed = any(layer.mixed for layer in plan.layers)
    # Where examples meet, a column is the sum over all of them, with random signs: of many draws.
    repeats = _REPEATS if mixed and not kind.needs_key(pooled=False) else 1

    def one(total: dict[str, jax.Array], draw: PyTree) -> Any:
        found = columns(analysis, kind, params, args, draw, names)
        return automatic(added, total, found, signs)

    def added(total: dict[str, jax.Array], found: dict[str, jax.Array], signs: Signs) -> Any:
        flat = {name: x.reshape((x.shape[0], -1)) for name, x in found.items()}
        for name, x in flat.items():
            projected = plan.maps[name][name](x, signs.folds[name], signs.parts[name])
            total = total | {name: total[name] + _outer(projected)}
        if mixed:  # the whole network's columns are sums then, too
            flat = {name: x.sum(axis=0, keepdims=True) for name, x in flat.items()}
        parts = [
            whole[name](x, signs.folds[name], signs.parts[WHOLE])
            for name, x in flat.items()
            if name in whole
        ]
        return total, sum(parts[1:], start=parts[0]) if parts else None

    def estimate(draws: PyTree) -> Any:
        passes = jax.tree.leaves(draws)[0].shape[0]
        zeros = {
            layer.name: jnp.zeros([plan.dim(layer.name)] * 2, _dtype(analysis, layer, params))
            for layer in analysis.layers
            if layer.name in names
        }
        total, rows = jax.lax.scan(one, zeros, draws)
        scale = 1 / passes if kind.averaged else 1 / repeats
        if rows is not None:
            rows = rows.reshape((-1, rows.shape[-1])) * scale**0.5
        return {name: matrix * scale for name, matrix in total.items()}, rows

    def drawn(key: jax.Array) -> PyTree:
        if repeats == 1:
            return kind.draw(analysis.losses, key)
        draws = jax.vmap(lambda k: kind.draw(analysis.losses, k))(jax.random.split(key, repeats))
        return jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), draws)

    count = estimates(kind, plan.layers)
    if count == 1:
        return jax.tree.map(lambda x: x[None], estimate(kind.draw(analysis.losses, None)))
    return jax.lax.map(lambda k: estimate(drawn(k)), jax.random.split(key, count))


def _dtype(analysis: Analysis, layer: Layer, params: PyTree) -> Any:
    leaves = jax.tree.leaves(params)
    return accumulator(*(leaves[view.source].dtype for view in layer.leaves))


@jax.jit
def _outer(x: jax.Array) -> jax.Array:
    """The sum of x x' over rows."""
    return jnp.einsum("...ni,...nj->...ij", x, x, precision=HIGHEST)
