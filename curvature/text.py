"""Tables in plain text, and numbers as JSON can have them: written once, for all that prints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Cells = Sequence[str]


def table(
    header: Cells, rows: Sequence[Cells], align: Callable[[str, int], str] = str.ljust
) -> str:
    """Columns under a ruled header, as wide as their cells; the first is aligned to the left.

    Args:
      header: the columns' names.
      rows: as many cells each.
      align: how the other columns are: `str.ljust`, or `str.rjust` for numbers.

    >>> from curvature.text import table
    >>> print(table(("layer", "size"), [("w", "7"), ("v", "12")], str.rjust))
    layer  size
    -----  ----
    w         7
    v        12
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    if align is str.ljust:  # the last one runs on
        widths[-1] = len(header[-1])

    def line(cells: Cells) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(align(*x) for x in others)]).rstrip()

    return "\n".join(map(line, (header, ["-" * w for w in widths], *rows)))


def plain(value: Any) -> Any:
    """What JSON can say of a value: null for numbers that are not finite, `a | b` for pairs.

    >>> from curvature.text import plain
    >>> plain({("a", "b"): (1.0, float("nan"))})
    {'a | b': [1.0, None]}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        keys = (" | ".join(k) if isinstance(k, tuple) else str(k) for k in value)
        return dict(zip(keys, map(plain, value.values()), strict=True))
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
