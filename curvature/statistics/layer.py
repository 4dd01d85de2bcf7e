"""Statistics of one use of a layer in one backward pass.

For a layer with input rows a_r (a last entry 1 where there is a bias) and output cotangents g_r,
which carry the square root of the loss weights, the gradient of an example is P_n = sum_r a_r g_r'
over its rows, and the statistics are

- blocks with Kronecker factors: see `factors`;
- `ekfac`: factors, and `values`, the sum over examples of (Q_A' P_n Q_B)^2 (see `eigenbasis`);
- `diagonal`: `values`, the sum over examples of P_n^2;
- `identity`: `values`, the mean of that over a layer's coordinates;
- `dense`: `values`, the sum over examples of the outer product of P_n with itself.

Arrays of rows have shape `members + (examples, positions, features)`. Where a layer is used several
times, its per-example gradients have to be summed before they are squared; then the use returns the
gradients themselves, `(examples,) + block coordinates`, and `finished` squares their sum.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from curvature.blocks import BLOCKS, BlockKind
from curvature.precision import Precision, product
from curvature.sides import Limit
from curvature.statistics import eigenbasis, factors
from curvature.statistics.factors import Statistics
from curvature.statistics.rows import Rows
from curvature.trace.layers import Layer
from curvature.trace.layouts import Elementwise


def tokens(layer: Layer, dtype: Any, limit: Limit) -> Statistics:
    """Zeros of the shape of a layer's statistics: what they are the gradient of."""
    token = factors.tokens(layer, dtype, limit) if layer.factored else {}
    if not _kind(layer).squares:
        return token
    if not layer.summed:
        return token | _no_values(layer, dtype)
    return token | gradient_tokens(layer, dtype)


def gradient_tokens(layer: Layer, dtype: Any) -> Statistics:
    """Zeros of the shape of a layer's per-example gradients."""
    lead = layer.views[0].stacked
    return {"gradients": jnp.zeros((*lead, layer.apart, *layer.shape[len(lead) :]), dtype)}


def per_example(layer: Layer, raw: Statistics) -> jax.Array:
    """Per-example gradients, `(examples,) + block coordinates`, from the gradient of their token.

    Where scanned copies of a layer have one array each, examples come after those axes in `raw`.
    """
    return jnp.moveaxis(raw["gradients"], len(layer.views[0].stacked), 0)


def zeros(layer: Layer, dtype: Any, limit: Limit) -> Statistics:
    """Statistics of nothing, as `combined` returns them."""
    if not _kind(layer).squares:
        return factors.zeros(layer, dtype, limit)
    values = _no_values(layer, dtype)
    if not layer.factored:
        return values
    found = factors.zeros(layer, dtype, limit)
    return found | values | eigenbasis.identity(found, len(layer.stack))


def _no_values(layer: Layer, dtype: Any) -> Statistics:
    shape = _kind(layer).values_shape(layer.shape, len(layer.stack))
    return {"values": jnp.zeros(shape, dtype)}


def of_contraction(
    layer: Layer,
    rows: Rows,
    token: Statistics,
    turn: Statistics,
    *,
    flipped: bool,
    slope: jax.Array | None = None,
) -> Statistics:
    """The statistics of one use of a dense, convolutional or embedding layer.

    Args:
      layer: the layer.
      rows: the use's inputs and output cotangents.
      token: zeros; which statistics are asked for.
      turn: the bases of an `ekfac` layer's corrections, in this copy of the layer.
      flipped: whether the use is of the transposed weight.
      slope: derivative of the weight that is met in the parameter's entries, entry by entry,
        `members + (d_in, d_out)`; None for 1. Factors take it as a gain of each input times one of
        each output, as `rank_one` finds them.
    """
    found: Statistics = {}
    if slope is not None and layer.factored:
        rows, slope = rows.scaled(*rank_one(slope)), None
    slopes = jnp.ones((), rows.g.dtype) if slope is None else slope
    if f"rows{'_flipped' if flipped else ''}" in token:
        found |= factors.of_rows(layer, rows, token, flipped=flipped)
    if "values" in token:
        members = len(rows.layout.members)
        found["values"] = (
            _squared(layer, rows.gradients() * slopes, members, rows.precision)
            if layer.outer
            else _kind(layer).summary(
                eigenbasis.turned_rows(rows, turn).squares() * slopes**2, members
            )
        )
    if "gradients" in token:
        gradients = (rows.total()[None] if layer.mixed else rows.gradients()) * slopes
        found |= _handed_on(layer, gradients.mT if flipped else gradients)
    return {name: found.get(name, jnp.zeros_like(zero)) for name, zero in token.items()}


