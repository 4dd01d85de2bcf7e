"""The sections of the report that are made of tables."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

from curvature.comparison.result import WHOLE, Block, Comparison, Figure
from curvature.report import explain, svg
from curvature.report.explain import Explained
from curvature.report.labels import labels, other_pairs, pairs, styles, topic, with_pair
from curvature.report.markup import Cell, cell, explained, name, number, table
from curvature.report.verdicts import same_matrix
from curvature.report.writing import angle, every

_BLOCK = Explained("block", "The layer, or all of them.")
_BAR = (5.0, 87.0)  # where the axis of a cell's drawing starts and ends


def block_tables(comparison: Comparison) -> str:
    """Scale and shape of every block, a table for each pair."""
    html, style = "", styles(comparison)
    for key in pairs(comparison):
        found = list(with_pair(comparison.blocks, key))
        ratios = svg.ratio_axis([pair.trace_ratio for _, pair in found], *_BAR)
        cosines = svg.Axis(0.0, 1.0, *_BAR)
        rows = []
        for block, pair in found:
            drawn = [
                svg.whisker(figure, axis, 1.0, f"{what} on an axis", style.get(key[1], 1))
                for what, figure, axis in (
                    ("trace ratio", pair.trace_ratio, ratios),
                    ("cosine", pair.cosine, cosines),
                )
            ]
            rows.append(
                [
                    _named(block),
                    cell(pair.trace_ratio, drawn[0]),
                    cell(pair.cosine, drawn[1]),
                    cell(pair.frobenius_distance),
                    cell(pair.spectral_distance),
                    _size(block),
                ]
            )
        heads = [_BLOCK, *explain.PAIR.values(), explain.SIZE]
        html += _titled(comparison, key, table("Scale and shape by block", heads, rows, 1))
    return html and html + explained([*explain.PAIR.values(), explain.SIZE])


def direction_tables(comparison: Comparison) -> str:
    """What the pairs do to the gradient."""
    html, style = "", styles(comparison)
    for key in pairs(comparison):
        rows = []
        kinds = style.get(key[0], 0), style.get(key[1], 1)
        for block, pair in with_pair(comparison.blocks, key):
            found = pair.directions
            if found is None:
                continue
            ends = angle(found.cosine)
            rows.append(
                [
                    _named(block),
                    _angle(found.cosine, svg.dial(*ends, kinds)),
                    cell(found.cosine),
                    cell(found.length_ratio),
                    cell(found.decrease),
                    cell(found.best_decrease),
                    cell(found.agreement),
                ]
            )
        if rows:
            heads = [_BLOCK, *explain.DIRECTIONS.values()]
            html += _titled(comparison, key, table("Directions by block", heads, rows, 1))
    return html and html + explained(list(explain.DIRECTIONS.values()))


def spectra_table(comparison: Comparison) -> str:
    """Traces and effective dimensions by block and kind."""
    names, style = labels(comparison), styles(comparison)
    sampled = any(s.sampling_error for block in comparison.blocks for s in block.spectra.values())
    columns = [e for name, e in explain.SPECTRA.items() if sampled or name != "sampling_error"]
    rows = []
    for block in comparison.blocks:
        for kind, spectrum in block.spectra.items():
            label = names.get(kind, kind)
            drawn = f'<span class="kind">{svg.key(style.get(kind, 4))}{name(label)}</span>'
            rows.append(
                [
                    _named(block),
                    Cell(drawn, label),
                    cell(spectrum.trace),
                    cell(spectrum.largest[0] if spectrum.largest else None),
                    cell(spectrum.effective_dimension),
                    cell(spectrum.sampling_error),
                ][: 2 + len(columns)]
            )
    if not rows:
        return ""
    kind_head = Explained("kind", "The kind of curvature.")
    heads = [_BLOCK, kind_head, *columns]
    return table("Spectra by block and kind", heads, rows, 2) + explained(columns)


def structured_tables(comparison: Comparison) -> str:
    """Structured approximations beside the blocks, a table for each kind; one of them open."""
    html, names = "", labels(comparison)
    head = Explained("approximation", "The structure of the block.")
    for kind in comparison.kinds:
        rows = [
            [
                _named(block),
                Cell(name(approximation), approximation),
                cell(found.trace_ratio),
                cell(found.cosine),
                cell(found.frobenius_distance),
            ]
            for block in comparison.blocks
            for approximation, found in block.structured.get(kind, {}).items()
        ]
        if rows:
            heads = [_BLOCK, head, *explain.STRUCTURED.values()]
            inside = table(f"Approximations of {names[kind]}", heads, rows, 2)
            if not html:
                html = f"<h3>{name(topic(comparison, kind))}</h3>{inside}"
            else:
                html += folded(name(topic(comparison, kind)), inside)
    return html and html + explained(list(explain.STRUCTURED.values()))


def values_table(what: str, rows: Iterable[tuple[Block, str, tuple[Figure, ...]]]) -> str:
    """Lists of figures (eigenvalues, angles) in numbers, for those who cannot see the drawings."""
    kept = [row for row in rows if row[2]]
    if not kept:
        return ""
    count = max(len(figures) for *_, figures in kept)
    heads = [_BLOCK, Explained("of", "The kind or pair of kinds.")]
    heads += [Explained(str(i + 1), f"Number {i + 1} of the {what}.") for i in range(count)]
    cells = [
        [
            _named(block),
            Cell(name(label), label),
            *(cell(figures[i] if i < len(figures) else None) for i in range(count)),
        ]
        for block, label, figures in kept
    ]
    inside = table(f"The {what} in numbers", heads, cells, 2)
    return folded(f"The {escape(what)} in numbers", inside)


def pair_name(comparison: Comparison, *keys: tuple[str, str]) -> str:
    """B against A, as HTML; with commas between pairs."""
    named = []
    for a, b in keys:
        against = f'<span class="against">against {name(labels(comparison).get(a, a))}</span>'
        named.append(f"{name(topic(comparison, b))} {against}")
    return ", ".join(named)


def _titled(comparison: Comparison, key: tuple[str, str], inside: str) -> str:
    """A pair's table under its name; folded where another pair, or a word, says as much."""
    named, found = pair_name(comparison, key), [p for _, p in with_pair(comparison.blocks, key)]
    if len(comparison.blocks) > 1 and all(map(same_matrix, found)):
        told = f"{named}: the same matrix up to rounding in {every(len(found), 'block')}"
        return folded(told, inside)
    if key in other_pairs(comparison):
        return folded(named, inside)
    return f"<h3>{named}</h3>{inside}"


def folded(told: str, inside: str) -> str:
    """Something to be opened; both are HTML."""
    return f'<details class="more"><summary>{told}</summary>{inside}</details>'


def _named(block: Block) -> Cell:
    shown = name(block.name)
    return Cell(f"<strong>{shown}</strong>" if block.name == WHOLE else shown, block.name)


def _size(block: Block) -> Cell:
    shown = f"{block.size:,}"
    if block.projected is not None:
        shown += f'<span class="aside">projected to {block.projected:,}</span>'
    return Cell(shown, block.size)


def _angle(cosine: Figure, drawing: str) -> Cell:
    value, low, high = angle(cosine)
    if math.isnan(value):
        return cell(None)
    places = 1 if high - low < 10 else 0
    shown = number(Figure(value), 3) if cosine.error is None else f"{value:.{places}f}"
    ends = "" if cosine.error is None else f'<span class="error">{low:.0f}–{high:.0f}°</span>'
    return Cell(f'<span class="drawn">{drawing}<span>{shown}° {ends}</span></span>', value)
