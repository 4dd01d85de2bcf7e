"""A comparison drawn for a paper. Matplotlib is needed, and only here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from curvature.comparison.result import WHOLE, Block, Comparison, Figure, Pair
from curvature.report.labels import is_empirical, labels, pairs, styles, with_pair
from curvature.report.writing import drawable, interval, printable

_COLOURS = ("#17191c", "#1d5fb4", "#8b939c", "#8b939c", "#1d5fb4")
_LINES = ("-", "-", "--", ":", ":")
_GREY = "#c4c9cf"
_LONGEST = 34  # characters of a block's name


class _Panel(NamedTuple):
    """A panel with one point per block: a figure of the pair, or of its directions."""

    title: str
    name: str
    log: bool
    references: tuple[float, ...]

    def figure(self, pair: Pair) -> Figure | None:
        """The point of a block; None without one."""
        source = pair.directions if self in _STEPS else pair
        found = None if source is None else getattr(source, self.name)
        return found if found is not None and drawable(found, log=self.log) else None


_MATRICES = (
    _Panel("trace ratio", "trace_ratio", True, (1.0,)),
    _Panel("cosine", "cosine", False, (1.0,)),
)
_STEPS = (
    _Panel("cosine of steps", "cosine", False, (1.0,)),
    _Panel("length of steps", "length_ratio", True, (1.0,)),
    _Panel("decrease at best length", "best_decrease", False, (0.0, 1.0)),
)


def plot(comparison: Comparison, pair: tuple[str, str] | None = None, *, figure: Any = None) -> Any:
    """Draws one pair: scale, shape and steps by block; spectra; principal angles.

    Args:
      comparison: the result of `curvature.compare`.
      pair: the two kinds' names, reference first; None for the first pair with an empirical Fisher,
        or the first one where there is none.
      figure: a matplotlib figure, or subfigure, to draw on; None for a new one, as large as the
        blocks need.

    Returns:
      The figure.

    Raises:
      ImportError: there is no matplotlib.
      ValueError: no block has this pair.
    """
    try:
        from matplotlib import figure as matplotlib_figure
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib: pip install 'curvature[report]'. `Comparison.save_html` draws "
            "without it."
        ) from error
    key = _choose(comparison, pair)
    found = list(with_pair(comparison.blocks, key))
    panels = _MATRICES + (_STEPS if any(p.directions for _, p in found) else ())
    spectra = next(
        (block for block, _ in found if any(map(_largest, block.spectra.values()))), None
    )
    angles = any(p.angles for _, p in found)
    below = (spectra is not None) + angles
    forest = 0.9 + (0.26 if len(found) <= 20 else 0.16) * max(len(found), 4)
    if figure is None:
        size = (11.5 if len(panels) > 2 else 7.5, forest + (3.2 if below else 0.0))
        figure = matplotlib_figure.Figure(figsize=size, layout="constrained")
    rows = figure.add_gridspec(1 + bool(below), 1, height_ratios=[forest, 3.0][: 1 + bool(below)])
    _forest(figure, rows[0].subgridspec(1, len(panels)), panels, found)
    if below:
        places = iter(rows[1].subgridspec(1, below))
        if spectra is not None:
            _spectra(figure.add_subplot(next(places)), comparison, spectra)
        if angles:
            _angles(figure.add_subplot(next(places)), found)
    names = labels(comparison)
    a, b = (_literal(names.get(kind, kind)) for kind in key)
    figure.suptitle(f"{b} against {a}", fontsize=11)
    return figure


def _choose(comparison: Comparison, pair: tuple[str, str] | None) -> tuple[str, str]:
    keys = pairs(comparison)
    if pair is not None:
        if tuple(pair) in keys:
            return pair[0], pair[1]
        listed = ", ".join(map(str, keys)) or "none"
        raise ValueError(f"No block has the pair {pair!r}. The pairs compared: {listed}.")
    if not keys:
        notes = " ".join(comparison.notes) or "none"
        raise ValueError(f"There is no pair to draw: nothing was compared. Notes: {notes}")
    return next((key for key in keys if is_empirical(comparison, key[1])), keys[0])


def _forest(
    figure: Any, places: Any, panels: Sequence[_Panel], found: Sequence[tuple[Block, Pair]]
) -> None:
    """Panels side by side with a line for every block."""
    small = 8 if len(found) <= 20 else 6
    first = None
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(places[i], sharey=first)
        for reference in panel.references:
            axes.axvline(reference, color=_GREY, linewidth=0.8, zorder=0)
        figures = [panel.figure(pair) for _, pair in found]
        points = [(row, f) for row, f in enumerate(figures) if f is not None]
        if points:
            axes.errorbar(
                [f.value for _, f in points],
                [row for row, _ in points],
                xerr=_errors([f for _, f in points], panel.log),
                fmt="o",
                color=_COLOURS[1],
                markersize=3.5 if small == 8 else 2.5,
                elinewidth=1,
                capsize=2 if small == 8 else 1,
            )
        if panel.log and points:
            axes.set_xscale("log")
            _logarithmic(axes.xaxis)
        axes.set_title(panel.title, fontsize=9)
        axes.tick_params(labelsize=small)
        axes.grid(axis="y", color=_GREY, linewidth=0.3)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(axis="y", length=0, labelleft=first is None)
        if first is None:
            first = axes
            names = [_shown(block) for block, _ in found]
            axes.set_yticks(range(len(found)), names, parse_math=False)
            axes.set_ylim(len(found) - 0.5, -0.5)


def _logarithmic(axis: Any) -> None:
    """Few enough labels for a narrow panel, and plain numbers."""
    from matplotlib import ticker

    low, high = axis.get_view_interval()
    steps = (1.0, 2.0, 5.0) if high / low < 25 else (1.0,)
    axis.set_major_locator(ticker.LogLocator(subs=steps, numticks=6))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _spectra(axes: Any, comparison: Comparison, block: Block) -> None:
    """The largest eigenvalues of every kind on one block."""
    names, style = labels(comparison), styles(comparison)
    handles: dict[str, Any] = {}
    for kind, spectrum in block.spectra.items():
        points = [(i + 1, f) for i, f in enumerate(spectrum.largest) if drawable(f, log=True)]
        if points:
            number = style.get(kind, 4)
            label = _literal(names.get(kind, kind))
            handles[label] = _line(axes, points, number, log=True)
    axes.set_yscale("log")
    if handles:
        _logarithmic(axes.yaxis)
    _finish(axes, f"largest eigenvalues, {_shown(block)}", "number", handles)


def _angles(axes: Any, found: Sequence[tuple[Block, Pair]]) -> None:
    """Principal angles: the layers thin, the whole network with its errors."""
    handles: dict[str, Any] = {}
    for block, pair in found:
        points = [(i + 1, f) for i, f in enumerate(pair.angles) if drawable(f, log=False)]
        if not points:
            continue
        if block.name == WHOLE or len(found) == 1:
            handles[_literal(_shown(block))] = _line(axes, points, 1, log=False)
        else:
            (thin,) = axes.plot(
                [i for i, _ in points],
                [f.value for _, f in points],
                color=_COLOURS[2],
                linewidth=0.7,
                alpha=0.7,
                zorder=1,
            )
            handles["the layers"] = thin
    axes.set_ylim(-2, 92)
    axes.set_yticks([0, 30, 60, 90], ["0°", "30°", "60°", "90°"])
    _finish(axes, "principal angles", "number", handles)


def _line(axes: Any, points: Sequence[tuple[int, Figure]], style: int, *, log: bool) -> Any:
    return axes.errorbar(
        [i for i, _ in points],
        [f.value for _, f in points],
        yerr=_errors([f for _, f in points], log),
        fmt="o",
        linestyle=_LINES[style],
        color=_COLOURS[style],
        markersize=3,
        linewidth=1.3,
        elinewidth=1,
        capsize=2,
    )


def _finish(axes: Any, title: str, x_label: str, handles: Mapping[str, Any]) -> None:
    axes.set_title(title, fontsize=9, parse_math=False)
    axes.set_xlabel(x_label, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color=_GREY, linewidth=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if handles:
        # Given with its handles, because labels that start with an underscore are left out else.
        axes.legend(list(handles.values()), list(handles), fontsize=8, frameon=False)


def _errors(figures: Sequence[Figure], log: bool) -> list[list[float]]:
    """How far error bars reach down and up; on logarithmic axes they stay above zero."""
    down, up = [], []
    for figure in figures:
        low, high = interval(figure)
        reach = figure.value - low if math.isfinite(low) else 0.0
        down.append(min(reach, 0.95 * figure.value) if log else reach)
        up.append(high - figure.value if math.isfinite(high) else 0.0)
    return [down, up]


def _largest(spectrum: Any) -> bool:
    return any(drawable(figure, log=True) for figure in spectrum.largest)


def _shown(block: Block) -> str:
    name = printable(block.name)
    return name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"


def _literal(name: str) -> str:
    """A name in which dollars are no mathematics."""
    return printable(name).replace("$", r"\$")
