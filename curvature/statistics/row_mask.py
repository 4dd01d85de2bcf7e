"""Which rows of a layer count: those that a loss depends on.

A position of padding has no loss, but it has an input, which would enter the mean over rows of
a a'. Where units of a loss may have no weight (`Analysis.masked`), one more backward pass finds the
rows that no unit of non-zero weight depends on: random cotangents at all units with weight come
back as exact zeros there. That holds behind attention, too, where a padded position is a row of
every key and value, if the model masks it there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from curvature.losses import OutputLoss, Targets
from curvature.statistics import devices
from curvature.statistics.devices import Axes
from curvature.statistics.evaluate import evaluate
from curvature.statistics.kinds import Draw
from curvature.statistics.rows import output_rows
from curvature.statistics.sweep import Sweep
from curvature.trace import Layer, LossTag
from curvature.trace.analysis import Analysis
from curvature.trace.layouts import Contraction


@dataclasses.dataclass(frozen=True)
class _Anything:
    """A kind whose cotangents are zero nowhere."""

    averaged: bool = True

    def needs_key(self, *, pooled: bool) -> bool:
        return False

    def draw(self, losses: Sequence[LossTag], key: jax.Array | None) -> tuple[Draw, ...]:
        keys = (jax.random.fold_in(jax.random.key(0), i) for i in range(len(losses)))
        return tuple(jax.random.split(k, tag.lead) for k, tag in zip(keys, losses, strict=True))

    def cotangent(self, tag: LossTag, draw: Draw, z: jax.Array, targets: Targets) -> jax.Array:
        return jax.random.normal(draw, z.shape, z.dtype)

    def root(
        self, loss: OutputLoss, vector: jax.Array, z: jax.Array, targets: Targets
    ) -> jax.Array:
        return vector


def alive_rows(
    analysis: Analysis, layers: Mapping[str, Layer], inputs: Sequence[Any], axes: Axes
) -> dict[int, jax.Array]:
    """For each contraction, 1 for every row that a unit with weight depends on, 0 for others.

    Args:
      analysis: the trace.
      layers: its layers by name; rows are marked where a Kronecker factor is a mean over them.
      inputs: the leaves of the parameters and of the other arguments.
      axes: axes of devices, each with rows of its own.

    Returns:
      By index of the use, arrays of shape `lead + members + (examples, positions)`; none where
      every unit has weight by construction.
    """
    if not analysis.masked:
        return {}
    tokens = {}
    for step in analysis.program.walk():
        use = step.use
        if use is None or use.layer is None or not layers[use.layer].factored:
            continue
        if use.local:  # other devices have other rows: all count
            continue
        assert isinstance(use.layout, Contraction)
        (y,) = step.equation.outvars
        output = jax.ShapeDtypeStruct(y.aval.shape, y.aval.dtype)
        rows = jax.eval_shape(functools.partial(output_rows, use.layout), output)
        tokens[use.index] = jnp.zeros((*use.lead, *rows.shape[:-1]), jnp.float32)

    def loss(tokens: dict[int, jax.Array]) -> jax.Array:
        kind = _Anything()
        draws = dict(enumerate(kind.draw(analysis.losses, None)))
        sweep = Sweep(layers, kind, {}, draws, tokens, marking=True)
        return evaluate(analysis.program, inputs, sweep)[0][0]

    return jax.grad(loss)(devices.own(tokens, axes))
