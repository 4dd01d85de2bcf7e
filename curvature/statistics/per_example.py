"""Columns of a square root of the curvature: one per-example gradient for each example and pass.

With v the cotangents of a kind in one pass, s_n = sum_{i in n} sqrt|w_i| J_i' v_i is a column of
example n: the sum over examples (and passes, or their mean over samples) of s_n s_n' is the
curvature, with the parts between layers, too.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax

from curvature.precision import accumulator
from curvature.statistics import layer as stats
from curvature.statistics.evaluate import evaluate
from curvature.statistics.factors import Statistics
from curvature.statistics.kinds import Draw, Kind
from curvature.statistics.sweep import Sweep
from curvature.trace.analysis import Analysis

PyTree = Any


def columns(
    analysis: Analysis,
    kind: Kind,
    params: PyTree,
    args: tuple[PyTree, ...],
    draws: tuple[Draw, ...],
    names: Collection[str],
) -> dict[str, jax.Array]:
    """The columns of some layers in one pass, `(examples,) + block coordinates` for each.

    Args:
      analysis: the trace of the loss at these arguments.
      kind: the source of cotangents.
      params: the parameters.
      args: the loss function's other arguments.
      draws: one pass of what `kind.draw` returns.
      names: layers whose examples can be told apart.
    """
    leaves = jax.tree.leaves(params)
    layers = {layer.name: layer for layer in analysis.layers}
    dtypes = {n: accumulator(*(leaves[v.source].dtype for v in layers[n].leaves)) for n in names}
    tokens = {name: stats.gradient_tokens(layers[name], dtypes[name]) for name in names}

    def loss(tokens: dict[str, Statistics]) -> jax.Array:
        sweep = Sweep(layers, kind, tokens, dict(enumerate(draws)))
        value: jax.Array = evaluate(analysis.program, [*leaves, *jax.tree.leaves(args)], sweep)[0][
            0
        ]
        return value

    raw = jax.grad(loss)(tokens)
    return {name: stats.per_example(layers[name], raw[name]) for name in names}
