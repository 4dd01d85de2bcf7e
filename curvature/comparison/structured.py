"""Structured approximations (K-FAC, EKFAC, the diagonal) beside the blocks they approximate.

Their statistics are averaged over the batches, as an optimizer would with an infinite memory; the
corrections of EKFAC in the eigenbases of the averaged factors.

A block too large for its matrix A to be made is compared all the same: an approximation K is
diagonal in a basis Q that is known, so <A, K> needs the diagonal of A in that basis and no more.
With k the eigenvalues of K, <A, K> = <k, m>, where m = sum_n (Q' s_n)^2 over the columns s_n of A
are the corrections that EKFAC makes (George et al. 2018): a few backward passes, and exact.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from curvature.blocks import (
    BLOCKS,
    Block,
    Diagonal,
    EigenKronecker,
    Identity,
    Kronecker,
    blocks_for,
)
from curvature.comparison.accumulate import Plan, estimates
from curvature.comparison.compiled import compiled
from curvature.comparison.estimates import TINY, Estimate, View, jackknife
from curvature.comparison.result import Figure, Structured
from curvature.linalg import eigh
from curvature.meshes import off_mesh
from curvature.precision import HIGHEST
from curvature.statistics import Estimator
from curvature.statistics.eigenbasis import BASES
from curvature.statistics.factors import Statistics, counted, factors_of
from curvature.trace.layers import EXCLUDED

PyTree = Any
T = TypeVar("T")
Batches = Callable[[], Iterator[tuple[int, tuple[PyTree, ...], float]]]  # number, args, share
NAMES = tuple(name for name, kind in BLOCKS.items() if not kind.outer)
_SQUARES = tuple(name for name in NAMES if BLOCKS[name].squares)
_STUDENT = 2.776  # the 97.5 % quantile of Student's t with one degree of freedom less than draws


class Moments(NamedTuple):
    """An approximation K in its eigenbasis, and what is on the diagonal of the block A there.

    Attributes:
      eigenvalues: of K.
      draws: the diagonal of A, once if it is exact, else from each of several draws.
      multiplicity: how often each eigenvalue occurs.
    """

    eigenvalues: np.ndarray
    draws: list[np.ndarray]
    multiplicity: int

    @property
    def trace(self) -> float:
        """The trace of K."""
        return self.multiplicity * float(self.eigenvalues.sum())

    @property
    def norm(self) -> float:
        """The Frobenius norm of K."""
        return math.sqrt(self.multiplicity) * float(np.linalg.norm(self.eigenvalues))

    @property
    def inner(self) -> Figure:
        """<A, K>."""
        return self._mean([self.multiplicity * np.vdot(self.eigenvalues, m) for m in self.draws])

    @property
    def trace_of_block(self) -> Figure:
        """The trace of A."""
        return self._mean([self.multiplicity * m.sum() for m in self.draws])

    @staticmethod
    def _mean(found: list[float]) -> Figure:
        if len(found) == 1:
            return Figure(float(found[0]))
        off = np.std(found, ddof=1) / math.sqrt(len(found))
        return Figure(float(np.mean(found)), _STUDENT * float(off))


class Approximations:
    """The approximations of one kind of curvature, of all layers that can have them.

    They are those of draw 0 of the kind's targets; others are independent of it.
    """

    def __init__(
        self, plan: Plan, kind_name: str, params: PyTree, batches: Batches, key: jax.Array
    ) -> None:
        self._plan, self._kind_name = plan, kind_name
        self._params, self._batches, self._key = params, batches, key
        self._sizes = {layer.name: layer.size for layer in plan.layers}
        count = estimates(plan.kinds[kind_name], plan.layers)
        self._draws = range(1, 1 + count) if count > 1 else range(1)
        self._made: dict[tuple[Any, ...], Any] = {}  # what several approximations need

    def blocks(self, name: str) -> dict[str, Block]:
        """The blocks of one approximation, by layer.

        Where examples meet, those of squared gradients are one draw, too noisy to compare.
        """
        noisy = {x.name for x in self._plan.layers if x.mixed} if name in _SQUARES else set()
        return {layer: block for layer, block in self._blocks(name).items() if layer not in noisy}

    def _blocks(self, name: str) -> dict[str, Block]:
        estimator = self._estimator(name)
        if not estimator.layers:
            return {}
        if name != "ekfac":
            return estimator.operator(self._statistics(name, 0)).blocks
        bases, values = self._bases("kronecker"), self._diagonals("kronecker", 0)
        return estimator.operator({n: bases[n] | {"values": values[n]} for n in bases}).blocks

    def moments(self, name: str, layer: str, block: Block) -> Moments:
        """A block of one approximation in its eigenbasis."""
        basis = "kronecker" if name == "ekfac" else name
        values = self._eigenvalues(name, layer, block)
        draws = (self._diagonals(basis, draw)[layer] for draw in self._draws)
        return Moments(
            np.asarray(values, np.float64),
            [np.asarray(diagonal, np.float64) for diagonal in draws],
            self._sizes[layer] // values.size,
        )

    def _eigenvalues(self, name: str, layer: str, block: Block) -> jax.Array:
        """Those of a block, in the order of `_diagonals`."""
        if isinstance(block, Kronecker):
            first, second = (self._bases(name)[layer][basis] for basis in BASES)
            a = _diagonal_in(first, block.input, block.stack_ndim)
            b = _diagonal_in(second, block.output, block.stack_ndim)
            return a[..., :, None] * b[..., None, :]
        assert isinstance(block, EigenKronecker | Diagonal | Identity)
        return block.values

    def _diagonals(self, name: str, draw: int) -> dict[str, jax.Array]:
        """What is on the diagonals of the exact blocks, in the eigenbasis of an approximation."""

        def make() -> dict[str, jax.Array]:
            if BLOCKS[name].factored:
                found = self._mean("ekfac", draw, self._bases(name))
            else:
                found = self._statistics(name, draw)
            return {layer: statistics["values"] for layer, statistics in found.items()}

        return self._once(("diagonals", name, draw), make)

    def _bases(self, name: str) -> dict[str, Statistics]:
        """The eigenbases of an approximation's Kronecker factors, in the shapes of EKFAC's."""

        def make() -> dict[str, Statistics]:
            found, zeros = self._statistics(name, 0), self._estimator("ekfac").zeros()
            factors = {
                layer.name: factors_of(layer, found[layer.name])
                for layer in self._estimator(name).layers
            }
            return {layer: _eigenbases(factors[layer], zeros[layer]) for layer in zeros}

        return self._once(("bases", name), make)

    def _statistics(self, name: str, draw: int) -> dict[str, Statistics]:
        return self._once((name, draw), lambda: self._mean(name, draw, None))

    def _once(self, what: tuple[Any, ...], make: Callable[[], T]) -> T:
        if what not in self._made:
            self._made[what] = make()
        found: T = self._made[what]
        return found

    def _estimator(self, name: str) -> Estimator:
        plan, kind_name = self._plan, self._kind_name
        what = (_estimator, plan, kind_name, name)
        return compiled(plan.registry, what, lambda: _estimator(plan, kind_name, name))

    def _mean(
        self, name: str, draw: int, bases: Mapping[str, Statistics] | None
    ) -> dict[str, Statistics]:
        """The mean of statistics over the data."""
        total, mass = None, 0.0
        estimator, key = self._estimator(name), jax.random.fold_in(self._key, draw)
        run = compiled(
            self._plan.registry,
            (_statistics, estimator),
            lambda: jax.jit(functools.partial(_statistics, estimator)),
        )
        for i, args, share in self._batches():
            folded = jax.random.fold_in(key, i)
            found = off_mesh(run(self._params, args, folded, bases))
            found = {
                layer.name: counted(layer, found[layer.name], share) for layer in estimator.layers
            }
            total = found if total is None else jax.tree.map(jnp.add, total, found)
            mass += share
        mean: dict[str, Statistics] = jax.tree.map(lambda x: x / mass, total)
        return mean


def _estimator(plan: Plan, kind_name: str, name: str) -> Estimator:
    """The estimator of the layers that can have a block; the others are excluded."""
    names = {layer.name for layer in plan.layers if name in blocks_for(layer.kind)}
    registry = plan.registry.with_blocks(lambda x: name if x.name in names else EXCLUDED)
    return Estimator(registry, plan.kinds[kind_name])


def _statistics(
    estimator: Estimator, params: PyTree, args: tuple[PyTree, ...], key: jax.Array, bases: PyTree
) -> dict[str, Statistics]:
    return estimator.statistics(params, *args, key=key, bases=bases)


def _eigenbases(factors: Statistics, zeros: Statistics) -> Statistics:
    """The eigenvectors of both factors; the coordinates, as `zeros` has them, of diagonal ones."""
    full = zeros["values"].ndim
    sides = {basis: factors[side] for side, basis in zip(("input", "output"), BASES, strict=True)}
    return {
        basis: eigh(factor)[1] if factor.ndim == full else zeros[basis]
        for basis, factor in sides.items()
    }


def _diagonal_in(basis: jax.Array, factor: jax.Array, stack_ndim: int) -> jax.Array:
    """What is on the diagonal of a factor in its basis; a diagonal factor is that itself."""
    if factor.ndim == stack_ndim + 1:
        return factor
    return jnp.sum(jnp.matmul(factor, basis, precision=HIGHEST) * basis, axis=-2)


def dense(block: Block) -> np.ndarray:
    """A block's matrix on row-major flattened coordinates, copies on the diagonal."""
    found = np.asarray(block.to_dense(), np.float64)
    size = found.shape[-1]
    copies = found.reshape((-1, size, size))
    whole = np.zeros((len(copies) * size,) * 2)
    for i, copy in enumerate(copies):
        whole[i * size : (i + 1) * size, i * size : (i + 1) * size] = copy
    return whole


