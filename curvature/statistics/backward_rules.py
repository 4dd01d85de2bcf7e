"""Layers and losses with another backward rule: the loss keeps its value.

- A *layer* has one more argument, a token of zeros, whose "gradient" is the layer's statistics,
  made from the input and the output cotangent that the rule has in hand anyway.
- A *loss*: whatever cotangent w = dL/dl arrives for its units, sqrt(|w|) v leaves towards the
  network, with v as the kind of curvature says.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from curvature import _jax
from curvature.losses import Targets
from curvature.meshes import automatic, bind, divided_like, here
from curvature.precision import Precision, accumulator
from curvature.statistics.factors import Statistics
from curvature.statistics.kinds import Draw
from curvature.statistics.layer import of_contraction, of_elementwise
from curvature.statistics.rows import output_rows, rows_of
from curvature.statistics.sweep import Sweep
from curvature.trace.layers import Layer
from curvature.trace.layouts import Contraction, Elementwise, Lookup
from curvature.trace.program import LossTag, Step, Use


def contraction(
    step: Step, use: Use, values: list[Any], slopes: list[Any], sweep: Sweep
) -> jax.Array:
    """A contraction of data and parameter whose token's gradient is its statistics."""
    layout, layer = use.layout, sweep.layers[str(use.layer)]
    assert isinstance(layout, Contraction)
    if sweep.marking:
        return _marked(step, use, values, sweep)
    if layer.name not in sweep.tokens:
        return bind(step.equation, values)[0]
    alive = sweep.alive.get(use.index)
    if use.manual:
        return _manual(layer, use, values, sweep)

    def apply(x: jax.Array, w: jax.Array) -> jax.Array:
        (y,) = bind(step.equation, (x, w) if layout.operand == 0 else (w, x))
        return y

    @jax.custom_vjp
    def tapped(x: jax.Array, w: jax.Array, token: Statistics, known: Any) -> jax.Array:
        return apply(x, w)

    def forward(x: jax.Array, w: jax.Array, token: Statistics, known: Any) -> Any:
        return apply(x, w), (x, w, token, known)

    def backward(kept: Any, g: jax.Array) -> Any:
        x, w, token, known = kept
        dx = None  # for indices, and for whole numbers, which have no gradient
        if not isinstance(layout, Lookup) and jnp.issubdtype(x.dtype, jnp.inexact):
            (dx,) = jax.linear_transpose(lambda y: apply(y, w), x)(g)
        sweep.met.add(layer.name)
        return dx, None, _statistics(layer, use, x, g, token, known, sweep.precision), None

    tapped.defvjp(forward, backward)
    x, w = values[layout.operand], values[1 - layout.operand]
    slope = None if use.slope is None else use.slope(slopes[1 - layout.operand])
    known = here((alive, sweep.bases.get(layer.name, {}), slope))
    return tapped(x, w, _varying_like(here(sweep.tokens[layer.name]), x), known)


def _statistics(
    layer: Layer,
    use: Use,
    x: jax.Array,
    g: jax.Array,
    token: Statistics,
    known: Any,
    precision: Precision,
) -> Statistics:
    """The statistics of a contraction from its input and the cotangent of its output."""

    def made(x: jax.Array, g: jax.Array, token: Statistics, known: Any) -> Statistics:
        assert isinstance(use.layout, Contraction)
        alive, bases, slope = known
        bias = use.bias.scale if use.bias is not None else None
        if layer.bias and use.bias is None and not use.flipped:
            bias = 0.0
        dtype = jax.tree.leaves(token)[0].dtype
        rows = rows_of(use.layout, x, g, bias, alive, dtype, precision)
        if layer.bias and use.flipped:  # the bias is on the side of the cotangents, and not there
            widths = [(0, 0)] * (rows.g.ndim - 1) + [(0, 1)]
            rows = dataclasses.replace(rows, g=jnp.pad(rows.g, widths))
        return of_contraction(layer, rows, token, bases, flipped=use.flipped, slope=slope)

    return _like(automatic(made, x, g, token, known), token, g)


def _manual(layer: Layer, use: Use, values: list[Any], sweep: Sweep) -> jax.Array:
    """The output of a layer tagged by hand, whose token's gradient is its statistics."""

    @jax.custom_vjp
    def tapped(y: jax.Array, x: jax.Array, token: Statistics, known: Any) -> jax.Array:
        return y

    def backward(kept: Any, g: jax.Array) -> Any:
        x, token, known = kept
        return g, None, _statistics(layer, use, x, g, token, known, sweep.precision), None

    tapped.defvjp(lambda y, *rest: (y, rest), backward)
    y, x, *_ = values
    known = here((sweep.alive.get(use.index), sweep.bases.get(layer.name, {}), None))
    return tapped(y, x, _varying_like(here(sweep.tokens[layer.name]), y), known)


def _marked(step: Step, use: Use, values: list[Any], sweep: Sweep) -> jax.Array:
    """The output of a contraction; its token's gradient says which rows have a cotangent."""
    layout = use.layout
    assert isinstance(layout, Contraction)

    @jax.custom_vjp
    def marked(y: jax.Array, token: jax.Array) -> jax.Array:
        return y

    def backward(token: jax.Array, g: jax.Array) -> Any:
        alive = automatic(lambda g: jnp.any(output_rows(layout, g) != 0, axis=-1), g)
        return g, _jax.varying_like(alive.astype(token.dtype), token)

    marked.defvjp(lambda y, token: (y, token), backward)
    (y,) = bind(step.equation, values)
    token = sweep.alive.get(use.index)
    return y if token is None else marked(y, _jax.varying_like(here(token), y))


