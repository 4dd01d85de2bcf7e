"""From uses to layers: group the uses of every parameter, join biases to weights, give names."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from curvature.trace.layers import Layer, build, generic
from curvature.trace.layouts import Elementwise, Examples
from curvature.trace.program import Use
from curvature.trace.views import Joined, Shape, View, overlap, remainder

BySource = dict[Any, list[Use]]  # by leaf, and by leaves joined


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Which leaves have a gradient.

    Attributes:
      reached: leaves that a gradient of the loss reaches.
      beside: those that one reaches that no tagged loss covers (`terms`).
      stopped: leaves that met `stop_gradient`.
    """

    reached: frozenset[int]
    beside: frozenset[int]
    stopped: frozenset[int]

    def without_use(self, leaf: int) -> str:
        """Why a leaf that meets no data before a tagged loss has no curvature."""
        if leaf in self.reached:
            return "no curvature: no tagged loss depends on it, other terms of the loss do"
        if leaf in self.stopped:
            return "no curvature: it is only used under stop_gradient"
        return "no curvature: no tagged loss depends on it"


def assemble(
    uses: Sequence[Use],
    paths: Sequence[Any],
    shapes: Sequence[Shape],
    gradients: Gradients,
    batches: tuple[Examples, ...],
) -> tuple[Layer, ...]:
    """Groups uses into layers, in the order of the parameters, and names each use's layer.

    Args:
      uses: all uses of parameters that a tagged loss depends on.
      paths: the key path of each leaf.
      shapes: the shape of each leaf.
      gradients: which leaves have one.
      batches: how many examples there are.
    """
    numbers = frozenset(batch.number for batch in batches)
    uses = _nonempty(uses)
    met: BySource = {i: [] for i in range(len(paths))}
    for use in uses:
        met.setdefault(use.view.source, []).append(use)
    for source, found in met.items():
        if any(use.manual for use in found):
            tagged = [use for use in found if use.manual]
            others = [
                use
                for use in found
                if not use.manual and not any(overlap([t.view, use.view]) for t in tagged)
            ]
            met[source] = tagged + others
    for found in met.values():
        _orient(found)
    reasons = _settle_biases(met, gradients)
    layers: list[Layer] = []
    members: list[list[Use]] = []
    for leaf, path in enumerate(paths):
        sources = _sources(met, leaf)
        reason = reasons[leaf]
        if reason is not None:
            whole = View.of(leaf, shapes[leaf])
            count = sum(len(met[s]) for s in sources)
            reached = leaf in gradients.reached
            if not math.prod(shapes[leaf]):
                reason, reached = "no curvature: it has no entries", False
            layers.append(generic(path, whole, reason, count, reached=reached))
            members.append([])
            continue
        mine = [s for s in sources if s == leaf or next(s.view().leaves()).source == leaf]
        groups = [g for s in mine for g in groups_of(met[s]) if g[0].joins is None]
        for number, group in enumerate(groups):
            suffix = f"#{number}" if len(groups) > 1 else ""
            layers.append(build(group, paths, suffix, numbers))
            members.append(group)
        rest = remainder(_held(met, leaf))
        for number, view in enumerate(rest):
            reason = "no curvature: these entries do not meet the data"
            suffix = f"#rest{number}" if len(rest) > 1 else "#rest"
            reached = leaf in gradients.beside
            layers.append(generic(path, view, reason, 0, suffix, reached=reached))
            members.append([])
    names = _names(layers)
    for name, group in zip(names, members, strict=True):
        for use in group:
            use.layer = name
    pairs = zip(layers, names, strict=True)
    return tuple(dataclasses.replace(layer, name=name) for layer, name in pairs)


def _nonempty(uses: Sequence[Use]) -> list[Use]:
    """The uses of entries: one of an array of size zero adds nothing to what depends on it."""
    kept = [use for use in uses if math.prod(use.view.shape)]
    for use in kept:
        if use.joins is not None and not math.prod(use.joins.view.shape):
            use.joins = None
    return kept


def groups_of(uses: Sequence[Use]) -> list[list[Use]]:
    """Uses of one source, grouped by the entries they view."""
    groups: list[list[Use]] = []
    for use in uses:
        for group in groups:
            if group[0].view.same_as(use.view):
                group.append(use)
                break
        else:
            groups.append([use])
    return groups


def _sources(met: BySource, leaf: int) -> list[Any]:
    """What a leaf is a source of, or a part of: itself, and joined leaves."""
    joined = [s for s in met if isinstance(s, Joined)]
    return [leaf, *(s for s in joined if any(v.source == leaf for v in s.view().leaves()))]


def _held(met: BySource, leaf: int) -> list[View]:
    """The views of a leaf's entries that belong to some layer."""
    direct = [group[0].view for group in groups_of(met[leaf])]
    parts = [v for s in _sources(met, leaf)[1:] for v in s.view().leaves()]
    return direct + [part for part in parts if part.source == leaf]


