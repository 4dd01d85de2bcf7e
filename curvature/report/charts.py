"""The parts of the report that are drawn: eigenvalues, their density, principal angles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from curvature.comparison.result import Block, Comparison, Figure
from curvature.report import explain, svg
from curvature.report.labels import labels, main_pairs, other_pairs, styles
from curvature.report.markup import name
from curvature.report.sections import folded, pair_name, values_table
from curvature.report.svg import Series
from curvature.report.writing import plural

_SHOWN = 15  # blocks that are drawn at once; of more, the first twelve: whole rows of 2, 3 or 4
_FIRST = 12


def spectra(comparison: Comparison) -> str:
    """The largest eigenvalues of every kind on every block, and how all of them are spread."""
    names, style = labels(comparison), styles(comparison)

    def largest(block: Block) -> str:
        series = [
            Series(names.get(kind, kind), style.get(kind, 4), _points(spectrum.largest))
            for kind, spectrum in block.spectra.items()
        ]
        label = f"Largest eigenvalues of {block.name}"
        return svg.chart(series, label, "number of the eigenvalue", log=True)

    def density(block: Block) -> str:
        bins = [(style.get(kind, 4), s.density) for kind, s in block.spectra.items()]
        return svg.steps(bins, f"Density of eigenvalues of {block.name}")

    drawn, spread = _grid(comparison.blocks, largest), _grid(comparison.blocks, density)
    html = ""
    if drawn:
        html += f"<h3>Largest eigenvalues</h3>{legend(comparison)}{drawn}"
        html += values_table(
            "largest eigenvalues",
            [
                (block, names.get(kind, kind), spectrum.largest)
                for block in comparison.blocks
                for kind, spectrum in block.spectra.items()
            ],
        )
    if spread:
        html += folded("How many eigenvalues there are, by size", f"{legend(comparison)}{spread}")
    return html


def angles(comparison: Comparison) -> str:
    """Principal angles of every pair on every block."""
    html = _angles(comparison, main_pairs(comparison))
    keys = other_pairs(comparison)
    others = _angles(comparison, keys)
    html += others and folded(pair_name(comparison, *keys), others)
    return html and f'<p class="lead">{escape(explain.ANGLES.words)}</p>{html}'


def _angles(comparison: Comparison, keys: Sequence[tuple[str, str]]) -> str:
    """Those of some pairs."""
    names, style = labels(comparison), styles(comparison)
    drawn_keys = [
        k for k in keys if any(k in b.pairs and b.pairs[k].angles for b in comparison.blocks)
    ]
    if not drawn_keys:
        return ""
    # A pair is drawn in the style of the kind that is not the reference while that tells them apart
    seconds = {key: style.get(key[1], 4) for key in drawn_keys}
    if len(set(seconds.values())) < len(drawn_keys):
        seconds = {key: i + 1 for i, key in enumerate(drawn_keys)}

    def draw(block: Block) -> str:
        series = [
            Series(" | ".join(key), min(seconds[key], 4), _points(block.pairs[key].angles))
            for key in drawn_keys
            if key in block.pairs
        ]
        label = f"Principal angles of {block.name} in degrees"
        return svg.chart(series, label, "number of the angle", log=False, low=0.0, high=90.0)

    items = "".join(
        f"<li>{svg.key(min(seconds[key], 4))}{pair_name(comparison, key)}</li>"
        for key in drawn_keys
    )
    rows = [
        (
            block,
            " : ".join(names.get(kind, kind) for kind in reversed(key)),
            block.pairs[key].angles,
        )
        for block in comparison.blocks
        for key in drawn_keys
        if key in block.pairs
    ]
    return (
        f'<ul class="legend">{items}</ul>'
        + _grid(comparison.blocks, draw)
        + values_table(explain.ANGLES.head, rows)
    )


def legend(comparison: Comparison) -> str:
    """The kinds and how they are drawn."""
    names, style = labels(comparison), styles(comparison)
    items = "".join(
        f"<li>{svg.key(style[kind])}{name(names[kind])}</li>" for kind in comparison.kinds
    )
    return f'<ul class="legend">{items}</ul>'


def _points(figures: Sequence[Figure]) -> list[tuple[float, Figure]]:
    return [(i + 1.0, figure) for i, figure in enumerate(figures)]


def _size(block: Block) -> str:
    projected = f", projected to {block.projected:,}" if block.projected else ""
    return f"n = {block.size:,}{projected}"


def _grid(blocks: Sequence[Block], draw: Callable[[Block], str]) -> str:
    """A drawing for every block that has one."""
    drawn = [
        f"<figure><figcaption>{name(block.name)} <span>{_size(block)}</span></figcaption>"
        f"{picture}</figure>"
        for block in blocks
        if (picture := draw(block))
    ]
    if not drawn:
        return ""
    first = len(drawn) if len(drawn) <= _SHOWN else _FIRST
    html = f'<div class="grid">{"".join(drawn[:first])}</div>'
    if drawn[first:]:
        more = plural(len(drawn) - first, "more block")
        html += folded(more, f'<div class="grid">{"".join(drawn[first:])}</div>')
    return html
