"""Evaluates a program so that the loss's gradient with respect to its tokens is the statistics.

The loss keeps its value. Two kinds of equations get another backward rule:

- a *layer*: one more argument, a token of zeros, whose "gradient" is the layer's statistics, made
  from the input and the output cotangent that the rule has in hand anyway;
- a *loss*: whatever cotangent w = dL/dl arrives for its units, sqrt(|w|) v leaves towards the
  network, with v as the kind of curvature says.

Statistics can be differentiated themselves, with respect to the parameters (the gradient of a
trace, of the loss after a step): nothing here is cut off for good. What must not send cotangents to
the tokens ends in a rule of its own, which the outer derivative, of another order, does not see.

Everything between them is differentiated by JAX: a token of a layer whose weight is scanned is
scanned along and comes out stacked, one of a weight shared over time comes out summed, and remat,
jit and cond need no thought. Weight gradients are never asked for, so none are computed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from curvature import _jax
from curvature.losses import Targets
from curvature.meshes import automatic, bind, divided_like, here
from curvature.precision import HIGHEST, Precision, accumulator
from curvature.statistics.factors import Statistics
from curvature.statistics.kinds import Draw, Kind
from curvature.statistics.layer import of_contraction, of_elementwise
from curvature.statistics.rows import output_rows, rows_of
from curvature.trace.layers import Layer
from curvature.trace.layouts import Contraction, Elementwise, Lookup
from curvature.trace.program import LossTag, Program, Step, Use


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What one backward pass brings along.

    Attributes:
      layers: the layers by name.
      kind: the source of cotangents.
      tokens: for each layer whose statistics are taken, zeros of their shape.
      draws: for each loss, what the kind needs there.
      alive: for each contraction, by the index of its use, which rows count; all do where it is
        missing.
      marking: whether `alive` holds tokens instead, whose gradient says which rows a loss depends
        on (see `alive.py`), and no statistics are taken.
      bases: for each EKFAC layer whose corrections are taken, the eigenbases.
      devices: axes of devices around, each with examples of its own, and whether what varies over
        them is tracked.
      ground: zero, with respect to which the tokens' gradient is taken, too: what tells that
        derivative from any other (see `_grounded`). None where there is no other.
      precision: of products.
      weights: for each loss, what the weights of its units are multiplied by; none for 1.
      weighing: whether `weights` holds tokens instead, whose gradient is the sum of the sizes of
        those weights (see `share.py`), and no statistics are taken.
      met: filled, while the backward pass is traced, with the names of the contractions that it
        comes to; it does not where no gradient passes, as behind `sign`.
    """

    layers: Mapping[str, Layer]
    kind: Kind
    tokens: Mapping[str, Statistics]
    draws: Mapping[int, Draw]
    alive: Mapping[int, jax.Array] = dataclasses.field(default_factory=dict)
    marking: bool = False
    bases: Mapping[str, Statistics] = dataclasses.field(default_factory=dict)
    devices: tuple[tuple[str, ...], bool] = ((), False)
    ground: jax.Array | None = None
    precision: Precision = HIGHEST
    weights: Mapping[int, jax.Array] = dataclasses.field(default_factory=dict)
    weighing: bool = False
    met: set[str] = dataclasses.field(default_factory=set)

    def here(self) -> Sweep:
        """The same with the types of the mesh that is set."""
        names = ("tokens", "draws", "alive", "bases", "weights")
        return dataclasses.replace(
            self, **here({name: dict(getattr(self, name)) for name in names})
        )


def evaluate(
    program: Program, inputs: Sequence[Any], sweep: Sweep, slopes: Sequence[Any] = ()
) -> tuple[list[Any], list[Any]]:
    """The outputs of the program's jaxpr, and the slopes of those that are curved parameters.

    A *slope* is the derivative of a value in the entries of the parameter that it is an elementwise
    function of (`View.curved`); None where it is one, or where the value is no such function.
    """
    jaxpr = program.jaxpr
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, jaxpr.consts, strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))
    slope: dict[Any, Any] = dict(zip(jaxpr.invars, slopes, strict=False))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, _jax.Literal) else env[atom]

    def read_slope(atom: Any) -> Any:
        return None if isinstance(atom, _jax.Literal) else slope.get(atom)

    for step in program.steps:
        values = [read(v) for v in step.equation.invars]
        known = [read_slope(v) for v in step.equation.invars]
        with _jax.context(step.equation):
            values = _cut(values, step.cut, sweep)
            for position, use in () if sweep.marking else step.broadcasts:
                if use.layer in sweep.tokens:
                    values[position] = _broadcast(step, position, use, values, known, sweep)
            if step.derive is not None:
                slopes_of = _derived(step, values, known[step.derive])
                slope.update(zip(step.equation.outvars, slopes_of, strict=True))
            outs, out_slopes = _step(step, values, known, sweep)
        env.update(zip(step.equation.outvars, outs, strict=True))
        slope.update(zip(step.equation.outvars, out_slopes, strict=False))
    return [read(v) for v in jaxpr.outvars], [read_slope(v) for v in jaxpr.outvars]


