"""A comparison as one HTML file that needs nothing else: no network, no fonts, no framework."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from curvature.comparison.result import WHOLE, Comparison, Figure, Pair
from curvature.report import charts, sections, svg
from curvature.report.explain import STATE
from curvature.report.labels import (
    about,
    labels,
    layers,
    main_pairs,
    other_pairs,
    styles,
)
from curvature.report.markup import explained, name, number, prose
from curvature.report.verdicts import same_matrix
from curvature.report.words import others, paragraphs
from curvature.report.writing import angle, plural

# Nothing may be fetched, whatever a layer is called.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def save_html(comparison: Comparison, path: str | Path) -> None:
    """Writes a comparison as one self-contained HTML file.

    Args:
      comparison: the result of `curvature.compare`; what is missing in it is left out.
      path: of the file to write.
    """
    Path(path).write_text(page(comparison), encoding="utf-8")


def page(comparison: Comparison) -> str:
    """The HTML of the report."""
    shown = [
        ("summary", "Summary", _summary(comparison)),
        ("blocks", "Scale and shape", sections.block_tables(comparison)),
        ("directions", "Directions", _directions(comparison)),
        ("spectra", "Spectra", sections.spectra_table(comparison) + charts.spectra(comparison)),
        ("angles", "Principal angles", charts.angles(comparison)),
        ("structured", "Structured approximations", sections.structured_tables(comparison)),
        ("settings", "Settings", _settings(comparison)),
    ]
    shown = [section for section in shown if section[2]]
    links = "".join(f'<li><a href="#{key}">{title}</a></li>' for key, title, _ in shown)
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>'
        f"{content}</section>"
        for key, title, content in shown
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>Curvature comparison</title>
<link rel="icon" href="data:,">
<style>
{_file("report.css")}</style>
</head>
<body>
{_header(comparison)}
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main>
{body}
</main>
<script>
{_file("report.js")}</script>
</body>
</html>
"""


def _file(name: str) -> str:
    return resources.files("curvature.report").joinpath(name).read_text(encoding="utf-8")


def _header(comparison: Comparison) -> str:
    names, style = labels(comparison), styles(comparison)
    kinds = "".join(
        f"<li>{svg.key(style[kind])}<div><strong>{name(names[kind])}</strong>"
        f"{' <em>reference, A</em>' if i == 0 else ''}<p>{about(comparison, kind)}</p>"
        f"<p><code>{name(described)}</code></p></div></li>"
        for i, (kind, described) in enumerate(comparison.kinds.items())
    )
    counts = [
        plural(len(comparison.kinds), "kind") + " of curvature",
        plural(len(layers(comparison)), "layer"),
        plural(comparison.state.examples, "example"),
    ]
    whole = comparison.whole
    if whole is not None:
        counts.insert(2, plural(whole.size, "parameter"))
    return (
        '<header><p class="eyebrow">curvature.compare</p><h1>Curvature comparison</h1>'
        f'<p class="counts">{" · ".join(counts)}</p><ul class="kinds">{kinds}</ul></header>'
    )


def _summary(comparison: Comparison) -> str:
    html = _told(comparison, main_pairs(comparison), paragraphs(comparison))
    if keys := other_pairs(comparison):
        named = sections.pair_name(comparison, *keys)
        html += sections.folded(named, _told(comparison, keys, others(comparison)))
    notes = "".join(f"<li>{prose(note)}</li>" for note in comparison.notes)
    if notes:
        notes = f'<aside class="notes" aria-label="Notes"><h3>Notes</h3><ul>{notes}</ul></aside>'
    return html + notes


def _told(
    comparison: Comparison, keys: Iterable[tuple[str, str]], said: Iterable[tuple[str, str]]
) -> str:
    """Pairs in numbers, over the whole network, and in words."""
    tiles, whole = "", comparison.whole
    for key in keys:
        pair = None if whole is None else whole.pairs.get(key)
        if pair is not None and not same_matrix(pair):  # the words say all there is to that
            where = f'<span class="aside">· {WHOLE}</span>'
            tiles += f"<h3>{sections.pair_name(comparison, key)} {where}</h3>"
            tiles += f'<div class="tiles">{_tiles(pair)}</div>'
    words = "".join(
        f"<div><dt>{prose(topic)}</dt><dd>{prose(paragraph)}</dd></div>"
        for topic, paragraph in said
    )
    return f'{tiles}<dl class="words">{words}</dl>'


def _tiles(pair: Pair) -> str:
    tiles = [
        ("Scale", number(pair.trace_ratio, 3), "trace ratio"),
        ("Shape", number(pair.cosine, 3), "Frobenius cosine"),
    ]
    if pair.directions is not None:
        value, low, high = angle(pair.directions.cosine)
        degrees = number(Figure(value), 2)
        if pair.directions.cosine.error is not None:
            degrees += f'° <span class="error">{low:.0f}–{high:.0f}°</span>'
        elif value == value:
            degrees += "°"
        tiles.append(("Direction", degrees, "angle of the steps"))
        best = pair.directions.best_decrease
        tiles.append(("Progress", number(best, 2), "decrease at best length"))
    return "".join(
        f'<div class="tile"><span class="what">{what}</span><span class="value">{shown}</span>'
        f'<span class="how">{how}</span></div>'
        for what, shown, how in tiles
    )


def _directions(comparison: Comparison) -> str:
    tables = sections.direction_tables(comparison)
    if not tables:
        return ""
    return (
        '<p class="lead">The step that each kind of curvature makes of the same gradient, at '
        f"damping λ&nbsp;=&nbsp;{comparison.damping:.3g}.</p>{tables}"
    )


def _settings(comparison: Comparison) -> str:
    groups: dict[str, list[tuple[str, Any]]] = {"": [("damping", comparison.damping)]}
    for setting, value in comparison.settings.items():
        if isinstance(value, Mapping):
            groups.setdefault(str(setting), []).extend((str(k), v) for k, v in value.items())
        elif setting != "damping":
            groups[""].append((str(setting), value))
    state = dataclasses.asdict(comparison.state)
    groups["model"] = [(STATE[k].head, f"{v:.6g}") for k, v in state.items() if v is not None]
    html = ""
    for group, entries in groups.items():
        items = "".join(
            f"<div><dt>{name(key)}</dt><dd>{escape(_plain(value))}</dd></div>"
            for key, value in entries
        )
        heading = f"<h3>{name(group)}</h3>" if group else ""
        html += f"<div>{heading}<dl>{items}</dl></div>"
    return f'<div class="settings">{html}</div>{explained(list(STATE.values()))}'


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    if isinstance(value, Mapping):
        return json.dumps(value, default=str)
    return str(value)
