"""Statistics of one layer in one backward pass.

For a dense layer with input rows a_r (a last entry 1 where there is a bias) and output cotangents
g_r, which carry the square root of the loss weights:

- `kronecker`: sums over rows of a a' and of g g', and the number of rows;
- `diagonal`: the sum over examples of the squared per-example gradient (sum_r a_r g_r')^2.

A factor wider than `max_factor_dim` keeps its diagonal only.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from curvature.precision import HIGHEST
from curvature.registry.layers import Layer
from curvature.registry.plan import Contraction

Statistics = dict[str, jax.Array]


def tokens(layer: Layer, dtype: Any, max_factor_dim: int, examples: int) -> Statistics:
    """Zeros of the shape of a layer's statistics: what they are the gradient of.

    A layer that is used several times needs its per-example gradients summed before they are
    squared, so the token of its diagonal holds them all.
    """
    if layer.block == "diagonal":
        per_example = (examples,) if layer.shared else ()
        inner = layer.shape[len(layer.stack) :]
        return {"values": jnp.zeros((*layer.stack, *per_example, *inner), dtype)}
    d_in, d_out = layer.shape[-2:]
    return {
        "input": jnp.zeros((*layer.stack, *_factor_shape(d_in, max_factor_dim)), dtype),
        "output": jnp.zeros((*layer.stack, *_factor_shape(d_out, max_factor_dim)), dtype),
        "rows": jnp.zeros(layer.stack, dtype),
    }


def _factor_shape(size: int, max_factor_dim: int) -> tuple[int, ...]:
    return (size, size) if size <= max_factor_dim else (size,)


def dense(
    layer: Layer, how: Contraction, token: Statistics, x: jax.Array, g: jax.Array
) -> Statistics:
    """The statistics of one use of a dense layer, in the shape of its (unstacked) token."""
    dtype = next(iter(token.values())).dtype
    a = x.transpose((*how.rows, *how.contracted)).reshape((-1, how.d_in)).astype(dtype)
    rows = [axis for axis in range(g.ndim) if axis not in how.out_axes]
    g = g.transpose((*rows, *how.out_axes)).reshape((-1, how.d_out)).astype(dtype)
    if layer.block == "diagonal":
        examples = x.shape[how.rows[0]] if how.rows else 1
        return {"values": _diagonal(layer, a, g, examples)}
    return {
        "input": _input_moment(a, layer.bias, diagonal=token["input"].ndim == 1),
        "output": _moment(g, diagonal=token["output"].ndim == 1),
        "rows": jnp.asarray(a.shape[0], dtype),
    }


def _moment(x: jax.Array, *, diagonal: bool) -> jax.Array:
    if diagonal:
        return jnp.sum(x * x, axis=0)
    return jnp.matmul(x.T, x, precision=HIGHEST)


def _input_moment(a: jax.Array, bias: bool, *, diagonal: bool) -> jax.Array:
    """Second moment of (a, 1): the column of ones is never made."""
    moment = _moment(a, diagonal=diagonal)
    if not bias:
        return moment
    rows = jnp.full((1,), a.shape[0], a.dtype)
    if diagonal:
        return jnp.concatenate([moment, rows])
    total = a.sum(axis=0)
    return jnp.block([[moment, total[:, None]], [total[None, :], rows[:, None]]])


def _diagonal(layer: Layer, a: jax.Array, g: jax.Array, examples: int) -> jax.Array:
    """Squared per-example gradients summed over examples; unsquared ones for a shared layer."""
    if a.shape[0] == examples and not layer.shared:
        squares = jnp.matmul((a * a).T, g * g, precision=HIGHEST)
        return _with_bias(layer, squares, jnp.sum(g * g, axis=0))
    a = a.reshape((examples, -1, a.shape[-1]))
    g = g.reshape((examples, -1, g.shape[-1]))
    weight = jnp.einsum("nti,nto->nio", a, g, precision=HIGHEST)
    per_example = _with_bias(layer, weight, g.sum(axis=1))
    return per_example if layer.shared else jnp.sum(per_example**2, axis=0)


def _with_bias(layer: Layer, weight: jax.Array, bias: jax.Array) -> jax.Array:
    return jnp.concatenate([weight, bias[..., None, :]], axis=-2) if layer.bias else weight


def squared(layer: Layer, raw: Statistics) -> Statistics:
    """Finishes one backward pass: squares what had to be summed first."""
    if layer.block != "diagonal" or layer.kind == "generic":
        return raw
    if layer.shared:
        return {"values": jnp.sum(raw["values"] ** 2, axis=len(layer.stack))}
    return raw


def combined(layer: Layer, summed: Statistics, passes: int, averaged: bool) -> Statistics:
    """A block's statistics from their sums over passes: the input factor becomes a mean over rows.

    The input is the same in every pass; cotangents of samples are averaged, of columns summed.
    """
    share = 1 / passes if averaged else 1.0
    if layer.block == "diagonal":
        return {"values": summed["values"] * share}
    rows = jnp.maximum(summed["rows"], 1)  # zero where no branch ran: then the factors are, too
    extra = summed["input"].ndim - rows.ndim
    return {
        "input": summed["input"] / rows.reshape(rows.shape + (1,) * extra),
        "output": summed["output"] * share,
    }

