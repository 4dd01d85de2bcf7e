"""From uses to layers: group the uses of every parameter, join biases to weights, give names."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from curvature.registry.layers import Layer, build, generic
from curvature.registry.plan import Use
from curvature.registry.taps import Elementwise
from curvature.registry.views import Shape, View, overlap, remainder

ByLeaf = dict[int, list[Use]]


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
    by_leaf: ByLeaf = {i: [] for i in range(len(paths))}
    for use in uses:
        by_leaf[use.view.source].append(use)
    for leaf, met in by_leaf.items():
        if any(use.manual for use in met):
            by_leaf[leaf] = [use for use in met if use.manual]
    for met in by_leaf.values():
        _orient(met)
    reasons = _settle_biases(by_leaf, stopped)
    layers: list[Layer] = []
    members: list[list[Use]] = []
    for leaf, path in enumerate(paths):
        reason = reasons[leaf]
        if reason is not None:
            whole = View.of(leaf, shapes[leaf])
            layers.append(generic(path, whole, reason, len(by_leaf[leaf])))
            members.append([])
            continue
        groups = [g for g in groups_of(by_leaf[leaf]) if g[0].joins is None]
        for number, group in enumerate(groups):
            suffix = f"#{number}" if len(groups) > 1 else ""
            layers.append(build(group, paths, suffix))
            members.append(group)
        rest = remainder([group[0].view for group in groups_of(by_leaf[leaf])])
        if rest is not None:
            reason = "no curvature: these entries do not meet the data"
            layers.append(generic(path, rest, reason, 0, "#rest"))
            members.append([])
    names = _names(layers)
    for layer, group in zip(layers, members, strict=True):
        for use in group:
            use.layer = names[layer.name]
    return tuple(dataclasses.replace(layer, name=names[layer.name]) for layer in layers)


def groups_of(uses: Sequence[Use]) -> list[list[Use]]:
    """Uses of one leaf, grouped by the entries they view."""
    groups: list[list[Use]] = []
    for use in uses:
        for group in groups:
            if group[0].view.same_as(use.view):
                group.append(use)
                break
        else:
            groups.append([use])
    return groups


def _contracts(use: Use) -> bool:
    return use.how is not None and not isinstance(use.how, Elementwise)


def _orient(met: list[Use]) -> None:
    """Writes uses of a transposed weight in the coordinates of its first use (tied weights)."""
    for use in met:
        for first in met:
            if use is first:
                break
            if not (_contracts(use) and _contracts(first)) or len(use.view.inner) != 2:
                continue
            if first.view.same_as(use.view):
                break
            turned = use.view.transpose((1, 0))
            if first.view.same_as(turned):
                use.view, use.flipped = turned, not use.flipped
                break


def _obstacle(met: list[Use], stopped: bool) -> str | None:
    """Why a leaf is generic; None where it is structured."""
    if not met:
        why = "it is only used under stop_gradient" if stopped else "no tagged loss depends on it"
        return f"no curvature: {why}"
    for use in met:
        if use.how is None and use.joins is None:
            return use.reason
    free = [use for use in met if use.joins is None]
    roles = {_contracts(use) for use in free}
    if len(roles) > 1 or (free and len(free) < len(met) and roles == {True}):
        return f"a weight in one place, added or multiplied in another: {met[0].reason}"
    views = [group[0].view for group in groups_of(met)]
    if overlap(views):
        return f"met in {len(views)} shapes that overlap: {met[0].reason}"
    return None


def _settle_biases(by_leaf: ByLeaf, stopped: set[int]) -> dict[int, str | None]:
    """Keeps a bias with its weight where every use agrees; otherwise it is a shift of its own.

    Returns why each leaf is generic, None where it is not.
    """
    while True:
        reasons = {leaf: _obstacle(met, leaf in stopped) for leaf, met in by_leaf.items()}
        dropped = False
        for leaf, met in by_leaf.items():
            for group in groups_of([use for use in met if _contracts(use)]):
                added = _added_to(group, by_leaf)
                if any(added) and not (reasons[leaf] is None and _joint(group, added, by_leaf)):
                    for use in group:
                        use.bias = None
                    for bias in added:
                        if bias is not None:
                            bias.joins = None
                    dropped = True
        if not dropped:
            return reasons


def _added_to(group: list[Use], by_leaf: ByLeaf) -> list[Use | None]:
    """For each use of a weight, the use of the bias added to its output."""
    added: list[Use | None] = []
    for use in group:
        others = by_leaf[use.bias.source] if use.bias is not None else []
        added.append(next((other for other in others if other.joins is use), None))
    return added


def _joint(group: list[Use], added: list[Use | None], by_leaf: ByLeaf) -> bool:
    """Whether all uses of a weight have the same bias, and that bias no other use."""
    biases = [use for use in added if use is not None]
    if len(biases) < len(group) or any(u.flipped or u.kind == "embedding" for u in group):
        return False
    first = group[0].bias
    if first is None or not all(u.bias is not None and u.bias.same_as(first) for u in group):
        return False
    met = by_leaf[first.source]
    same = [u for u in met if u.view.same_as(biases[0].view)]
    others: list[View] = [g[0].view for g in groups_of(met)]
    unknown = any(u.how is None and u.joins is None for u in met)
    return len(same) == len(biases) and not unknown and not overlap(others)


def _names(layers: Sequence[Layer]) -> dict[str, str]:
    """Shortens a weight's path to the path of its module where no other layer shares it."""
    modules = {layer.name: layer.name.partition("#")[0].rpartition("/")[0] for layer in layers}
    members = collections.Counter(modules.values())
    nested = {"/".join(m.split("/")[:n]) for m in modules.values() for n in range(m.count("/") + 1)}
    names = {}
    for layer in layers:
        module = modules[layer.name]
        alone = layer.structured and members[module] == 1 and module not in nested
        names[layer.name] = module if alone and module else layer.name
    return names
