"""Which values matter: what reaches a tagged loss, and what comes after one.

The curvature of a loss flows backwards from the operand z of every tagged loss. `reaches_loss`
walks backwards and finds the equations it flows through; an equation that z does not depend on (a
metric, a penalty on the weights) is no use of a parameter. `after_loss` walks forwards and finds
the values that depend on a loss; where such a value meets another one (mean loss + penalty), the
other one is cut off by `stop_gradient`, so that only the tagged losses send cotangents back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from curvature import _jax
from curvature._jax import Jaxpr, Literal
from curvature.losses import TAG

_BLOCKS_GRADIENT = ("stop_gradient",)


def has_tag(jaxpr: Jaxpr) -> bool:
    """Whether a tagged loss lies in the jaxpr, at any depth."""
    return any(
        e.primitive.name == TAG or any(has_tag(j) for j in _jax.nested(e)) for e in jaxpr.equations
    )


def reaches_output(jaxpr: Jaxpr) -> list[bool]:
    """For each input, whether a gradient of the first output may reach it.

    That is the gradient of the whole loss, whatever parts of it are tagged. It stops where JAX's
    does: at `stop_gradient`, and at what is no floating-point number.
    """
    first = [i == 0 for i in range(len(jaxpr.outvars))]
    return reaches_loss(jaxpr, first, tags=False)[1]


def reaches_loss(
    jaxpr: Jaxpr, out_live: Sequence[bool], *, tags: bool = True
) -> tuple[list[bool], list[bool]]:
    """Backward pass: (for each equation, for each input) whether curvature flows through it.

    Args:
      jaxpr: what to walk.
      out_live: for each output, whether a loss depends on it further on.
      tags: whether tagged losses are where curvature comes from. Otherwise it comes from the
        outputs alone, and tagged losses are equations like others.
    """
    equations, live = live_variables(jaxpr, out_live, tags=tags)
    return equations, [v in live for v in jaxpr.invars]


def live_variables(
    jaxpr: Jaxpr, out_live: Sequence[bool], *, tags: bool = True
) -> tuple[list[bool], set[Any]]:
    """`reaches_loss` for each equation, and the variables that curvature flows through."""
    live = {v for v, keep in zip(jaxpr.outvars, out_live, strict=True) if keep and carries(v)}
    equations = [False] * len(jaxpr.equations)
    for i in range(len(jaxpr.equations) - 1, -1, -1):
        equation = jaxpr.equations[i]
        operands = _live_operands(equation, [v in live for v in equation.outvars], tags)
        equations[i] = any(operands)
        live |= {
            v for v, keep in zip(equation.invars, operands, strict=True) if keep and carries(v)
        }
    return equations, live


def carries(variable: object) -> bool:
    """Whether a variable can carry a cotangent: not a literal, floating point."""
    if isinstance(variable, Literal):
        return False
    dtype = getattr(getattr(variable, "aval", None), "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def _live_operands(equation: _jax.Equation, out_live: list[bool], tags: bool) -> list[bool]:
    if tags and equation.primitive.name == TAG:
        return [True] + [False] * (len(equation.invars) - 1)
    call = _jax.call_of(equation)
    if call is None or (not tags and call.kind == "custom_jvp"):  # which has a rule of its own
        alive = any(out_live) and equation.primitive.name not in _BLOCKS_GRADIENT
        return [alive] * len(equation.invars)
    operands, _ = live_call(call, out_live, tags=tags)
    return [False] * call.skip + operands


def live_call(
    call: _jax.Call, out_live: Sequence[bool], *, tags: bool = True
) -> tuple[list[bool], list[bool]]:
    """For a call: which operands are live, and which outputs are, in any iteration."""
    out_live = list(out_live)
    while True:
        found = [reaches_loss(body, out_live, tags=tags)[1] for body in call.bodies]
        operands = [any(column) for column in zip(*found, strict=True)]
        # A scan's carry is live if the next iteration's is: repeat until nothing changes.
        before = list(out_live)
        for i in range(call.num_carry):
            out_live[i] |= operands[call.num_consts + i]
        if out_live == before:
            return operands, out_live


def after_loss(jaxpr: Jaxpr, inputs: Sequence[bool]) -> list[bool]:
    """Forward pass: for each output, whether its value depends on a tagged loss."""
    after = {v for v, depends in zip(jaxpr.invars, inputs, strict=True) if depends}
    for equation in jaxpr.equations:
        operands = [not isinstance(v, Literal) and v in after for v in equation.invars]
        outs = after_loss_equation(equation, operands)
        after |= {v for v, depends in zip(equation.outvars, outs, strict=True) if depends}
    return [not isinstance(v, Literal) and v in after for v in jaxpr.outvars]


def after_loss_equation(equation: _jax.Equation, operands: list[bool]) -> list[bool]:
    """`after_loss` of one equation, from its operands to its outputs."""
    if equation.primitive.name == TAG:
        return [True]
    call = _jax.call_of(equation)
    if call is None:
        return [any(operands)] * len(equation.outvars)
    inputs = scan_fixpoint(call, operands[call.skip :])
    outs = [after_loss(body, inputs) for body in call.bodies]
    # Which branch a cond takes may depend on a loss; then everything it returns does.
    chosen = any(operands[: call.skip])
    return [chosen or any(column) for column in zip(*outs, strict=True)]


def cut_outputs(call: _jax.Call, inputs: Sequence[bool]) -> list[list[bool]]:
    """For each body of a call, which of its outputs depend on a loss in other bodies alone.

    That is a branch of a cond that gives something else where another gives a loss.
    """
    outs = [after_loss(body, inputs) for body in call.bodies]
    late = [any(column) for column in zip(*outs, strict=True)]
    return [[b and not a for a, b in zip(own, late, strict=True)] for own in outs]


_WEIGHS_ALL = frozenset(
    [
        "add",
        "add_any",
        "broadcast_in_dim",
        "concatenate",
        "convert_element_type",
        "copy",
        "name",
        "neg",
        "pcast",
        "psum",
        "psum_invariant",
        "pvary",
        "reduce_sum",
        "reshape",
        "squeeze",
        "sub",
        "transpose",
    ]
)


def may_mask(equation: _jax.Equation, after: Sequence[bool], *, looped: bool) -> bool:
    """Whether what becomes of losses may leave some unit without weight.

    Sums and single numbers do not; a mask, a slice or a maximum may. In a loop, so may a number:
    it may be another one in every step.
    """
    name = equation.primitive.name
    others = [v for v, depends in zip(equation.invars, after, strict=True) if not depends]
    fixed = not looped or all(isinstance(v, Literal) for v in others)
    if not equation.outvars or (fixed and all(v.aval.size == 1 for v in equation.invars)):
        return False
    if name in ("mul", "div"):
        return len(others) != 1 or others[0].aval.size != 1 or not fixed
    return name not in _WEIGHS_ALL


def scan_fixpoint(call: _jax.Call, inputs: Sequence[bool]) -> list[bool]:
    """The inputs of a call's bodies that depend on a loss in any iteration."""
    inputs = list(inputs)
    while call.num_carry:
        outs = after_loss(call.bodies[0], inputs)
        before = list(inputs)
        for i in range(call.num_carry):
            inputs[call.num_consts + i] |= outs[i]
        if inputs == before:
            break
    return inputs
