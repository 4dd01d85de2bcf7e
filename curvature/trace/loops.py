"""Slices of a stack in a loop: `w[i]` for the i of a `fori_loop` or of `scan(..., arange(n))`.

Where indices are known before the loop runs, the stack could as well be scanned over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from curvature import _jax
from curvature.trace.constants import RULES
from curvature.trace.environment import Known

Steps = np.ndarray | None  # a single number in every step of a loop, where it is known
Taken = dict[Any, tuple[int, np.ndarray]]
_NUMBERS = ("add", "convert_element_type", "ge", "lt", "max", "min", "mul", "select_n", "sub")


def taken(call: _jax.Call, operands: Sequence[Known | None], length: int) -> Taken:
    """Which variables of a scan's body are slices `w[i]` of its constants.

    Args:
      call: the scan.
      operands: what is known of its operands.
      length: how many steps it has.

    Returns:
      For each such variable, `(1,) + w.shape[1:]` in shape, the constant's place and the index in
      every step.
    """
    if not length:
        return {}
    (body,) = call.bodies
    carried = range(call.num_consts, call.num_consts + call.num_carry)
    facts: list[Steps] = []
    for i, fact in enumerate(operands):
        known = fact is not None and fact.value.ndim == (i >= carried.stop)
        value = fact.value if fact is not None and known and i not in carried else None
        facts.append(None if value is None else np.broadcast_to(value, (length,)))
    for place in carried:
        start = operands[place]
        if start is not None and start.value.ndim == 0 and start.value.dtype.kind in "iu":
            facts[place] = _counted(body, facts, place, place - carried.start, start.value, length)
    origins = {v: i for i, v in enumerate(body.invars[: carried.start])}
    found: Taken = {}
    _walk(body, facts, origins, length, found)
    return found


def _counted(
    body: _jax.Jaxpr, facts: list[Steps], place: int, out: int, start: np.ndarray, length: int
) -> Steps:
    """A carry in every step, if it grows by the same number in each."""

    def after(steps: np.ndarray) -> Steps:
        return _walk(body, [*facts[:place], steps, *facts[place + 1 :]], {}, length, {})[out]

    first = after(np.broadcast_to(start, (length,)))
    if first is None:
        return None
    steps = start + (first[0] - start) * np.arange(length, dtype=start.dtype)
    grown = after(steps)
    return steps if grown is not None and np.array_equal(grown[:-1], steps[1:]) else None


def _walk(
    body: _jax.Jaxpr,
    facts: Sequence[Steps],
    origins: Mapping[Any, int],
    length: int,
    found: Taken,
) -> list[Steps]:
    """What is known of the outputs of a body; notes the slices of what has an origin."""
    steps = dict(zip(body.invars, facts, strict=True))
    places = dict(origins)

    def read(atom: Any) -> Steps:
        if isinstance(atom, _jax.Literal):
            value = np.asarray(atom.val)
            return np.broadcast_to(value, (length,)) if value.ndim == 0 else None
        return steps.get(atom)

    for equation in body.equations:
        operands = [read(v) for v in equation.invars]
        call = _jax.call_of(equation)
        if call is not None and call.kind == "jit":
            (inner,) = call.bodies
            pairs = zip(inner.invars, equation.invars, strict=True)
            named = [(v, a) for v, a in pairs if not isinstance(a, _jax.Literal)]
            inside = {v: places[a] for v, a in named if a in places}
            outs = _walk(inner, operands, inside, length, found)
            steps.update(zip(equation.outvars, outs, strict=True))
        elif equation.primitive.name == "dynamic_slice":
            _note(equation, operands, places, found)
        elif equation.primitive.name in _NUMBERS:
            numbers = [x for x in operands if x is not None]
            if len(numbers) == len(operands) and equation.outvars[0].aval.ndim == 0:
                rule, dtype = RULES[equation.primitive.name], equation.outvars[0].aval.dtype
                steps[equation.outvars[0]] = rule(equation.params, *numbers).astype(dtype)
    return [read(v) for v in body.outvars]


def _note(
    equation: _jax.Equation, operands: Sequence[Steps], places: Mapping[Any, int], found: Taken
) -> None:
    stack, index, *others = equation.invars[0], *operands[1:]
    shape, sizes = tuple(stack.aval.shape), tuple(equation.params["slice_sizes"])
    whole = sizes == (1, *shape[1:]) and all(x is not None and not x.any() for x in others)
    if isinstance(stack, _jax.Literal) or stack not in places or index is None or not whole:
        return
    # Indices out of bounds are clipped.
    found[equation.outvars[0]] = places[stack], np.clip(index, 0, shape[0] - 1)