def _step(
    step: Step, values: list[Any], slopes: list[Any], sweep: Sweep
) -> tuple[list[Any], list[Any]]:
    if step.loss is not None:
        index, tag = step.loss
        answer = _weighed if sweep.weighing else _loss
        return [answer(tag, index, sweep, values)], []
    if step.use is not None and step.use.layer is not None:
        return [_contraction(step, step.use, values, slopes, sweep)], []
    if step.call is None:
        gate = step.gate if sweep.marking else None
        return bind(step.equation, values) if gate is None else _opened(step, values, gate), []
    sweep = sweep.here()
    if step.call.kind == "scan":
        return _scan(step, values, slopes, sweep), []
    if step.call.kind == "shard_map":
        return _sharded(step, values, slopes, sweep), []
    if step.call.kind == "cond":
        index, *operands = values
        branches = [
            lambda *xs, b=body, cut=cut: _cut(evaluate(b, xs, sweep, slopes[1:])[0], cut, sweep)
            for body, cut in zip(step.bodies, step.cut_outs, strict=True)
        ]
        return jax.lax.switch(index, branches, *operands), []
    (body,) = step.bodies
    if step.call.kind == "remat":
        params = step.equation.params
        run = jax.checkpoint(
            lambda xs, slopes: evaluate(body, xs, sweep, slopes),
            policy=params["policy"],
            prevent_cse=params["prevent_cse"],
        )
        return run(values, slopes)
    return evaluate(body, values, sweep, slopes)


def _cut(values: list[Any], cut: Sequence[bool], sweep: Sweep) -> list[Any]:
    pairs = zip(values, cut, strict=True)
    return [_grounded(v, sweep.ground) if off else v for v, off in pairs]


def _grounded(value: Any, ground: jax.Array | None) -> Any:
    """A value that sends no cotangent to the tokens, as under `stop_gradient`.

    A derivative of the statistics, as of a learned weight of the loss, passes: its rule is asked
    for by whoever differentiates in `ground`, and by nobody else.
    """
    if ground is None or not jnp.issubdtype(jnp.result_type(value), jnp.inexact):
        return jax.lax.stop_gradient(value)

    @jax.custom_vjp
    def grounded(value: jax.Array, ground: jax.Array) -> jax.Array:
        return value

    def backward(ground: jax.Array, g: jax.Array) -> Any:
        return None, jnp.zeros_like(ground)

    grounded.defvjp(lambda value, ground: (value, ground), backward)
    return grounded(jnp.asarray(value), *here((ground,)))


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


def _scan(step: Step, values: list[Any], slopes: list[Any], sweep: Sweep) -> list[Any]:
    call, params, (body,) = step.call, step.equation.params, step.bodies
    assert call is not None
    consts = values[: call.num_consts]
    init = values[call.num_consts : call.num_consts + call.num_carry]
    scanned = values[call.num_consts + call.num_carry :]
    stacked = {name: sweep.tokens[name] for name in step.stacked if name in sweep.tokens}
    bases = {name: sweep.bases[name] for name in step.stacked if name in sweep.bases}
    draws = {i: sweep.draws[i] for i in step.losses}
    rows = {i: sweep.alive[i] for i in step.contractions if i in sweep.alive}

    def one(carry: list[Any], slices: Any) -> tuple[list[Any], list[Any]]:
        xs, tokens, bases, drawn, alive = slices
        inner = dataclasses.replace(
            sweep,
            tokens={**sweep.tokens, **tokens},
            bases={**sweep.bases, **bases},
            draws={**sweep.draws, **drawn},
            alive={**sweep.alive, **alive},
        )
        outs, _ = evaluate(body, [*consts, *carry, *xs], inner, slopes[: call.num_consts])
        return outs[: call.num_carry], outs[call.num_carry :]

    carry, ys = jax.lax.scan(
        one,
        init,
        (scanned, stacked, bases, draws, rows),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *ys]


