"""True against empirical Fisher of a network on one batch, layer by layer: `curvature.compare`.

Three numbers a layer, because each misses what the others see: a trace ratio near one with a low
cosine is a matrix of the right size in the wrong directions, and a high cosine with a small ratio
is the right shape at the wrong scale.
"""

from __future__ import annotations

from typing import Any

from jax import Array

import curvature
from curvature.comparison import Block
from curvature.text import table as aligned
from digits.data import Batch
from digits.problems import PyTree

KINDS = {"F": curvature.Fisher(samples=None), "EF": curvature.EmpiricalFisher()}
PAIR = ("F", "EF")


def compare(
    registry: Any, params: PyTree, model_state: PyTree, batch: Batch, key: Array
) -> curvature.Comparison:
    """The exact Fisher and the empirical one at these parameters; wide blocks by projection."""
    batches = [(model_state, batch, key)]
    options: dict[str, Any] = {"directions": False, "approximations": (), "progress": False}
    return curvature.compare(registry, params, batches, key=key, kinds=KINDS, **options)


def figures(comparison: curvature.Comparison) -> list[dict[str, Any]]:
    """Of every layer, and of the whole network first."""
    return [
        {
            "layer": block.name,
            "trace_fisher": block.spectra["F"].trace,
            "trace_empirical": block.spectra["EF"].trace,
            "trace_ratio": block.pairs[PAIR].trace_ratio,
            "cosine": block.pairs[PAIR].cosine,
        }
        for block in comparison.blocks
    ]


def table(trained: curvature.Comparison, initial: curvature.Comparison) -> str:
    """The comparison for the terminal, with ratio and cosine before training beside it."""
    header = ("layer", "tr F", "tr EF", "ratio", "cosine", "ratio at start", "cosine at start")
    before = {block.name: block for block in initial.blocks}
    rows = [
        (
            block.name,
            *(f"{block.spectra[kind].trace.value:.3e}" for kind in PAIR),
            *_pair(block),
            *_pair(before[block.name]),
        )
        for block in trained.blocks
    ]
    return aligned(header, rows, str.rjust)


def _pair(block: Block) -> tuple[str, str]:
    pair = block.pairs[PAIR]
    return str(pair.trace_ratio), str(pair.cosine)
