"""Where the loss's gradient comes from, besides the predictions of its tagged losses.

A penalty added to the loss, a learned weight of a loss, an optax loss beside a tagged one, a
parameter among the targets: all of these have a gradient, and no curvature. One walk forwards
through the jaxpr says where such a value meets one that depends on a tagged loss, and which
parameters it depends on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from curvature import _jax
from curvature._jax import Jaxpr, Literal
from curvature.losses import TAG
from curvature.trace import liveness
from curvature.trace.program import LossTag

Leaves = frozenset[int]
_NONE: Leaves = frozenset()


@dataclasses.dataclass(frozen=True)
class Term:
    """A value with a gradient that no tagged loss covers.

    Attributes:
      what: the primitive where it meets a tagged loss; `"targets"` where it is among its targets.
      where: the user's line.
      leaves: the indices of the parameters that it depends on.
    """

    what: str
    where: str
    leaves: tuple[int, ...]


def untagged(jaxpr: Jaxpr, count: int) -> tuple[Term, ...]:
    """The terms of the first output; the first `count` inputs of the jaxpr are the parameters."""
    inputs = [frozenset([i]) if i < count else _NONE for i in range(len(jaxpr.invars))]
    first = [i == 0 for i in range(len(jaxpr.outvars))]
    terms: list[Term] = []
    _walk(jaxpr, [False] * len(inputs), inputs, first, terms, "?")
    merged: dict[tuple[str, str], Leaves] = {}
    for term in terms:
        place = (term.what, term.where)
        merged[place] = merged.get(place, _NONE) | frozenset(term.leaves)
    return tuple(Term(*place, tuple(sorted(leaves))) for place, leaves in merged.items())


def check_covered(
    jaxpr: Jaxpr, losses: Sequence[LossTag], terms: Sequence[Term], *, used: bool
) -> None:
    """Raises where the loss, or every parameter, has nothing to do with the tagged losses.

    Args:
      jaxpr: the loss.
      losses: the tagged losses.
      terms: what `untagged` found.
      used: whether some parameter reaches the predictions of one of them.
    """
    tags = ", ".join(f"{tag.name} at {tag.location}" for tag in losses)
    if not liveness.after_loss(jaxpr, [False] * len(jaxpr.invars))[0]:
        raise ValueError(
            f"The value of the loss function does not depend on its tagged losses ({tags}), so it "
            "has no curvature: return what they give, or a function of it."
        )
    if used:
        return
    swapped = [term.where for term in terms if term.what == "targets"]
    hint = "Are all of them under stop_gradient, or is the loss one of other parameters?"
    if swapped:
        hint = f"They reach the targets at {', '.join(swapped)}: predictions come first."
    raise ValueError(
        f"No parameter reaches the predictions of a tagged loss ({tags}), so there is no curvature "
        f"at all. {hint}"
    )


def _walk(
    jaxpr: Jaxpr,
    after: Sequence[bool],
    inputs: Sequence[Leaves],
    out_live: Sequence[bool],
    terms: list[Term],
    caller: str,
) -> list[Leaves]:
    """Adds the terms in a jaxpr, and returns the parameters that its outputs depend on.

    Args:
      jaxpr: what to walk.
      after: for each input, whether it depends on a tagged loss.
      inputs: for each input, the parameters that it depends on differentiably.
      out_live: for each output, whether a gradient of the loss reaches it.
      terms: what was found so far.
      caller: the user's line of the call around it.
    """
    flows, live = liveness.live_variables(jaxpr, out_live, tags=False)
    depends = dict(zip(jaxpr.invars, inputs, strict=True))
    behind = {v for v, late in zip(jaxpr.invars, after, strict=True) if late}
    for equation, on in zip(jaxpr.equations, flows, strict=True):
        operands = [_of(depends, v) for v in equation.invars]
        late = [not isinstance(v, Literal) and v in behind for v in equation.invars]
        where = _jax.location(equation) or caller
        call = _jax.call_of(equation)
        if call is not None and call.kind != "custom_jvp":  # which has a rule of its own
            out = [v in live for v in equation.outvars]
            outs = _call(equation, call, late, operands, out, terms, where)
        else:
            outs = [_after(equation, operands)] * len(equation.outvars)
            if on:
                terms += _met(equation, late, operands, where)
        flags = liveness.after_loss_equation(equation, late)
        behind |= {v for v, flag in zip(equation.outvars, flags, strict=True) if flag}
        depends.update(zip(equation.outvars, outs, strict=True))
    return [_of(depends, v) for v in jaxpr.outvars]


def _met(
    equation: _jax.Equation, late: list[bool], operands: list[Leaves], where: str
) -> list[Term]:
    """The terms that an equation brings together with a tagged loss."""
    if equation.primitive.name == TAG:
        leaves = frozenset().union(*operands[1:])
        return [Term("targets", where, tuple(leaves))] if leaves else []
    if not any(late):
        return []
    name = equation.primitive.name
    early = [x for x, behind in zip(operands, late, strict=True) if x and not behind]
    return [Term(name, where, tuple(leaves)) for leaves in early]


def _call(
    equation: _jax.Equation,
    call: _jax.Call,
    late: list[bool],
    operands: list[Leaves],
    out_live: list[bool],
    terms: list[Term],
    where: str,
) -> list[Leaves]:
    """`_walk` of a call: of a scan in any iteration, of a cond in any branch."""
    inputs, after = operands[call.skip :], liveness.scan_fixpoint(call, late[call.skip :])
    _, out_live = liveness.live_call(call, out_live, tags=False)
    while True:
        found: list[Term] = []
        bodies = [_walk(b, after, inputs, out_live, found, where) for b in call.bodies]
        outs = [frozenset().union(*column) for column in zip(*bodies, strict=True)]
        before = list(inputs)
        for i in range(call.num_carry):
            inputs[call.num_consts + i] |= outs[i]
        if inputs == before:
            break
    name = equation.primitive.name
    terms += found
    for i, (start, behind) in enumerate(zip(late[call.skip :], after, strict=True)):
        leaves = operands[call.skip + i]  # of a carry that becomes a sum of losses
        if behind and not start and leaves and out_live[i - call.num_consts]:
            terms.append(Term(name, where, tuple(leaves)))
    for cut, returned in zip(liveness.cut_outputs(call, after), bodies, strict=True):
        for other, leaves, on in zip(cut, returned, out_live, strict=True):
            if other and leaves and on:
                terms.append(Term(name, where, tuple(leaves)))
    return outs


def _after(equation: _jax.Equation, operands: list[Leaves]) -> Leaves:
    """The parameters that an equation's outputs depend on, other than by way of a tagged loss."""
    if equation.primitive.name in ("stop_gradient", TAG):
        return _NONE
    return frozenset().union(*operands)


def _of(depends: dict[Any, Leaves], variable: Any) -> Leaves:
    """The parameters that a variable depends on; none for whole numbers."""
    if isinstance(variable, Literal):
        return _NONE
    dtype = getattr(variable.aval, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        return _NONE
    return depends.get(variable, _NONE)
