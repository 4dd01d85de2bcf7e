"""The coverage table: every parameter, what it is, and why."""

from __future__ import annotations

from collections.abc import Sequence

from curvature.registry.layers import Layer
from curvature.registry.plan import LossTag

_HEAD = ("parameter", "shape", "kind", "block", "uses", "reason")


def coverage(layers: Sequence[Layer]) -> float:
    """Share of parameter entries in a structured (not generic) layer; 0 without parameters."""
    total = sum(layer.size for layer in layers)
    covered = sum(layer.size for layer in layers if layer.structured)
    return covered / total if total else 0.0


def render(layers: Sequence[Layer], losses: Sequence[LossTag], batch_found: bool) -> str:
    """The table, the covered share and the tagged losses as text."""
    rows = [_HEAD]
    for layer in layers:
        for path, view in zip(layer.parameters, layer.leaves, strict=True):
            shape = "x".join(map(str, view.source_shape)) or "scalar"
            rows.append((path, shape, layer.kind, layer.block, str(layer.uses), layer.reason))
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD) - 1)]
    rule = "  ".join("-" * w for w in [*widths, len(_HEAD[-1])])

    def line(row: tuple[str, ...]) -> str:
        cells = [cell.ljust(w) for cell, w in zip(row, widths, strict=False)]
        return "  ".join([*cells, row[-1]]).rstrip()

    total = sum(layer.size for layer in layers)
    covered = sum(layer.size for layer in layers if layer.structured)
    text = [line(rows[0]), rule, *map(line, rows[1:]), ""]
    text.append(
        f"{covered:,} of {total:,} parameters ({coverage(layers):.1%}) are in structured blocks."
    )
    for tag in losses:
        times = "".join(f"{n} x " for n in tag.lead)
        shape = ", ".join(map(str, tag.z.shape))
        text.append(f"loss {tag.name} on {times}[{shape}] at {tag.location}")
    if not batch_found:
        text.append(
            "The loss could not be traced with one more example: axes of the batch's size, or else "
            "leading axes, are taken for the batch (it matters to blocks of per-example gradients "
            "and to kronecker_reduce only)."
        )
    return "\n".join(text)