def rank_one(slope: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gains of inputs and of outputs whose products are slopes `(..., d_in, d_out)`.

    They are exact where slopes have rank one, also under a mask of which a column is full, and for
    any mask alone: entries that are zero are entries that no gradient reaches, and not counted.
    Otherwise they are one step of alternating least squares.
    """
    met = (slope != 0).astype(slope.dtype)
    fullest = jnp.argmax(met.sum(axis=-2, keepdims=True), axis=-1, keepdims=True)
    column = jnp.take_along_axis(slope, fullest, axis=-1)
    inputs = jnp.where(column != 0, column, 1)

    def fitted(gains: jax.Array, axis: int) -> jax.Array:
        total = jnp.sum(gains**2 * met, axis=axis, keepdims=True)
        return jnp.sum(gains * slope, axis=axis, keepdims=True) / jnp.where(total > 0, total, 1)

    outputs = fitted(inputs, -2)
    return fitted(outputs, -1)[..., 0], outputs[..., 0, :]


def of_elementwise(
    layer: Layer,
    layout: Elementwise,
    slope: jax.Array | None,
    g: jax.Array,
    token: Statistics,
    precision: Precision,
) -> Statistics:
    """The statistics of one use of a parameter that is broadcast against the data.

    Args:
      layer: the layer.
      layout: the use.
      slope: derivative of what is met in the parameter's entries, in the shape of `g`; None for 1.
      g: the cotangent of the broadcast parameter.
      token: zeros; which statistics are asked for.
      precision: of products.
    """
    g = g if slope is None else g * slope
    first, axes = layout.example_axis, layout.axes
    if first is None:  # one example
        g, first, axes = g[None], 0, tuple(a + 1 for a in axes)
    keep = (first, *axes)
    g = jnp.sum(g, axis=tuple(a for a in range(g.ndim) if a not in keep), keepdims=True)
    rest = [a for a in range(g.ndim) if a not in keep]
    gradients = g.transpose((*keep, *rest)).reshape([g.shape[a] for a in keep]) * layout.scale
    gradients = gradients.reshape((layout.examples, -1, *gradients.shape[1:])).sum(axis=1)
    if "gradients" in token:
        return _handed_on(layer, gradients)
    return {"values": _squared(layer, gradients, 0, precision)}


def _handed_on(layer: Layer, gradients: jax.Array) -> Statistics:
    """Per-example gradients of one of several uses, to be summed over them."""
    if layer.apart == 1:  # uses differ in what their examples are, or these meet
        return {"gradients": gradients.sum(axis=0, keepdims=True)}
    return {"gradients": layer.placed(gradients)}


def _squared(layer: Layer, gradients: jax.Array, members: int, precision: Precision) -> jax.Array:
    """`members + ...` block values from `(examples,) + members + ...` gradients."""
    if not layer.outer:
        return _kind(layer).summary(jnp.sum(gradients**2, axis=0), members)
    flat = gradients.reshape((*gradients.shape[: 1 + members], -1))
    return product("n...i,n...j->...ij", flat, flat, precision)


def _kind(layer: Layer) -> BlockKind:
    return BLOCKS[layer.block]


def finished(
    layer: Layer,
    raw: Statistics,
    turn: Statistics | None,
    limit: Limit,
    precision: Precision,
) -> Statistics:
    """What one backward pass gives: products of what had to be summed first.

    Args:
      layer: the layer.
      raw: the gradient of its token.
      turn: the bases of an `ekfac` layer's corrections, all copies.
      limit: how wide factors may be.
      precision: of products.
    """
    raw = factors.finished(layer, raw, limit, precision)
    if "gradients" not in raw:
        return raw
    lead = len(layer.views[0].stack)
    members = len(layer.stack) - lead
    gradients = per_example(layer, raw)
    del raw["gradients"]
    if turn:
        gradients = eigenbasis.turned_gradients(gradients, turn, len(layer.stack), precision)
    return raw | {"values": _squared(layer, gradients, lead + members, precision)}


def of_generic(layer: Layer, gradient: jax.Array) -> Statistics:
    """The square of the gradient of the drawn cotangents, summed over examples."""
    return {"values": _kind(layer).summary(gradient**2, 0)}


def combined(summed: Statistics, passes: int, averaged: bool) -> Statistics:
    """A block's statistics from their sums over passes: of samples the mean, of columns the sum."""
    if passes == 1 or not averaged:
        return summed
    share = 1 / passes
    return {name: x * share for name, x in summed.items()}
