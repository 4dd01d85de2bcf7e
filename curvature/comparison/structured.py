"""Structured approximations (K-FAC, EKFAC, the diagonal) beside the blocks they approximate.

Their statistics are averaged over the batches, as an optimizer would with an infinite memory; the
corrections of EKFAC in the eigenbases of the averaged factors. For a block whose matrix was not
made, <A, K> = sum of s'K s over columns s of A, from a sample of them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvature.blocks import Block, Kronecker
from curvature.comparison.figures import Estimate, View, jackknife
from curvature.comparison.measure import Plan
from curvature.comparison.result import Figure, Structured
from curvature.estimator import Estimator
from curvature.estimator.columns import columns
from curvature.registry.layers import BLOCKS, EXCLUDED

PyTree = Any
Batches = Any  # a function that gives (args, share) of every batch, again and again
_PASSES, _EXAMPLES = 8, 8  # whose columns are sampled where a block's matrix is not made
_STUDENT = 2.365  # the 97.5 % quantile of Student's t with _PASSES - 1 degrees of freedom
_TINY = float(np.finfo(np.float64).tiny)


def approximations(
    plan: Plan, kind_name: str, block: str, params: PyTree, batches: Batches, key: jax.Array
) -> dict[str, Block]:
    """The blocks of all layers that can have this one, at the mean of the statistics."""
    estimator = _estimator(plan, kind_name, block)
    if not estimator.layers:
        return {}
    bases = None
    if block == "ekfac":
        factors = _mean(_estimator(plan, kind_name, "kronecker"), params, batches, key, None)
        start = {name: zeros | factors[name] for name, zeros in estimator.zeros().items()}
        bases = estimator.rebased(start, restart=True)
    return estimator.operator(_mean(estimator, params, batches, key, bases)).blocks


@functools.lru_cache(maxsize=64)  # what has been compiled goes with it
def _estimator(plan: Plan, kind_name: str, block: str) -> Estimator:
    """The estimator of the layers that can have a block; the others are excluded."""
    names = {layer.name for layer in plan.layers if block in BLOCKS[layer.kind]}
    registry = plan.registry.with_blocks(lambda x: block if x.name in names else EXCLUDED)
    return Estimator(registry, plan.kinds[kind_name])


def _mean(
    estimator: Estimator, params: PyTree, batches: Batches, key: jax.Array, bases: PyTree
) -> PyTree:
    """The mean of statistics over the data."""
    total, mass = None, 0.0
    for i, args, share in batches():
        found = _statistics(estimator, params, args, jax.random.fold_in(key, i), bases)
        found = jax.tree.map(lambda x, share=share: share * x, found)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        mass += share
    return jax.tree.map(lambda x: x / mass, total)


@functools.partial(jax.jit, static_argnums=0)
def _statistics(
    estimator: Estimator, params: PyTree, args: tuple[PyTree, ...], key: jax.Array, bases: PyTree
) -> PyTree:
    return estimator.statistics(params, *args, key=key, bases=bases)


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
            size / max(view.trace, _TINY),
            float(np.sum(matrix * view.matrix)) / max(norm * view.norm, _TINY),
            float(np.linalg.norm(matrix - view.matrix)) / max(view.norm, _TINY),
        ]

    trace, cosine, distance = jackknife(numbers, estimate)
    return Structured(trace, _within(cosine), distance._replace(value=max(distance.value, 0.0)))


def _within(cosine: Figure) -> Figure:
    return cosine._replace(value=min(max(cosine.value, -1.0), 1.0))


def beside_columns(estimate: Estimate, block: Block, samples: np.ndarray) -> Structured:
    """The same where the block's matrix was not made.

    Args:
      estimate: of the projected matrix: its trace and norm.
      block: the approximation.
      samples: the mean of s'K s over some columns s of a pass drawn at random, times the number
        of columns; for several passes.
    """
    size, norm = float(block.trace()), float(np.sqrt(_squared_norm(block)))
    inner, off = float(samples.mean()), float(samples.std(ddof=1) / len(samples) ** 0.5)

    def numbers(view: View) -> list[float]:
        squared = view.norm**2 - 2 * inner + norm**2
        return [
            size / max(view.trace, _TINY),
            inner / max(norm * view.norm, _TINY),
            max(squared, 0.0) ** 0.5 / max(view.norm, _TINY),
        ]

    trace, cosine, distance = jackknife(numbers, estimate, least=0.0)
    # The columns' error is independent of the projection's; to first order it enters like this.
    view = estimate.views[0]
    of_cosine = _STUDENT * off / max(norm * view.norm, _TINY)
    of_distance = of_cosine * norm / max(view.norm * distance.value, _TINY)
    return Structured(
        trace,
        _within(_wider(cosine, of_cosine)),
        _wider(distance, of_distance),
    )


def _wider(figure: Figure, error: float) -> Figure:
    return figure._replace(error=float(np.hypot(figure.error or 0.0, error)))


@jax.jit
def _squared_norm(block: Block) -> jax.Array:
    """|K|^2 in the Frobenius norm, without an eigendecomposition."""
    if isinstance(block, Kronecker):
        axes = tuple(range(block.stack_ndim, block.input.ndim))
        one = jnp.sum(block.input**2, axis=axes)
        axes = tuple(range(block.stack_ndim, block.output.ndim))
        return jnp.sum(one * jnp.sum(block.output**2, axis=axes))
    return jnp.sum(block.eigenvalues() ** 2)


def sampled(
    plan: Plan,
    kind_name: str,
    params: PyTree,
    batches: Batches,
    blocks: Mapping[str, Mapping[str, Block]],
    key: jax.Array,
) -> dict[tuple[str, str], np.ndarray]:
    """By approximation and layer, what `beside_columns` takes as `samples`.

    Args:
      plan: what is measured.
      kind_name: the kind whose columns they are.
      params: the parameters.
      batches: the data.
      blocks: approximations by name, then layer.
      key: random key.
    """
    weights = [share for _, _, share in batches()]
    count, mass = len(weights), sum(weights)
    each = -(-_PASSES // count)
    choosing, drawing = jax.random.split(key)
    chosen = set(jax.random.permutation(choosing, count)[:_PASSES].tolist())
    names = tuple(sorted({name for of_layers in blocks.values() for name in of_layers}))
    found: dict[tuple[str, str], list[float]] = {}
    for i, args, share in batches():
        if i not in chosen:
            continue
        for pass_key in jax.random.split(jax.random.fold_in(drawing, i), each):
            some, counts = _columns(plan, kind_name, names, params, args, pass_key)
            for approximation, of_layers in blocks.items():
                for name, block in of_layers.items():
                    inner = float(_mean_product(block, some[name])) * int(counts[name])
                    found.setdefault((approximation, name), []).append(inner * share * count / mass)
    return {where: np.array(values) for where, values in found.items()}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _columns(
    plan: Plan,
    kind_name: str,
    names: tuple[str, ...],
    params: PyTree,
    args: tuple[PyTree, ...],
    key: jax.Array,
) -> tuple[dict[str, jax.Array], dict[str, int]]:
    """A few columns of one pass, by layer; and how many columns there are in all passes."""
    kind, analysis = plan.kinds[kind_name], plan.registry.analyse(params, args)
    drawing, first, second = jax.random.split(key, 3)
    draws = kind.draw(analysis.losses, drawing if kind.needs_key(pooled=False) else None)
    passes = jax.tree.leaves(draws)[0].shape[0]
    chosen = jax.random.randint(first, (), 0, passes)
    draw = jax.tree.map(lambda d: d[chosen], draws)
    found = columns(analysis, kind, params, args, draw, names)
    some = {n: x[jax.random.permutation(second, len(x))[:_EXAMPLES]] for n, x in found.items()}
    return some, {n: len(x) * (1 if kind.averaged else passes) for n, x in found.items()}


@jax.jit
def _mean_product(block: Block, columns: jax.Array) -> jax.Array:
    """The mean of s'K s over columns s."""
    return jnp.mean(jax.vmap(lambda s: jnp.sum(s * (block @ s)))(columns))
