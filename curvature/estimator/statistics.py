"""Statistics of one use of a layer in one backward pass.

For a layer with input rows a_r (a last entry 1 where there is a bias) and output cotangents g_r,
which carry the square root of the loss weights:

- `kronecker`: sums over rows of a a' and of g g', and the number of rows;
- `diagonal`: the sum over examples of the squared per-example gradient (sum_r a_r g_r')^2;
- `dense`: the sum over examples of the outer product of the per-example gradient with itself.

Arrays of rows have shape `members + (examples, positions, features)`. Where a layer is used several
times, its per-example gradients have to be summed before they are squared; then the use returns the
gradients themselves, `(examples,) + block coordinates`, and `finished` squares their sum.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from curvature.estimator.rows import Rows
from curvature.precision import HIGHEST
from curvature.registry.layers import Layer
from curvature.registry.taps import Elementwise
from curvature.registry.views import Shape

Statistics = dict[str, jax.Array]


def tokens(layer: Layer, dtype: Any, max_factor_dim: int) -> Statistics:
    """Zeros of the shape of a layer's statistics: what they are the gradient of."""
    if layer.block != "kronecker":
        lead = layer.views[0].stacked
        inner = layer.shape[len(lead) :]
        if layer.shared:
            return {"gradients": jnp.zeros((*lead, layer.examples, *inner), dtype)}
        return zeros(layer, dtype, max_factor_dim)
    token = zeros(layer, dtype, max_factor_dim) | {"rows": jnp.zeros(layer.stack, dtype)}
    if layer.flipped:
        return token | {f"{name}_flipped": zero for name, zero in token.items()}
    return token


def zeros(layer: Layer, dtype: Any, max_factor_dim: int) -> Statistics:
    """Statistics of nothing, as `combined` returns them."""
    if layer.block != "kronecker":
        return {"values": jnp.zeros(block_shape(layer), dtype)}
    first, second = factor_shapes(layer, max_factor_dim)
    return {"input": jnp.zeros(first, dtype), "output": jnp.zeros(second, dtype)}


def block_shape(layer: Layer) -> Shape:
    """The shape of the values of a diagonal or dense block."""
    if layer.block == "diagonal":
        return layer.shape
    size = math.prod(layer.shape[len(layer.stack) :])
    return (*layer.stack, size, size)


def factor_shapes(layer: Layer, max_factor_dim: int) -> tuple[Shape, Shape]:
    """The shapes of the two Kronecker factors: full, or diagonal where wide or one-hot."""
    d_in, d_out = layer.shape[-2:]
    full_in = d_in <= max_factor_dim and not layer.one_hot
    return (
        (*layer.stack, *((d_in, d_in) if full_in else (d_in,))),
        (*layer.stack, *((d_out, d_out) if d_out <= max_factor_dim else (d_out,))),
    )


def of_contraction(layer: Layer, rows: Rows, token: Statistics, *, flipped: bool) -> Statistics:
    """The statistics of one use of a dense, convolutional or embedding layer."""
    if layer.block != "kronecker":
        if layer.block == "diagonal" and not layer.shared:
            return {"values": rows.squares()}
        gradients = rows.gradients()
        return _from_gradients(layer, gradients.mT if flipped else gradients, rows.how.members)
    members = len(rows.how.members)
    suffix = "_flipped" if flipped else ""
    first, second = ("output", "input") if flipped else ("input", "output")
    found = {
        first + suffix: rows.input_moment(token[first + suffix].ndim == members + 1),
        second + suffix: rows.output_moment(token[second + suffix].ndim == members + 1),
        f"rows{suffix}": rows.count(),
    }
    return {name: found.get(name, jnp.zeros_like(zero)) for name, zero in token.items()}


