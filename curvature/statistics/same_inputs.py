"""Layers with the same input, such as queries, keys and values: one input factor does for all.

The factor of the first is taken, and is the others' as well: its product is made once, and over
devices it is summed once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from curvature import _jax
from curvature.statistics.factors import Statistics
from curvature.trace import Layer
from curvature.trace.analysis import Analysis
from curvature.trace.layouts import Contraction, Dense
from curvature.trace.program import Program, Step

# Blocks whose input factor is a sum over rows of the input and of nothing else.
_BLOCKS = ("kronecker", "ekfac", "foof")


def shared(
    sweep: Callable[..., dict[str, Statistics]],
    tokens: Mapping[str, Statistics],
    analysis: Analysis,
    layers: Mapping[str, Layer],
) -> dict[str, Statistics]:
    """The statistics of a sweep in which layers with the same input have one token for its factor.

    Args:
      sweep: from `tokens`, and a set `met` that it fills with the names of the contractions which
        the backward pass came to, to statistics by layer.
      tokens: zeros of their shape.
      analysis: the trace.
      layers: its layers with a block, by name.
    """
    owners = dict(layers)
    while True:
        pairs = {
            name: owner
            for name, owner in same_inputs(analysis, owners).items()
            if jax.typeof(tokens[name]["input"]) == jax.typeof(tokens[owner]["input"])
        }
        met: set[str] = set()
        asked = {
            name: {k: x for k, x in token.items() if not (name in pairs and k == "input")}
            for name, token in tokens.items()
        }
        found = sweep(asked, met=met)
        unmet = set(pairs.values()) - met
        if not unmet:
            break
        # No gradient passes from there (`sign`): its rule was never asked. Once more, without.
        owners = {name: layer for name, layer in owners.items() if name not in unmet}
    for name, owner in pairs.items():
        factor = found[owner]["input"]
        found[name]["input"] = factor if name in met else jnp.zeros_like(factor)
    return found


def same_inputs(analysis: Analysis, layers: Mapping[str, Layer]) -> dict[str, str]:
    """By the name of a layer that of an earlier one whose `input` statistics are its own, too.

    Args:
      analysis: the trace. Where rows may not count, those that do differ from layer to layer.
      layers: its layers with a block, by name.
    """
    found: dict[str, str] = {}
    if not analysis.masked:
        _among(analysis.program, layers, found)
    return found


def _among(program: Program, layers: Mapping[str, Layer], found: dict[str, str]) -> None:
    first: dict[Hashable, str] = {}
    casts: dict[Any, Hashable] = {}  # modules that cast their input do it once each
    for step in program.steps:
        equation = step.equation
        if equation.primitive.name == "convert_element_type":
            (x,), (y,) = equation.invars, equation.outvars
            if not isinstance(x, _jax.Literal):
                casts[y] = (casts.get(x, x), y.aval.dtype.name)
        kind = _kind(step, layers)
        if kind is not None:
            assert step.use is not None
            assert isinstance(step.use.layout, Contraction)
            x, name = equation.invars[step.use.layout.operand], str(step.use.layer)
            if not isinstance(x, _jax.Literal):
                owner = first.setdefault((casts.get(x, x), kind), name)
                if owner != name:
                    found[name] = owner
        for body in step.bodies:
            _among(body, layers, found)


def _kind(step: Step, layers: Mapping[str, Layer]) -> Hashable:
    """What input statistics depend on beside the input; None where that is more than it."""
    use = step.use
    layer = None if use is None else layers.get(str(use.layer))
    if use is None or layer is None or layer.block not in _BLOCKS or layer.uses != 1:
        return None
    if use.manual or use.flipped or use.slope is not None:
        return None
    layout = use.layout
    assert isinstance(layout, Contraction)
    layout = dataclasses.replace(layout, y_order=(), d_out=0)
    if isinstance(layout, Dense):
        if layout.ragged:
            return None
        layout = dataclasses.replace(layout, bias_axes=(), operand=0)
    bias = None if use.bias is None else use.bias.scale
    return (layout, bias, layer.bias, layer.stack, use.view.stack)
