"""A share of a batch's examples whose curvature stands for that of all of them.

The examples are evenly spaced, so that every device of a batch that is divided over devices has its
share of them. The weights dL/dl of a loss's units then have another sum: the same where the loss is
a mean over examples, a smaller one where it is a sum, either with masks. Each loss's weights are
multiplied by what makes their sum that of the whole batch. That takes a derivative of what the loss
function does with the tagged losses, which mostly needs no pass through the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvature.meshes import automatic
from curvature.statistics import devices
from curvature.statistics.devices import Axes
from curvature.statistics.evaluate import evaluate
from curvature.statistics.kinds import Kind
from curvature.statistics.sweep import Sweep
from curvature.trace import Registry
from curvature.trace.analysis import Analysis
from curvature.trace.batch_axis import numbers_of_examples
from curvature.trace.layouts import Batch

PyTree = Any


def check_share(share: Any, registry: Registry) -> None:
    """Raises for what is no share of a batch, and where examples are not known; None is all."""
    if share is None:
        return
    number = isinstance(share, int | float) and not isinstance(share, bool)
    if not number or not 0 < share <= 1:
        raise ValueError(f"statistics_batch is {share!r}, expected a number in (0, 1], or None.")
    if not any(registry.batch):
        raise ValueError(
            f"statistics_batch is {share}, but no argument of the loss function was found to have "
            "an axis of examples. Pass the batch as an argument, or leave statistics_batch out."
        )


def examples_of(
    args: PyTree, batch: Sequence[Batch | None], share: float
) -> tuple[PyTree, int | None]:
    """Arguments with a share of each batch's examples, at least one.

    For a share of 1 / k that is every k-th. With them, how many there were; None where batches
    differ in that.
    """
    leaves, structure = jax.tree.flatten(args)
    numbers = numbers_of_examples(args, batch)
    chosen = [
        x if b is None or n is None else _chosen(x, b, n, max(1, round(share * n)))
        for x, b, n in zip(leaves, batch, numbers, strict=True)
    ]
    sizes = {n for n in numbers if n is not None}
    return jax.tree.unflatten(structure, chosen), sizes.pop() if len(sizes) == 1 else None


def _chosen(x: jax.Array, batch: Batch, size: int, kept: int) -> jax.Array:
    """`kept` of the `size` examples of one array."""
    before, after = x.shape[: batch.axis], x.shape[batch.axis + 1 :]
    out = (*before, kept * batch.each, *after)

    def spaced(x: jax.Array) -> jax.Array:
        if size % kept:
            rows = x.reshape((*before, size, batch.each, *after))
            return jnp.take(rows, np.arange(kept) * size // kept, axis=batch.axis).reshape(out)
        rows = x.reshape((*before, kept, size // kept * batch.each, *after))
        return jax.lax.slice_in_dim(rows, 0, batch.each, axis=batch.axis + 1).reshape(out)

    return automatic(spaced, x, like=x)


def ratios(
    whole: Mapping[int, jax.Array], part: Mapping[int, jax.Array]
) -> Mapping[int, jax.Array]:
    """For each loss, what the weights of its units in a part are multiplied by.

    Args:
      whole: the `sums` on all examples.
      part: those on a share of them.
    """
    return {i: jnp.where(x > 0, whole[i] / jnp.where(x > 0, x, 1), 0) for i, x in part.items()}


def sums(analysis: Analysis, inputs: Sequence[Any], kind: Kind, axes: Axes) -> dict[int, jax.Array]:
    """The sum of |dL/dl| over the units of every loss.

    Args:
      analysis: a trace of the loss.
      inputs: the leaves of parameters and arguments there.
      kind: the source of cotangents.
      axes: axes of devices, each with examples of its own.
    """
    count = range(len(analysis.losses))
    layers = {layer.name: layer for layer in analysis.layers}

    def loss(tokens: dict[int, jax.Array]) -> jax.Array:
        nothing: dict[int, Any] = {i: () for i in count}
        sweep = Sweep(
            layers,
            kind,
            {},
            nothing,
            devices=devices.around(axes),
            weights=tokens,
            weighing=True,
        )
        return evaluate(analysis.program, inputs, sweep)[0][0]

    return jax.grad(loss)(devices.own({i: jnp.zeros(()) for i in count}, axes))
