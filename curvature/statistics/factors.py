"""Kronecker factors of a layer: what one use adds to them, and how sums become factors.

For input rows a_r (a last entry 1 where there is a bias) and output cotangents g_r, which carry the
square root of the loss weights, the factors A (x) B of the blocks are

- `kronecker` and `ekfac` ("expand", Eschenhagen et al. 2023): A = mean_r a a', B = sum_r g g';
- `kronecker_reduce` ("reduce", the same): a_n the mean over the positions of example n (and over
  uses, of a shared layer), g_n the sum over them; then A = mean_n a a', B = sum_n g g';
- `kronecker_weighted` (Gao et al. 2021, "trace-restricted"): rows weighted by the norm of the other
  side, A = sum_r |g|^2 a a' / sum_r |g|^2 and B ~ sum_r |a|^2 g g', scaled so that A (x) B has the
  partial traces, and with them the trace, of sum_r (a a') (x) (g g');
- `foof` (Benzing 2022): A = mean_r a a', B = c I with c = tr(sum_r g g') / d_out.

The statistics are the sums over rows, and `rows`, what the mean is taken over: their number, of
`kronecker_weighted` sum_r |g|^2. All of it is linear in the data, so that averages over batches,
micro-batches and devices are those of all their rows; `factors_of` makes the factors of them.

A one-hot side keeps the diagonal of its factor, a wide one that or blocks along it (see `sides`).
Where uses of a transposed weight are pooled with those of the weight itself, statistics of the
former have the suffix `_flipped`, and the names `input` and `output` still say on which side of the
block they are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from curvature.linalg import diagonal
from curvature.precision import Precision
from curvature.sides import Limit, Shape, is_diagonal
from curvature.statistics.rows import Rows, moment
from curvature.trace.layers import Layer
from curvature.trace.layouts import Lookup

Statistics = dict[str, jax.Array]
_SUFFIXES = ("", "_flipped")


def zeros(layer: Layer, dtype: Any, limit: Limit) -> Statistics:
    """Statistics of nothing, as `combined` returns them."""
    first, second = _forms(layer, limit)
    sums = {
        "input": jnp.zeros((*layer.stack, *first), dtype),
        "output": jnp.zeros((*layer.stack, *second), dtype),
        "rows": jnp.zeros(layer.stack, dtype),
    }
    return sums | _flipped(sums) if layer.flipped else sums


def _flipped(sums: Statistics) -> Statistics:
    return {f"{name}_flipped": zero for name, zero in sums.items()}


def tokens(layer: Layer, dtype: Any, limit: Limit) -> Statistics:
    """Zeros of the shape of what one backward pass adds up."""
    if layer.block == "kronecker_reduce" and layer.shared:
        # Uses are summed before products are taken: an example's sums are what is added up.
        lead = layer.views[0].stacked
        each = (*lead, layer.examples, *layer.stack[len(lead) :])
        d_in, d_out = layer.shape[-2:]
        token = {
            "input_sums": jnp.zeros((*each, d_in), dtype),
            "output_sums": jnp.zeros((*each, d_out), dtype),
            "rows": jnp.zeros(each, dtype),
        }
        return token | _flipped(token) if layer.flipped else token
    return zeros(layer, dtype, limit)


def of_rows(layer: Layer, rows: Rows, token: Statistics, *, flipped: bool) -> Statistics:
    """What one use of a layer adds to its factors."""
    suffix = _SUFFIXES[flipped]
    data, cotangent = (name + suffix for name in _sides(suffix))

    def form(name: str) -> Shape:
        return token[name].shape[len(rows.layout.members) :]

    if layer.block == "kronecker_reduce" and layer.shared:
        named = zip(_sides(suffix), (rows.input_sums(), rows.g.sum(axis=-2)), strict=True)
        each = {f"{side}_sums{suffix}": jnp.moveaxis(x, -2, 0) for side, x in named}
        each[f"rows{suffix}"] = jnp.moveaxis(rows.weights().sum(axis=-1), -1, 0)
        return {name: layer.placed(x) for name, x in each.items()}
    if layer.block == "kronecker_reduce":
        counts = rows.weights().sum(axis=-1)
        if isinstance(rows.layout, Lookup):
            first = rows.squared_counts()
        else:
            first = _mean_moment(rows.input_sums(), counts, form(data), rows.precision)
        sums = rows.g.sum(axis=-2, keepdims=True)
        second = moment(sums, form(cotangent), rows.precision)
        total = (counts > 0).sum(axis=-1).astype(counts.dtype)
    elif layer.block == "kronecker_weighted":
        norms = jnp.sum(rows.g**2, axis=-1)
        first = rows.input_moment(form(data), norms)
        second = rows.output_moment(form(cotangent), rows.input_norms())
        total = norms.sum(axis=(-2, -1))
    else:
        second = rows.output_moment(form(cotangent))
        total = rows.count()
        if data not in token:  # that of another layer is this one's, too
            return {cotangent: second, f"rows{suffix}": total}
        first = rows.input_moment(form(data), rows.alive)
    return {data: first, cotangent: second, f"rows{suffix}": total}


def finished(layer: Layer, raw: Statistics, limit: Limit, precision: Precision) -> Statistics:
    """What one backward pass gives: products of what had to be summed first."""
    if "input_sums" not in raw:
        return raw
    lead = len(layer.views[0].stack)
    forms = dict(zip(("input", "output"), _forms(layer, limit), strict=True))
    found = {}
    for suffix in _SUFFIXES[: 1 + layer.flipped]:
        data, cotangent = _sides(suffix)
        counts = jnp.moveaxis(raw[f"rows{suffix}"], lead, -1)
        first, second = (jnp.moveaxis(raw[f"{s}_sums{suffix}"], lead, -2) for s in _sides(suffix))
        found[data + suffix] = _mean_moment(first, counts, forms[data], precision)
        found[cotangent + suffix] = moment(second[..., None, :], forms[cotangent], precision)
        found[f"rows{suffix}"] = (counts > 0).sum(axis=-1).astype(counts.dtype)
    return found


def factors_of(layer: Layer, statistics: Statistics) -> Statistics:
    """`input` and `output` as the factors A and B, from (averages of) a layer's statistics.

    Not linear, so that it comes last. What else is among the statistics stays; factors, which have
    no `rows` beside them, and blocks without factors stay as they are.
    """
    if "rows" not in statistics:
        return statistics
    factors = _normalised(layer, statistics, "")
    if layer.flipped:
        factors = _pooled(layer, factors, _normalised(layer, statistics, "_flipped"))
    if layer.block == "foof":
        mean = jnp.mean(factors["output"], axis=-1, keepdims=True)
        factors["output"] = jnp.broadcast_to(mean, factors["output"].shape)
    sums = [name + suffix for name in ("input", "output", "rows") for suffix in _SUFFIXES]
    return {name: x for name, x in statistics.items() if name not in sums} | factors


def counted(layer: Layer, statistics: Statistics, share: float) -> Statistics:
    """A batch's statistics times its share, to be added to those of batches with other shares.

    What is linear in the loss's weights is as it is. Rows, which are not, count by the share of
    their batch instead of by their number.
    """
    found = {name: x * share for name, x in statistics.items()}
    if "rows" not in statistics or layer.block == "kronecker_weighted":
        return found
    for suffix in _SUFFIXES[: 1 + layer.flipped]:
        data, rows = _sides(suffix)[0] + suffix, statistics[f"rows{suffix}"]
        each = share / jnp.where(rows > 0, rows, 1)
        found[data] = statistics[data] * _lifted(each, statistics[data])
        found[f"rows{suffix}"] = rows * each
    return found


def _forms(layer: Layer, limit: Limit) -> tuple[Shape, Shape]:
    """The forms of the two factors: one-hot inputs, and what stands for a number, are diagonal."""
    d_in, d_out = layer.shape[-2:]
    return (
        (d_in,) if layer.one_hot else limit.form(d_in),
        (d_out,) if layer.block == "foof" else limit.form(d_out),
    )


def _sides(suffix: str) -> tuple[str, str]:
    """The sides of the block on which a use's data and its cotangents are."""
    return ("output", "input") if suffix else ("input", "output")


