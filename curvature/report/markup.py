"""Pieces of the report's HTML: numbers, names, tables that sort."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from curvature.comparison.result import Figure
from curvature.report.explain import Explained
from curvature.report.writing import MISSING, write

_TALL = 24  # rows from which on a table scrolls in its own box


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
      html: what it shows.
      sort: what it is sorted by: a number, a text, or None where it has none.
    """

    html: str
    sort: float | str | None


def number(figure: Figure, digits: int = 4) -> str:
    """A figure with its error as HTML."""
    written = write(figure, digits)
    if written is None:
        return f'<span class="none">{MISSING}</span>'
    value = written.value.replace("-", "−")
    power = ""
    if written.exponent:
        power = f" × 10<sup>{str(written.exponent).replace('-', '−')}</sup>"
    if written.error is None:
        return value + power
    error = f'<span class="error">± {written.error.replace("-", "−")}</span>'
    return f"({value} {error}){power}" if power else f"{value} {error}"


def name(text: str) -> str:
    """The user's name of something, which may break after its separators."""
    return re.sub(r"([/._|])", r"\1<wbr>", escape(text))


def prose(text: str) -> str:
    """A sentence; what stands between backticks is code."""
    parts = re.split(r"`(.+?)`", text)
    said = (f"<code>{escape(x)}</code>" if i % 2 else _said(x) for i, x in enumerate(parts))
    return "".join(said)


def _said(text: str) -> str:
    """Words: no line ends between a number and its error; signs and powers of ten are typeset."""
    text = text.replace(" ± ", "\u00a0±\u00a0").replace(" %", "\u00a0%")

    def power(found: re.Match[str]) -> str:
        return f"\u00a0×\u00a010<sup>{str(int(found[1])).replace('-', '−')}</sup>"

    text = re.sub(r"(?<![^\s(])-(?=\d)", "−", escape(text))
    return re.sub(r"(?<=[\d)])e([+-]\d+)\b", power, text)


def cell(figure: Figure | None, extra: str = "", digits: int = 4) -> Cell:
    """A figure's cell, with a drawing before it."""
    if figure is None:
        return Cell(f'<span class="none">{MISSING}</span>', None)
    value = figure.value if math.isfinite(figure.value) else None
    if not extra:
        return Cell(number(figure, digits), value)
    return Cell(f'<span class="drawn">{extra}<span>{number(figure, digits)}</span></span>', value)


def table(
    label: str, heads: Sequence[Explained], rows: Sequence[Sequence[Cell]], words: int
) -> str:
    """A table in a box of its own, with buttons that sort it.

    Args:
      label: what it holds.
      heads: the heads of its columns.
      rows: its cells.
      words: how many of the first columns hold text; the others hold numbers.
    """
    head = "".join(_head(h, i < words) for i, h in enumerate(heads))
    body = "".join(
        "<tr>" + "".join(_cell(c, i, words) for i, c in enumerate(row)) + "</tr>" for row in rows
    )
    tall = " tall" if len(rows) > _TALL else ""
    return (
        f'<div class="box{tall}" role="region" aria-label="{escape(label)}" tabindex="0">'
        f'<table class="sorts"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def explained(entries: Sequence[Explained]) -> str:
    """What the columns are, to be opened."""
    items = "".join(
        f"<div><dt>{escape(e.head)}</dt><dd>{f'<p>{e.formula}</p>' if e.formula else ''}"
        f"<p>{escape(e.words)}</p></dd></div>"
        for e in entries
    )
    told = "<summary>What these figures are</summary>"
    return f'<details class="explain">{told}<dl>{items}</dl></details>'


def _head(head: Explained, text: bool) -> str:
    side = "text" if text else "figure"
    return (
        f'<th scope="col" class="{side}" aria-sort="none"><button type="button" '
        f'title="{escape(head.words)}">{escape(head.head)}</button></th>'
    )


def _cell(cell: Cell, column: int, words: int) -> str:
    sort = ""
    if isinstance(cell.sort, str):
        sort = f' data-sort="{escape(cell.sort)}"'
    elif cell.sort is not None:
        sort = f' data-sort="{cell.sort!r}"'
    if column == 0:
        return f'<th scope="row"{sort}>{cell.html}</th>'
    return f'<td class="{"text" if column < words else "figure"}"{sort}>{cell.html}</td>'
