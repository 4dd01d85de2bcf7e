"""True against empirical Fisher of one network on one batch, layer by layer.

Both are estimated blockwise on the same inputs; they differ only in the targets that the output
gradients are taken for: averaged over the model's own predictive distribution, in closed form, or
the labels of the data. Three numbers a layer, because each misses what the others see: a trace
ratio near one with a low cosine is a matrix of the right size in the wrong directions, and a high
cosine with a small ratio is the right shape at the wrong scale.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import curvature
from digits import report
from digits.data import Batch
from digits.problems import PyTree

MAX_DENSE = 2500
"""Largest block, in parameters, that is written out to take the cosine: 25 MB in float32."""


@dataclass(frozen=True)
class LayerComparison:
    """The two Fisher blocks of one layer."""

    layer: str
    trace_fisher: float
    trace_empirical: float
    cosine: float | None

    @property
    def trace_ratio(self) -> float:
        """tr EF / tr F; not a number for a layer without curvature."""
        return self.trace_empirical / self.trace_fisher if self.trace_fisher else math.nan

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "trace_ratio": self.trace_ratio}


def compare(
    registry: Any, params: PyTree, model_state: PyTree, batch: Batch, key: Array
) -> list[LayerComparison]:
    """Compares the exact Fisher with the empirical one at these parameters."""
    sizes = {layer.name: layer.size for layer in registry.layers}
    kinds = (curvature.Fisher(samples=None), curvature.EmpiricalFisher())
    true, empirical = (
        curvature.Estimator(registry, kind)(params, model_state, batch, key, key=key)
        for kind in kinds
    )
    return [
        LayerComparison(
            layer=name,
            trace_fisher=float(block.trace()),
            trace_empirical=float(empirical.blocks[name].trace()),
            cosine=_cosine(block, empirical.blocks[name]) if sizes[name] <= MAX_DENSE else None,
        )
        for name, block in true.blocks.items()
    ]


def _cosine(a: Any, b: Any) -> float:
    return float(_matrix_cosine(a.to_dense(), b.to_dense()))


@jax.jit
def _matrix_cosine(a: Array, b: Array) -> Array:
    return jnp.sum(a * b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b))


def table(trained: Sequence[LayerComparison], initial: Sequence[LayerComparison]) -> str:
    """The comparison for the terminal, with ratio and cosine before training beside it."""
    header = ("layer", "tr F", "tr EF", "ratio", "cosine", "ratio at start", "cosine at start")
    rows = [
        (
            after.layer,
            f"{after.trace_fisher:.3e}",
            f"{after.trace_empirical:.3e}",
            f"{after.trace_ratio:.3g}",
            _format_cosine(after.cosine),
            f"{before.trace_ratio:.3g}",
            _format_cosine(before.cosine),
        )
        for after, before in zip(trained, initial, strict=True)
    ]
    return report.table(header, rows)


def _format_cosine(cosine: float | None) -> str:
    return "too large" if cosine is None else f"{cosine:.3f}"
