"""The coverage table: every parameter, what it is, and why."""

from __future__ import annotations

from collections.abc import Sequence

from curvature.text import table as aligned
from curvature.trace.layers import Layer
from curvature.trace.program import LossTag
from curvature.trace.terms import Term

_HEAD = ("parameter", "shape", "kind", "block", "uses", "reason")


def coverage(layers: Sequence[Layer]) -> float:
    """Share of parameter entries with a gradient that are in a structured layer; 0 without any."""
    total = sum(layer.size for layer in layers if layer.reached)
    covered = sum(layer.size for layer in layers if layer.structured)
    return covered / total if total else 0.0


def render(
    layers: Sequence[Layer],
    losses: Sequence[LossTag],
    terms: Sequence[Term],
    names: Sequence[str],
    batch_found: bool,
) -> str:
    """The table, the covered share, the tagged losses and what else has a gradient, as text.

    Args:
      layers: the layers.
      losses: the tagged losses.
      terms: the untagged terms.
      names: the key path of every leaf.
      batch_found: whether a larger batch could be traced.
    """
    rows: list[tuple[str, ...]] = []
    for layer in layers:
        for path, view in zip(layer.parameters, layer.leaves, strict=True):
            shape = "x".join(map(str, view.source_shape)) or "scalar"
            rows.append((path, shape, layer.kind, layer.block, str(layer.uses), layer.reason))
    total = sum(layer.size for layer in layers if layer.reached)
    covered = sum(layer.size for layer in layers if layer.structured)
    text = [aligned(_HEAD, rows), ""]
    text.append(
        f"{covered:,} of {total:,} parameters ({coverage(layers):.1%}) are in structured blocks."
    )
    idle = [layer for layer in layers if not layer.reached]
    if idle:
        paths = dict.fromkeys(path for layer in idle for path in layer.parameters)
        text.append(
            f"{sum(layer.size for layer in idle):,} more have no gradient (unused, frozen, or rows "
            f"that are never read) and do not count: {_some(list(paths))}."
        )
    for tag in losses:
        times = "".join(f"{n} x " for n in tag.lead)
        shape = ", ".join(map(str, tag.z.shape))
        text.append(f"loss {tag.name} on {times}[{shape}] at {tag.location}")
    for term in terms:
        named = _some([names[leaf] for leaf in term.leaves])
        text.append(
            f"The loss has a gradient that no tagged loss covers: {named} in {term.what} at "
            f"{term.where}."
        )
    text += meetings(layers)
    blind = [layer for layer in layers if layer.unbatched and layer.structured]
    if blind:
        text.append(
            f"Some uses of {_some([x.name for x in blind])} do not see the data, or not all "
            "examples at once: their cotangents are sums over examples, with a random sign for "
            "each."
        )
    if not batch_found:
        text.append(
            "The loss could not be traced with one more example: axes of the batch's size, or else "
            "leading axes, are taken for the batch (it matters to blocks of per-example gradients "
            "and to kronecker_reduce only)."
        )
    return "\n".join(text)


def meetings(layers: Sequence[Layer]) -> list[str]:
    """Where examples meet each other, before which layers, and what that does to their blocks."""
    mixed = [layer for layer in layers if layer.mixed]
    if not mixed:
        return []
    places = list(dict.fromkeys(layer.meeting for layer in mixed))
    return [
        f"Examples meet ({_some(places)}) between a loss and {_some([x.name for x in mixed])}: "
        "every kind of curvature takes a random sign for each example there. Blocks of per-example "
        "gradients (diagonal, dense, identity, EKFAC) then square the sum over the batch: right in "
        "the mean, and noisy. Kronecker blocks add up rows as ever, as if none had met."
    ]


def _some(names: Sequence[str]) -> str:
    """The first few of some names."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
