"""Evaluates a program so that the loss's gradient with respect to its tokens is the statistics.

Layers and losses have the backward rules of `backward_rules`. Everything between them is
differentiated by JAX: a token of a layer whose weight is scanned is scanned along and comes out
stacked, one of a weight shared over time comes out summed, and remat, jit and cond need no thought.
Weight gradients are never asked for, so none are computed.

Statistics can be differentiated themselves, with respect to the parameters (the gradient of a
trace, of the loss after a step): nothing here is cut off for good. What must not send cotangents to
the tokens ends in a rule of its own, which the outer derivative, of another order, does not see.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from curvature import _jax
from curvature.meshes import bind, here
from curvature.statistics.backward_rules import broadcast, contraction, loss, weighed
from curvature.statistics.factors import Statistics
from curvature.statistics.sweep import Sweep
from curvature.trace.program import Program, Step


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
                    values[position] = broadcast(step, position, use, values, known, sweep)
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
        answer = weighed if sweep.weighing else loss
        return [answer(tag, index, sweep, values)], []
    if step.use is not None and step.use.layer is not None:
        return [contraction(step, step.use, values, slopes, sweep)], []
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


def _opened(step: Step, values: list[Any], gate: int) -> list[Any]:
    """A nonlinearity that lets every cotangent through: no row is dead because units are off."""

    @jax.custom_vjp
    def opened(values: list[Any]) -> list[Any]:
        return bind(step.equation, values)

    def backward(_: None, g: list[Any]) -> Any:
        return ([g[0] if i == gate else None for i in range(len(values))],)

    opened.defvjp(lambda values: (bind(step.equation, values), None), backward)
    return opened(values)
