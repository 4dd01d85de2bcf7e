"""Which block a layer gets: overrides by the path of its parameters, rules by layer."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import jax

from curvature.blocks import BLOCKS, blocks_for
from curvature.trace.layers import EXCLUDED, Layer, one_per_leaf

PyTree = Any


def overridden(
    layers: Sequence[Layer], pattern: str, block: str, params: PyTree
) -> tuple[Layer, ...]:
    """The layers, with `block` where their parameters match a pattern; see `Registry.override`."""
    paths = {
        jax.tree_util.keystr(p): jax.tree_util.keystr(p, simple=True, separator="/")
        for p, _ in jax.tree_util.tree_leaves_with_path(params)
    }
    hit = {
        key
        for key, path in paths.items()
        if fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*/{pattern}")
    }
    if not hit:
        raise ValueError(
            f"No parameter matches the pattern {pattern!r}. The parameters are: "
            f"{', '.join(paths.values())}."
        )
    return tuple(
        _matched(layer, block, hit, pattern) if hit.intersection(layer.parameters) else layer
        for layer in layers
    )


def ruled(layers: Sequence[Layer], rule: str | Callable[[Layer], str | None]) -> tuple[Layer, ...]:
    """The layers, each with the block that a rule names for it; see `Registry.with_blocks`."""
    inside = [layer for layer in layers if layer.block != EXCLUDED]
    chosen: dict[str, str | None]
    if isinstance(rule, str):
        chosen = {layer.name: rule for layer in inside if _obstacle(layer, rule) is None}
        if not chosen:
            why = {_obstacle(x, rule): x.name for x in inside if rule in blocks_for(x.kind)}
            reasons = "".join(f" {name!r} cannot: {obstacle}." for obstacle, name in why.items())
            if rule in BLOCKS and not why:
                kinds = ", ".join(sorted({layer.kind for layer in inside})) or "excluded"
                raise ValueError(
                    f"No layer can have the block {rule!r}: expected some layer of the kinds "
                    f"{', '.join(BLOCKS[rule].layers)}, found {kinds}."
                )
            raise ValueError(
                f"No layer can have the block {rule!r}.{reasons} The blocks are: "
                f"{', '.join(BLOCKS)}."
            )
    else:
        chosen = {layer.name: rule(layer) for layer in inside}
    blocks = [chosen.get(layer.name) for layer in layers]
    pairs = zip(layers, blocks, strict=True)
    return tuple(layer if block is None else _checked(layer, block) for layer, block in pairs)


def _matched(layer: Layer, block: str, hit: set[str], pattern: str) -> Layer:
    whole = layer.parameters
    if block != EXCLUDED:
        # A bias goes with its weight: the pattern may name the weight alone, not the bias alone.
        whole = layer.parameters[: len(one_per_leaf(layer.views[:1]))]
    missed = [path for path in whole if path not in hit]
    if missed:
        raise ValueError(
            f"The pattern {pattern!r} is ambiguous: it matches a part of layer {layer.name!r} "
            f"({', '.join(layer.parameters)}) but not {', '.join(missed)}. Match all parameters of "
            "the layer, or none."
        )
    return _checked(layer, block)


def _checked(layer: Layer, block: str) -> Layer:
    obstacle = None if block == EXCLUDED else _obstacle(layer, block)
    if obstacle is not None:
        raise ValueError(
            f"Layer {layer.name!r} ({', '.join(layer.parameters)}) is {layer.kind} and cannot have "
            f"the block {block!r}: {obstacle}."
        )
    return dataclasses.replace(layer, block=block)


def _obstacle(layer: Layer, block: str) -> str | None:
    """Why a layer cannot have a block; None where it can."""
    if block not in blocks_for(layer.kind):
        return f"expected one of {', '.join(blocks_for(layer.kind))}"
    if block == "kronecker_reduce" and layer.examples == 1:
        return (
            "it averages over the positions of every example, and the layer's examples cannot be "
            "told apart, or the batch that was registered holds a single one"
        )
    return None
