"""The main figures of a comparison as text of fixed width."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from curvature.comparison.result import Block, Comparison, Figure, Pair
from curvature.report import reasons
from curvature.report.labels import pairs, with_pair
from curvature.report.verdicts import same_matrix
from curvature.report.writing import MISSING, angle, every, printable, text
from curvature.text import table as aligned

WIDTH = 100
_NAME = 16  # columns that the block's name keeps at least
_STEPS = "at best length: what B's takes off the quadratic model of A, as a share of what A's does"
_HEAD = ("block", "entries", "trace ratio", "cosine", "angle", "length", "at best length")


def table(comparison: Comparison) -> str:
    """A line for each block and pair, under a heading for each pair; then model and notes.

    The columns are those of the report: scale and shape of B against A, then the angle between
    their natural-gradient steps, how much longer B's is, and what it takes off A's quadratic model
    at its best length.
    """
    parts = [_pair(key, list(with_pair(comparison.blocks, key))) for key in pairs(comparison)]
    if not parts:
        parts = ["no two kinds of curvature could be compared"]
    notes = [_wrapped("model", sentence) for sentence in reasons.state(comparison)]
    if any(pair.directions for block in comparison.blocks for pair in block.pairs.values()):
        notes.insert(0, _wrapped("steps", f"at damping {comparison.damping:.3g}; {_STEPS}"))
    notes += [_wrapped("note", printable(note)) for note in comparison.notes]
    if notes:
        parts.append("\n".join(notes))
    return "\n\n".join(parts)


def _pair(key: tuple[str, str], found: Sequence[tuple[Block, Pair]]) -> str:
    a, b = (_short(printable(kind), 40) for kind in key)
    if len(found) > 1 and all(same_matrix(pair) for _, pair in found):
        return f"{b} against {a}\n\nthe same up to rounding in {every(len(found), 'block')}"
    rows = [_row(*x) for x in found]
    columns = len(_HEAD)
    widths: list[int] = []
    names = {row[0] for row in rows}
    for columns in range(len(_HEAD), 2, -1):  # the last ones make room for very long numbers
        widths = [max(len(row[i]) for row in (_HEAD, *rows)) for i in range(columns)]
        room = WIDTH - sum(widths[1:]) - 2 * (columns - 1)
        widths[0] = min(widths[0], max(_NAME, room))
        # ... and for names that could not be told apart when cut.
        apart = len({_short(name, widths[0]) for name in names}) == len(names)
        if widths[0] <= room and apart:
            break

    cut = [(_short(row[0], widths[0]), *row[1:columns]) for row in rows]
    return f"{b} against {a}\n\n{aligned(_HEAD[:columns], cut, str.rjust)}"


def _row(block: Block, pair: Pair) -> tuple[str, ...]:
    step = pair.directions
    return (
        printable(block.name),
        f"{block.size:,}",
        text(pair.trace_ratio, 3),
        text(pair.cosine, 3),
        _angle(step.cosine) if step else MISSING,
        text(step.length_ratio, 3) if step else MISSING,
        text(step.best_decrease, 3) if step else MISSING,
    )


def _angle(cosine: Figure) -> str:
    value, low, high = angle(cosine)
    if math.isnan(value):
        return MISSING
    if cosine.error is None:
        return f"{value:.1f}°"
    return f"{value:.0f} ± {(high - low) / 2:.0f}°"


def _short(name: str, width: int) -> str:
    """The name with its middle left out: both ends of a path tell layers apart."""
    if len(name) <= width:
        return name
    end = (width - 1) * 2 // 3
    return f"{name[: width - 1 - end]}…{name[len(name) - end :]}"


def _wrapped(what: str, told: str) -> str:
    return textwrap.fill(f"{what}: {told}", WIDTH, subsequent_indent=" " * (len(what) + 2))
