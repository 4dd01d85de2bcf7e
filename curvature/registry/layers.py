"""Layers: which parameters belong together, and the coordinates in which their block acts.

A layer's *block coordinates* are an array of shape `stack + (d_in [+ 1], d_out)` for a dense layer
(the bias is the last row: a homogeneous coordinate) or the parameter's own shape for a generic one.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from curvature.precision import accumulator
from curvature.registry.plan import Use
from curvature.registry.views import Shape, View, partitions

BLOCKS = {"dense": ("kronecker", "diagonal"), "generic": ("diagonal",)}


@dataclasses.dataclass(frozen=True)
class Layer:
    """Parameters that share one curvature block.

    Attributes:
      name: unique name, the path its parameters share.
      kind: `"dense"` or `"generic"`.
      parameters: key paths of its parameters, as `jax.tree_util.keystr` prints them.
      block: `"kronecker"` or `"diagonal"`.
      reason: where the layer is in the user's code, or why it is generic.
      uses: number of equations in which it meets the data.
      views: for each parameter, the entries that belong to the layer.
      stack: sizes of the axes along which a scan stacks independent copies of the layer.
      shared: whether one copy is used several times (a recurrent or shared layer).
      examples: number of leading rows of its input, 0 for a generic layer.
    """

    name: str
    kind: str
    parameters: tuple[str, ...]
    block: str
    reason: str
    uses: int
    views: tuple[View, ...]
    stack: Shape = ()
    shared: bool = False
    examples: int = 0

    @property
    def bias(self) -> bool:
        """Whether the last row of the block coordinates is a bias."""
        return len(self.views) == 2

    @property
    def shape(self) -> Shape:
        """The shape of the block coordinates."""
        first = self.views[0].shape
        return (*first[:-2], first[-2] + 1, first[-1]) if self.bias else first

    @property
    def structured(self) -> bool:
        """Whether the layer is known, not generic."""
        return self.kind != "generic"

    @property
    def size(self) -> int:
        """Number of parameter entries in the layer."""
        size = 1
        for n in self.shape:
            size *= n
        return size

    def gather(self, leaves: Sequence[jax.Array]) -> jax.Array:
        """The layer's block coordinates, at least float32, from the leaves of a tree."""
        dtype = accumulator(*(leaves[v.source].dtype for v in self.views))
        parts = [view(leaves[view.source]).astype(dtype) for view in self.views]
        if not self.bias:
            return parts[0]
        weight, bias = parts
        return jnp.concatenate([weight, bias[..., None, :]], axis=-2)

    def scatter(self, block: jax.Array) -> dict[int, jax.Array]:
        """Leaf-shaped arrays by leaf, from block coordinates; zero outside the layer's views."""
        if not self.bias:
            return {self.views[0].source: self.views[0].adjoint(block)}
        weight, bias = block[..., :-1, :], block[..., -1, :]
        return {v.source: v.adjoint(x) for v, x in zip(self.views, (weight, bias), strict=True)}


def assemble(
    uses: Sequence[Use], paths: Sequence[Any], shapes: Sequence[Shape], stopped: set[int]
) -> tuple[Layer, ...]:
    """Groups uses into layers, in the order of the parameters, and names each use's layer.

    Args:
      uses: all uses of parameters that a tagged loss depends on.
      paths: the key path of each leaf.
      shapes: the shape of each leaf.
      stopped: leaves that met `stop_gradient`.
    """
    by_leaf: dict[int, list[tuple[View, Use]]] = {i: [] for i in range(len(paths))}
    for use in uses:
        by_leaf[use.view.source].append((use.view, use))
        if use.bias is not None:
            by_leaf[use.bias.source].append((use.bias, use))
    reasons = {i: _obstacle(i, met, i in stopped) for i, met in by_leaf.items()}
    _settle_biases(uses, by_leaf, reasons)
    layers = []
    for leaf, path in enumerate(paths):
        reason = reasons[leaf]
        if reason is not None:
            text = jax.tree_util.keystr(path)
            view = View.of(leaf, shapes[leaf])
            name = _slashed(path) or "parameters"
            met = len(by_leaf[leaf])
            layers.append(Layer(name, "generic", (text,), "diagonal", reason, met, (view,)))
            continue
        weights = [u for v, u in by_leaf[leaf] if v is u.view]
        groups = _same(weights)
        for number, group in enumerate(groups):
            suffix = f"#{number}" if len(groups) > 1 else ""
            layers.append(_dense_layer(group, paths, suffix))
    return _uniquely_named(layers, uses)


