"""Evaluates a plan so that the gradient of the loss with respect to its tokens is the statistics.

The loss keeps its value. Two kinds of equations get another backward rule:

- a *layer*: one more argument, a token of zeros, whose "gradient" is the layer's statistics, made
  from the input and the output cotangent that the rule has in hand anyway;
- a *loss*: whatever cotangent w = dL/dl arrives for its units, sqrt(|w|) v leaves towards the
  network, with v as the kind of curvature says.

Everything between them is differentiated by JAX: a token of a layer whose weight is scanned is
scanned along and comes out stacked, one of a weight shared over time comes out summed, and remat,
jit and cond need no thought. Weight gradients are never asked for, so none are computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from curvature import _jax
from curvature.estimator.kinds import Draw, Kind
from curvature.estimator.statistics import Statistics, dense
from curvature.losses import OutputLoss, Targets
from curvature.precision import accumulator
from curvature.registry.layers import Layer
from curvature.registry.plan import Plan, Step


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What one backward pass brings along.

    Attributes:
      layers: the layers by name.
      kind: the source of cotangents.
      tokens: for each layer, zeros of the shape of its statistics.
      draws: for each loss, what the kind needs there.
    """

    layers: Mapping[str, Layer]
    kind: Kind
    tokens: Mapping[str, Statistics]
    draws: Mapping[int, Draw]


def evaluate(plan: Plan, inputs: Sequence[Any], sweep: Sweep) -> list[Any]:
    """The outputs of the plan's jaxpr."""
    jaxpr = plan.jaxpr
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, jaxpr.consts, strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, _jax.Literal) else env[atom]

    for step in plan.steps:
        values = [read(v) for v in step.equation.invars]
        values = [
            jax.lax.stop_gradient(v) if cut else v for v, cut in zip(values, step.cut, strict=True)
        ]
        env.update(zip(step.equation.outvars, _step(step, values, sweep), strict=True))
    return [read(v) for v in jaxpr.outvars]


def _step(step: Step, values: list[Any], sweep: Sweep) -> list[Any]:
    if step.loss is not None:
        return [_loss(step.equation.params["loss"], sweep.kind, sweep.draws[step.loss], values)]
    if step.use is not None and step.use.layer is not None:
        return [_layer(step, values, sweep)]
    if step.call is None:
        return _jax.bind(step.equation, values)
    if step.call.kind == "scan":
        return _scan(step, values, sweep)
    if step.call.kind == "cond":
        index, *operands = values
        branches = [lambda *xs, b=body: evaluate(b, xs, sweep) for body in step.bodies]
        return jax.lax.switch(index, branches, *operands)
    (body,) = step.bodies
    if step.call.kind == "remat":
        params = step.equation.params
        run = jax.checkpoint(
            lambda *xs: evaluate(body, xs, sweep),
            policy=params["policy"],
            prevent_cse=params["prevent_cse"],
        )
        return run(*values)
    return evaluate(body, values, sweep)


def _scan(step: Step, values: list[Any], sweep: Sweep) -> list[Any]:
    call, params, (body,) = step.call, step.equation.params, step.bodies
    assert call is not None
    consts = values[: call.num_consts]
    init = values[call.num_consts : call.num_consts + call.num_carry]
    scanned = values[call.num_consts + call.num_carry :]
    stacked = {name: sweep.tokens[name] for name in step.stacked}
    draws = {i: sweep.draws[i] for i in step.losses}

    def one(carry: list[Any], slices: Any) -> tuple[list[Any], list[Any]]:
        xs, tokens, drawn = slices
        inner = dataclasses.replace(
            sweep, tokens={**sweep.tokens, **tokens}, draws={**sweep.draws, **drawn}
        )
        outs = evaluate(body, [*consts, *carry, *xs], inner)
        return outs[: call.num_carry], outs[call.num_carry :]

    carry, ys = jax.lax.scan(
        one,
        init,
        (scanned, stacked, draws),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *ys]


def _layer(step: Step, values: list[Any], sweep: Sweep) -> jax.Array:
    """A dense layer whose token's gradient is its statistics."""
    use = step.use
    assert use is not None and use.contraction is not None and use.layer is not None
    how, layer = use.contraction, sweep.layers[use.layer]

    def apply(x: jax.Array, w: jax.Array) -> jax.Array:
        (y,) = _jax.bind(step.equation, (x, w) if how.operand == 0 else (w, x))
        return y

    @jax.custom_vjp
    def tapped(x: jax.Array, w: jax.Array, token: Statistics) -> jax.Array:
        return apply(x, w)

    def forward(x: jax.Array, w: jax.Array, token: Statistics) -> Any:
        return apply(x, w), (x, w, token)

    def backward(kept: Any, g: jax.Array) -> Any:
        x, w, token = kept
        (dx,) = jax.linear_transpose(lambda y: apply(y, w), x)(g)
        return dx, None, dense(layer, how, token, x, g)

    tapped.defvjp(forward, backward)
    w = jax.lax.stop_gradient(values[1 - how.operand])
    return tapped(values[how.operand], w, sweep.tokens[use.layer])


def _loss(loss: OutputLoss, kind: Kind, draw: Draw, operands: list[Any]) -> jax.Array:
    """A tagged loss that answers the cotangent w of its units with sqrt(|w|) v."""

    @jax.custom_vjp
    def tagged(z: jax.Array, targets: Targets, draw: Draw) -> jax.Array:
        return loss.value(z, targets)

    def forward(z: jax.Array, targets: Targets, draw: Draw) -> Any:
        return loss.value(z, targets), (z, targets, draw)

    def backward(kept: Any, w: jax.Array) -> Any:
        z, targets, draw = kept
        exact = z.astype(accumulator(z.dtype))
        v = kind.cotangent(loss, draw, exact, targets)
        root = jnp.sqrt(jnp.abs(w.astype(exact.dtype)))
        v = v * root.reshape(root.shape + (1,) * loss.event_ndim)
        return v.astype(z.dtype), None, None

    tagged.defvjp(forward, backward)
    z, *targets = operands
    return tagged(z, tuple(targets), draw)