def _mean_moment(
    sums: jax.Array, counts: jax.Array, form: Shape, precision: Precision
) -> jax.Array:
    """Sum over examples of a a', a the sums divided by the number of rows."""
    means = sums / jnp.maximum(counts, 1)[..., None]
    return moment(means[..., None, :], form, precision)


def _normalised(layer: Layer, sums: Statistics, suffix: str) -> Statistics:
    """The factors of one orientation: of the data a mean, of the cotangents a sum."""
    data, cotangent = _sides(suffix)
    rows, first, second = (sums[name + suffix] for name in ("rows", data, cotangent))
    if layer.block == "kronecker_weighted":
        total = _trace(layer, second)
        second = second * _lifted(rows / jnp.where(total > 0, total, 1), second)
    # Without rows the sum is zero, too.
    return {data: first / _lifted(jnp.where(rows > 0, rows, 1), first), cotangent: second}


def _pooled(layer: Layer, one: Statistics, other: Statistics) -> Statistics:
    """The Kronecker product with the partial traces of A1 (x) B1 + A2 (x) B2 (tied weights)."""
    a, b = (one["input"], other["input"]), (one["output"], other["output"])
    traces_a, traces_b = ([_trace(layer, x) for x in side] for side in (a, b))
    total = sum(x * y for x, y in zip(traces_a, traces_b, strict=True))
    safe = jnp.where(total > 0, total, 1)
    first = [x * _lifted(trace / safe, x) for x, trace in zip(a, traces_b, strict=True)]
    second = [x * _lifted(trace, x) for x, trace in zip(b, traces_a, strict=True)]
    return {"input": first[0] + first[1], "output": second[0] + second[1]}


def _trace(layer: Layer, factor: jax.Array) -> jax.Array:
    depth = len(layer.stack)
    found = factor if is_diagonal(factor, depth) else diagonal(factor)
    return jnp.sum(found, axis=tuple(range(depth, found.ndim)))


def _lifted(scalars: jax.Array, like: jax.Array) -> jax.Array:
    """One number for each copy, to be broadcast against its factor."""
    return scalars.reshape(scalars.shape + (1,) * (like.ndim - scalars.ndim))