def _contracts(use: Use) -> bool:
    return use.layout is not None and not isinstance(use.layout, Elementwise)


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


def _obstacles(met: BySource, gradients: Gradients) -> dict[Any, str | None]:
    """Why each source is generic, None where it is not: leaves that are joined share their fate."""
    reasons = {source: _obstacle(found) for source, found in met.items()}
    for source in met:
        if isinstance(source, int) and len(_sources(met, source)) == 1 and not met[source]:
            reasons[source] = gradients.without_use(source)
    joined = [s for s in met if isinstance(s, Joined)]
    families = [(s, {v.source for v in s.view().leaves()}) for s in joined]
    for source, leaves in families:
        views = [group[0].view for group in groups_of(met[source])]
        if reasons[source] is None and remainder(views):
            reasons[source] = f"concatenated and used in part: {met[source][0].reason}"
        if reasons[source] is None and any(overlap(_held(met, leaf)) for leaf in leaves):
            reasons[source] = f"concatenated and used elsewhere, too: {met[source][0].reason}"
    while True:
        before = dict(reasons)
        for source, leaves in families:
            family = [source, *leaves]
            reason = next((reasons[s] for s in family if reasons[s] is not None), None)
            reasons.update({s: reason for s in family if reasons[s] is None})
        if reasons == before:
            return reasons


def _obstacle(met: list[Use]) -> str | None:
    """Why a source is generic on its own account; None where it is structured."""
    for use in met:
        if use.layout is None and use.joins is None:
            return use.reason
    groups = groups_of(met)
    for group in groups:
        roles = {_contracts(use) for use in group}
        if len(roles) > 1:
            return f"a weight in one place, added or multiplied in another: {met[0].reason}"
    views = [group[0].view for group in groups]
    if overlap(views):
        return f"met in {len(views)} shapes that overlap: {met[0].reason}"
    return None


def _settle_biases(met: BySource, gradients: Gradients) -> dict[Any, str | None]:
    """Keeps a bias with its weight where every use agrees; otherwise it is a shift of its own.

    Returns why each source is generic, None where it is not.
    """
    while True:
        reasons = _obstacles(met, gradients)
        dropped = False
        for source, found in met.items():
            for group in groups_of([use for use in found if _contracts(use)]):
                added = _added_to(group, met)
                whole = reasons[source] is None and _joint(group, added, met, reasons)
                if any(added) and not whole:
                    for use in group:
                        use.bias = None
                    for bias in added:
                        if bias is not None:
                            bias.joins = None
                    dropped = True
        if not dropped:
            return reasons


def _added_to(group: list[Use], met: BySource) -> list[Use | None]:
    """For each use of a weight, the use of the bias added to its output."""
    added: list[Use | None] = []
    for use in group:
        others = met[use.bias.source] if use.bias is not None else []
        added.append(next((other for other in others if other.joins is use), None))
    return added


def _joint(
    group: list[Use],
    added: list[Use | None],
    met: BySource,
    reasons: dict[Any, str | None],
) -> bool:
    """Whether all uses of a weight have the same bias, or none, and that bias no other use.

    A use without one, as by the tangent of a layer's input or the cotangent of its output, has a
    zero where others have a one.
    """
    biases = [use for use in added if use is not None]
    apart = any(u.kind == "embedding" or u.slope is not None for u in group)
    apart |= any(u.flipped and u.bias is not None for u in group)
    first = next((u.bias for u in group if u.bias is not None), None)
    if not biases or apart or first is None:
        return False
    if not all(u.bias is None or u.bias.same_as(first) for u in group):
        return False
    same = [u for u in met[first.source] if u.view.same_as(biases[0].view)]
    return len(same) == len(biases) and reasons[first.source] is None


def _names(layers: Sequence[Layer]) -> list[str]:
    """Shortens a weight's path to the path of its module where no other layer shares it."""
    modules = [layer.name.partition("#")[0].rpartition("/")[0] for layer in layers]
    members = collections.Counter(modules)
    nested = {"/".join(m.split("/")[:n]) for m in modules for n in range(m.count("/") + 1)}
    names = []
    for layer, module in zip(layers, modules, strict=True):
        alone = layer.structured and members[module] == 1 and module not in nested
        names.append(module if alone and module else layer.name)
    return _apart(names, layers)


def _apart(names: list[str], layers: Sequence[Layer]) -> list[str]:
    """Names made unique: paths print alike where keys have slashes, or are 0 and "0".

    Such layers are named by the keys of their first parameter, `['a/b']['c']`, and numbered where
    even these are alike.
    """
    count = collections.Counter(names)
    for i, layer in enumerate(layers):
        if count[names[i]] > 1:
            _, mark, number = layer.name.rpartition("#")
            names[i] = layer.parameters[0] + (mark + number if mark else "")
    taken: set[str] = set()
    for i, name in enumerate(names):
        numbered = (f"{name}~{n}" for n in itertools.count(2))
        names[i] = next(n for n in itertools.chain([name], numbered) if n not in taken)
        taken.add(names[i])
    return names