def of_elementwise(layer: Layer, how: Elementwise, slope: jax.Array | None, g: jax.Array) -> Any:
    """The statistics of one use of a parameter that is broadcast against the data.

    Args:
      layer: the layer.
      how: the use.
      slope: derivative of what is met in the parameter's entries, in the shape of `g`; None for 1.
      g: the cotangent of the broadcast parameter.
    """
    g = g if slope is None else g * slope
    keep = (how.example_axis, *how.axes)
    g = jnp.sum(g, axis=tuple(a for a in range(g.ndim) if a not in keep), keepdims=True)
    rest = [a for a in range(g.ndim) if a not in keep]
    gradients = g.transpose((*keep, *rest)).reshape([g.shape[a] for a in keep]) * how.scale
    gradients = gradients.reshape((how.examples, -1, *gradients.shape[1:])).sum(axis=1)
    return _from_gradients(layer, gradients, ())


def _from_gradients(layer: Layer, gradients: jax.Array, members: Shape) -> Statistics:
    """Squares per-example gradients, or hands them on where several uses are to be summed."""
    if not layer.shared:
        return {"values": _squared(layer, gradients, len(members))}
    if gradients.shape[0] != layer.examples:  # uses differ in what their examples are: pool them
        gradients = gradients.sum(axis=0, keepdims=True)
    return {"gradients": gradients}


def _squared(layer: Layer, gradients: jax.Array, members: int) -> jax.Array:
    """`members + ...` block values from `(examples,) + members + ...` gradients."""
    if layer.block == "diagonal":
        return jnp.sum(gradients**2, axis=0)
    flat = gradients.reshape((*gradients.shape[: 1 + members], -1))
    return jnp.einsum("n...i,n...j->...ij", flat, flat, precision=HIGHEST)


def finished(layer: Layer, raw: Statistics) -> Statistics:
    """What one backward pass gives: squares what had to be summed first."""
    if "gradients" not in raw:
        return raw
    lead = len(layer.views[0].stack)
    members = len(layer.stack) - lead
    gradients = jnp.moveaxis(raw["gradients"], lead, 0)
    return {"values": _squared(layer, gradients, lead + members)}


def of_generic(gradient: jax.Array) -> Statistics:
    """The square of the gradient of the drawn cotangents, summed over examples."""
    return {"values": gradient**2}


def combined(layer: Layer, summed: Statistics, passes: int, averaged: bool) -> Statistics:
    """A block's statistics from their sums over passes: the input factor becomes a mean over rows.

    The input is the same in every pass; cotangents of samples are averaged, of columns summed.
    """
    share = 1 / passes if averaged else 1.0
    if layer.block != "kronecker":
        return {"values": summed["values"] * share}
    straight = _normalised(summed, "", "input", "output", share)
    if not layer.flipped:
        return straight
    return _pooled(layer, straight, _normalised(summed, "_flipped", "output", "input", share))


def _normalised(
    summed: Statistics, suffix: str, data: str, cotangent: str, share: float
) -> Statistics:
    rows = jnp.maximum(summed["rows" + suffix], 1)  # zero where no branch ran: so is the sum
    moment = summed[data + suffix]
    extra = (1,) * (moment.ndim - rows.ndim)
    return {
        data: moment / rows.reshape(rows.shape + extra),
        cotangent: summed[cotangent + suffix] * share,
    }


def _pooled(layer: Layer, one: Statistics, other: Statistics) -> Statistics:
    """The Kronecker product with the partial traces of A1 (x) B1 + A2 (x) B2 (tied weights)."""

    def trace(x: jax.Array) -> jax.Array:
        full = x.ndim - len(layer.stack) == 2
        return jnp.trace(x, axis1=-2, axis2=-1) if full else x.sum(axis=-1)

    def lift(scalar: jax.Array, x: jax.Array) -> jax.Array:
        return scalar.reshape(scalar.shape + (1,) * (x.ndim - scalar.ndim))

    a, b = (one["input"], other["input"]), (one["output"], other["output"])
    total = trace(a[0]) * trace(b[0]) + trace(a[1]) * trace(b[1])
    safe = jnp.where(total > 0, total, 1)
    return {
        "input": a[0] * lift(trace(b[0]) / safe, a[0]) + a[1] * lift(trace(b[1]) / safe, a[1]),
        "output": b[0] * lift(trace(a[0]), b[0]) + b[1] * lift(trace(a[1]), b[1]),
    }