def beside(estimate: Estimate, block: Block) -> Structured:
    """The figures of an approximation of a block whose matrix was made."""
    matrix = dense(block)
    size, norm = float(np.trace(matrix)), float(np.linalg.norm(matrix))

    def numbers(view: View) -> list[float]:
        return [
            size / max(view.trace, TINY),
            float(np.sum(matrix * view.matrix)) / max(norm * view.norm, TINY),
            float(np.linalg.norm(matrix - view.matrix)) / max(view.norm, TINY),
        ]

    trace, cosine, distance = jackknife(numbers, estimate)
    return Structured(trace, _within(cosine), distance._replace(value=max(distance.value, 0.0)))


def _within(cosine: Figure) -> Figure:
    return cosine._replace(value=min(max(cosine.value, -1.0), 1.0))


def beside_moments(estimate: Estimate, moments: Moments) -> Structured:
    """The same where the matrix was not made: `estimate` is of its projection."""
    norm, inner, trace = moments.norm, moments.inner, moments.trace_of_block

    def numbers(view: View) -> list[float]:
        squared = view.norm**2 - 2 * inner.value + norm**2
        return [
            inner.value / max(norm * view.norm, TINY),
            max(squared, 0.0) ** 0.5 / max(view.norm, TINY),
        ]

    cosine, distance = jackknife(numbers, estimate, least=0.0)
    ratio = moments.trace / max(trace.value, TINY)
    trace_ratio = Figure(ratio, trace.error and ratio * trace.error / max(trace.value, TINY))
    # The moments' error is independent of the projection's; to first order it enters like this.
    size = estimate.whole.norm
    of_cosine = (inner.error or 0.0) / max(norm * size, TINY)
    of_distance = of_cosine * norm / max(size * distance.value, TINY)
    return Structured(
        trace_ratio, _within(_wider(cosine, of_cosine)), _wider(distance, of_distance)
    )


def _wider(figure: Figure, error: float) -> Figure:
    return figure._replace(error=float(np.hypot(figure.error or 0.0, error)))