def broadcast(
    step: Step, position: int, use: Use, values: list[Any], slopes: list[Any], sweep: Sweep
) -> jax.Array:
    """A parameter broadcast against the data, whose token's gradient is its statistics."""
    layout, layer = use.layout, sweep.layers[str(use.layer)]
    value, slope, (out, *_) = values[position], slopes[position], step.equation.outvars
    assert isinstance(layout, Elementwise)

    @jax.custom_vjp
    def tapped(token: Statistics, value: jax.Array, slope: Any) -> jax.Array:
        return value

    def forward(token: Statistics, value: jax.Array, slope: Any) -> Any:
        return value, (token, slope)

    def backward(kept: Any, g: jax.Array) -> Any:
        token, slope = kept
        g = g.astype(jax.tree.leaves(token)[0].dtype)
        made = functools.partial(of_elementwise, layer, layout, precision=sweep.precision)
        return _like(automatic(made, slope, g, token), token, g), None, None

    tapped.defvjp(forward, backward)

    def wide(x: jax.Array) -> jax.Array:
        if x.shape == layout.shape:
            return x
        x = jnp.broadcast_to(x, layout.shape)
        return divided_like(x, out.aval) if out.aval.shape == layout.shape else x

    token = _varying_like(here(sweep.tokens[layer.name]), value)
    slope = None if slope is None else wide(slope).astype(jax.tree.leaves(token)[0].dtype)
    return tapped(token, wide(value), slope)


def loss(tag: LossTag, index: int, sweep: Sweep, operands: list[Any]) -> jax.Array:
    """A tagged loss that answers the cotangent w of its units with sqrt(|w|) v."""
    loss = tag.loss

    @jax.custom_vjp
    def tagged(z: jax.Array, targets: Targets, draw: Draw, weight: jax.Array | None) -> jax.Array:
        return loss.value(z, targets)

    def forward(z: jax.Array, targets: Targets, draw: Draw, weight: jax.Array | None) -> Any:
        return loss.value(z, targets), (z, targets, draw, weight)

    def backward(kept: Any, w: jax.Array) -> Any:
        return automatic(answer, kept, w, like=kept[0]), None, None, None

    def answer(kept: Any, w: jax.Array) -> jax.Array:
        z, targets, draw, weight = kept
        exact = z.astype(accumulator(z.dtype))
        v = sweep.kind.cotangent(tag, draw, exact, targets)
        w = w.astype(exact.dtype)
        if weight is not None:  # of none there may be a mean, which is not a number
            w = jnp.where(weight > 0, w * weight.astype(w.dtype), 0)
        root = _root(w)
        v = v * root.reshape(root.shape + (1,) * loss.event_ndim)
        return v.astype(z.dtype)

    tagged.defvjp(forward, backward)
    z, *targets = operands
    for target in targets:
        z = _jax.varying_like(z, target)
    draw = jax.tree.map(lambda d: _of_device(d, z, sweep), here(sweep.draws[index]))
    return tagged(z, tuple(targets), draw, here(sweep.weights.get(index)))


def weighed(tag: LossTag, index: int, sweep: Sweep, operands: list[Any]) -> jax.Array:
    """A tagged loss; its token's gradient is the sum of |w| over its units."""

    @jax.custom_vjp
    def weighed(losses: jax.Array, token: jax.Array) -> jax.Array:
        return losses

    def backward(token: jax.Array, w: jax.Array) -> Any:
        total = automatic(lambda w: jnp.sum(jnp.abs(w.astype(token.dtype))), w)
        return None, _jax.varying_like(total, token)

    weighed.defvjp(lambda losses, token: (losses, token), backward)
    z, *targets = operands
    losses = tag.loss.value(z, tuple(targets))
    return weighed(losses, _jax.varying_like(here(sweep.weights[index]), losses))


@jax.custom_jvp
def _root(weight: jax.Array) -> jax.Array:
    """The square root of |w|, constant where it is zero: a unit that does not count never does."""
    return jnp.sqrt(jnp.abs(weight))


@_root.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (weight,), (tangent,) = primals, tangents
    root = jnp.sqrt(jnp.abs(weight))
    slope = jnp.where(root > 0, jnp.sign(weight) / jnp.where(root > 0, 2 * root, 1), 0)
    return root, slope * tangent


def _of_device(draw: jax.Array, z: jax.Array, sweep: Sweep) -> jax.Array:
    """A draw of its own for each device that has examples of its own."""
    if not jnp.issubdtype(draw.dtype, jax.dtypes.prng_key):
        return draw
    axes, tracked = sweep.devices
    for axis in axes:
        if not tracked or axis in _jax.varying_over(z):
            draw = jax.random.fold_in(draw, jax.lax.axis_index(axis))
    return draw


def _varying_like(statistics: Statistics, like: jax.Array) -> Statistics:
    return jax.tree.map(lambda x: _jax.varying_like(x, like), statistics)


def _like(found: Statistics, token: Statistics, g: jax.Array) -> Statistics:
    """Statistics that vary over devices as their token does, and the cotangent."""
    return jax.tree.map(_jax.varying_like, _varying_like(found, g), token)