def _obstacle(leaf: int, met: list[tuple[View, Use]], stopped: bool) -> str | None:
    """Why a leaf is generic whatever the other leaves are; None where it may be structured."""
    if not met:
        why = "it is only used under stop_gradient" if stopped else "no tagged loss depends on it"
        return f"no curvature: {why}"
    for _, use in met:
        if use.contraction is None:
            return use.reason
    roles = {view is use.view for view, use in met}
    if len(roles) > 1:
        return f"weight in one place and bias in another: {met[0][1].reason}"
    distinct: list[View] = []
    for view, _ in met:
        if not any(view.same_as(other) for other in distinct):
            distinct.append(view)
    return partitions(distinct)


def _settle_biases(
    uses: Sequence[Use],
    by_leaf: Mapping[int, list[tuple[View, Use]]],
    reasons: dict[int, str | None],
) -> None:
    """Keeps a bias with its weight where every use agrees; otherwise the bias is generic."""
    changed = True
    while changed:
        changed = False
        for group in _same([u for u in uses if u.contraction and reasons[u.view.source] is None]):
            biases = [u.bias for u in group]
            first = biases[0]
            agree = all(
                b is None if first is None else b is not None and b.same_as(first) for b in biases
            )
            if not agree or (first is not None and reasons[first.source] is not None):
                for use in group:
                    if use.bias is not None:
                        reasons[use.bias.source] = reasons[use.bias.source] or (
                            f"not added at every use of its weight: {use.reason}"
                        )
                        use.bias = None
                        changed = True
        for leaf, met in by_leaf.items():
            if reasons[leaf] is not None:
                continue
            for view, use in met:
                weight = reasons[use.view.source]
                if view is not use.view and weight is not None:
                    reasons[leaf] = f"bias of a generic weight ({weight})"
                    changed = True
                    break
            else:
                if _serves_two(met):
                    reasons[leaf] = f"bias of several layers: {met[0][1].reason}"
                    changed = True


def _serves_two(met: list[tuple[View, Use]]) -> bool:
    """Whether one bias view is added to the outputs of different weights."""
    return any(
        v is not u.view and v.same_as(w) and not u.view.same_as(o.view)
        for (v, u), (w, o) in itertools.combinations(met, 2)
    )


def _same(uses: Sequence[Use]) -> list[list[Use]]:
    """Uses grouped by their weight, in order."""
    by_leaf: dict[int, list[list[Use]]] = {}
    for use in uses:
        groups = by_leaf.setdefault(use.view.source, [])
        for group in groups:
            if group[0].view.same_as(use.view):
                group.append(use)
                break
        else:
            groups.append([use])
    return [group for groups in by_leaf.values() for group in groups]


def _dense_layer(group: list[Use], paths: Sequence[Any], suffix: str) -> Layer:
    use = group[0]
    views = (use.view,) if use.bias is None else (use.view, use.bias)
    owned = [paths[v.source] for v in views]
    name = _slashed(owned[0]) + suffix
    for member in group:
        member.layer = name
    free = [[s for s in u.loops if s not in u.view.stack] for u in group]
    return Layer(
        name,
        "dense",
        tuple(jax.tree_util.keystr(p) for p in owned),
        "kronecker",
        use.reason,
        len(group),
        views,
        stack=use.view.stacked,
        shared=len(group) > 1 or any(free),
        examples=use.examples,
    )


def _slashed(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _uniquely_named(layers: list[Layer], uses: Sequence[Use]) -> tuple[Layer, ...]:
    """Shortens a weight's path to the path of its module where no other layer shares it."""
    modules = {layer.name: layer.name.partition("#")[0].rpartition("/")[0] for layer in layers}
    members = collections.Counter(modules.values())
    nested = {"/".join(m.split("/")[:n]) for m in modules.values() for n in range(m.count("/") + 1)}
    names = {}
    for layer in layers:
        module = modules[layer.name]
        alone = layer.structured and members[module] == 1 and module not in nested
        names[layer.name] = module if alone and module else layer.name
    for use in uses:
        use.layer = names[use.layer] if use.layer else None
    return tuple(dataclasses.replace(layer, name=names[layer.name]) for layer in layers)