def _sharded(step: Step, values: list[Any], slopes: list[Any], sweep: Sweep) -> list[Any]:
    """A `shard_map`: the gradient of a token that is on every device is the sum over devices.

    The parts of a weight that is divided over devices are copies with a token each.
    """
    (body,) = step.bodies

    def own(by_name: Mapping[str, Statistics]) -> dict[str, Statistics]:
        """Of divided weights the one part that is here."""
        depths = {name: len(step.divided.get(name, ())) for name in by_name}
        return {
            name: {k: x.reshape(x.shape[depths[name] :]) for k, x in arrays.items()}
            for name, arrays in by_name.items()
        }

    def run(*operands: Any) -> list[Any]:
        *inputs, (tokens, bases, draws, weights, slopes, ground) = operands
        axes, tracked = _jax.devices_apart(step.equation)
        devices = ((*sweep.devices[0], *axes), tracked)
        inner = dataclasses.replace(
            sweep,
            tokens=own(tokens),
            bases=own(bases),
            draws=draws,
            weights=weights,
            devices=devices,
            ground=ground,
        )
        return evaluate(body, inputs, inner, slopes)[0]

    by_name = (dict(x) for x in (sweep.tokens, sweep.bases, sweep.draws, sweep.weights))
    rest = (*by_name, slopes, sweep.ground)
    spec: Any = jax.sharding.PartitionSpec
    divided = {name: spec(*step.divided.get(name, ())) for name in sweep.tokens}
    specs = (divided, {name: divided[name] for name in sweep.bases}, *[spec()] * 4)
    return _jax.shard_map(step.equation, run, values, rest, specs)


def _derived(step: Step, values: list[Any], slope: Any) -> list[jax.Array]:
    """The slopes of an equation's outputs: the derivative in the operand, times that one's slope.

    The equation takes entries to entries, so a tangent of ones gives the derivative of each.
    """
    position = step.derive
    assert position is not None

    def one(x: Any) -> Any:
        operands = [*values[:position], x, *values[position + 1 :]]
        return bind(step.equation, operands)

    x = values[position]
    if step.equation.primitive.name == "custom_vjp_call":  # which has no rule but in reverse
        (out,), pullback = jax.vjp(one, x)
        (found,) = pullback([jnp.ones_like(out)])
        return [found if slope is None else found * slope]
    return jax.jvp(one, (x,), (jnp.ones_like(x) if slope is None else slope,))[1]


def _contraction(
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


def _varying_like(statistics: Statistics, like: jax.Array) -> Statistics:
    return jax.tree.map(lambda x: _jax.varying_like(x, like), statistics)


def _like(found: Statistics, token: Statistics, g: jax.Array) -> Statistics:
    """Statistics that vary over devices as their token does, and the cotangent."""
    return jax.tree.map(_jax.varying_like, _varying_like(found, g), token)


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


def _opened(step: Step, values: list[Any], gate: int) -> list[Any]:
    """A nonlinearity that lets every cotangent through: no row is dead because units are off."""

    @jax.custom_vjp
    def opened(values: list[Any]) -> list[Any]:
        return bind(step.equation, values)

    def backward(_: None, g: list[Any]) -> Any:
        return ([g[0] if i == gate else None for i in range(len(values))],)

    opened.defvjp(lambda values: (bind(step.equation, values), None), backward)
    return opened(values)


def _broadcast(
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


def _loss(tag: LossTag, index: int, sweep: Sweep, operands: list[Any]) -> jax.Array:
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


def _weighed(tag: LossTag, index: int, sweep: Sweep, operands: list[Any]) -> jax.Array:
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


def _of_device(draw: jax.Array, z: jax.Array, sweep: Sweep) -> jax.Array:
    """A draw of its own for each device that has examples of its own."""
    if not jnp.issubdtype(draw.dtype, jax.dtypes.prng_key):
        return draw
    axes, tracked = sweep.devices
    for axis in axes:
        if not tracked or axis in _jax.varying_over(z):
            draw = jax.random.fold_in(draw, jax.lax.axis_index(axis))
    return draw
