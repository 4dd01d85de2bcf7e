"""Backward passes that differ in their draws alone: what they share is done once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvature import _jax
from curvature.meshes import bind

PyTree = Any
AT_ONCE = 32  # passes vectorised together; more are run one group after another


def sum_passes(one: Callable[[PyTree], PyTree], draws: PyTree, passes: int) -> PyTree:
    """The sum of `one(draw)` over draws, vectorised in groups.

    Args:
      one: from a pass's draw to a tree of arrays.
      draws: arrays with an axis `passes` in front.
      passes: their number.
    """
    first = jax.tree.map(lambda d: d[0], draws)
    if passes == 1:
        return one(first)
    if passes > AT_ONCE:
        one = _hoisted(one, first)

    def group(part: PyTree) -> PyTree:
        return jax.tree.map(lambda s: s.sum(axis=0), jax.vmap(one)(part))

    size = math.ceil(passes / math.ceil(passes / AT_ONCE))  # equal groups, where that can be
    groups, rest = divmod(passes, size)
    total = group(jax.tree.map(lambda d: d[:size], draws))
    if groups > 1:
        parts = jax.tree.map(
            lambda d: d[size : groups * size].reshape((groups - 1, size, *d.shape[1:])), draws
        )

        def add(total: PyTree, part: PyTree) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, group(part)), None

        total, _ = jax.lax.scan(add, total, parts)
    if rest:
        total = jax.tree.map(jnp.add, total, group(jax.tree.map(lambda d: d[-rest:], draws)))
    return total


def _hoisted(one: Callable[[PyTree], PyTree], draw: PyTree) -> Callable[[PyTree], PyTree]:
    """`one`, with what does not depend on the draw (the forward pass, input moments) done here."""
    jaxpr, shapes = _jax.trace(one, draw)
    env = dict(zip(jaxpr.constvars, jaxpr.consts, strict=True))
    drawn, later = set(jaxpr.invars), []
    for equation in jaxpr.equations:
        if any(x in drawn for x in equation.invars if not isinstance(x, _jax.Literal)):
            drawn.update(equation.outvars)
            later.append(equation)
        else:
            _evaluate(equation, env)

    def rest(draw: PyTree) -> PyTree:
        values = env | dict(zip(jaxpr.invars, jax.tree.leaves(draw), strict=True))
        for equation in later:
            _evaluate(equation, values)
        out = [_read(x, values) for x in jaxpr.outvars]
        return jax.tree.unflatten(jax.tree.structure(shapes), out)

    return rest


def _evaluate(equation: _jax.Equation, values: dict[Any, Any]) -> None:
    outs = bind(equation, [_read(x, values) for x in equation.invars])
    values.update(zip(equation.outvars, outs, strict=True))


def _read(atom: Any, values: dict[Any, Any]) -> Any:
    return atom.val if isinstance(atom, _jax.Literal) else values[atom]
