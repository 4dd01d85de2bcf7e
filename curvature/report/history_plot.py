"""A history of comparisons drawn over training steps. Matplotlib is needed, and only here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from curvature.comparison.history import FIGURES, PREFIX, points, series
from curvature.comparison.result import WHOLE, Figure
from curvature.report.writing import interval, printable

_INK, _GREY = "#17191c", "#c4c9cf"
_WRONG, _ENTROPY = "#1d5fb4", "#d9730d"
_LAYERS = 8  # up to which each has a colour and a name
_TITLES = {
    "trace_ratio": "scale: trace ratio",
    "cosine": "shape: cosine of the matrices",
    "direction_cosine": "directions: cosine of the steps",
}
_Records = Sequence[Mapping[str, float]]


def plot(records: _Records, reference: str, kind: str | None = None, *, figure: Any = None) -> Any:
    """Draws scale, shape and directions of every block, and what the model knows, over steps.

    Args:
      records: see `History`.
      reference: the first kind's name.
      kind: see `History.plot`.
      figure: see `History.plot`.

    Returns:
      The figure.
    """
    try:
        from matplotlib import figure as matplotlib_figure
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib: pip install 'curvature[report]'. `History.to_json` needs none."
        ) from error
    if not records:
        raise ValueError("There are no records to draw: no step was due yet.")
    chosen = _choose(series(records), kind)
    found = series(records)[chosen]
    blocks = list(dict.fromkeys(block for names in found.values() for block in names))
    panels = [name for name in FIGURES if name in found]
    states = [name for name in ("wrong", "entropy") if any(PREFIX + name in r for r in records)]
    if figure is None:
        wide = len(panels) + bool(states)
        figure = matplotlib_figure.Figure(figsize=(3.7 * wide, 4.1), layout="constrained")
    axes = figure.subplots(1, len(panels) + bool(states), squeeze=False)[0]
    handles: dict[str, Any] = {}
    for ax, name in zip(axes, panels, strict=False):
        _panel(ax, name, {b: points(records, name, chosen, b) for b in blocks}, handles)
    if states:
        _state(axes[-1], records, states)
    figure.suptitle(_literal(f"{chosen} against {reference}, while training"), fontsize=11)
    names = list(handles)
    longest = max(map(len, names), default=1)
    figure.legend(
        list(handles.values()),
        names,
        loc="outside lower center",
        ncols=max(1, min(len(names), 45 * len(axes) // (longest + 7))),  # what fits below
        fontsize=8,
        frameon=False,
    )
    return figure


def _choose(found: Mapping[str, Any], kind: str | None) -> str:
    if kind is not None:
        kind = kind.replace("/", "_")
    if not found or (kind is not None and kind not in found):
        listed = ", ".join(found) or "none: one kind alone has nothing to be set against"
        raise ValueError(f"The records have no kind {kind!r} to draw. Those they have: {listed}.")
    if kind is not None:
        return kind
    return next((name for name in found if "empirical" in name.lower()), next(iter(found)))


def _panel(
    axes: Any, name: str, found: Mapping[str, list[tuple[float, Figure]]], handles: dict[str, Any]
) -> None:
    """One figure: the layers thin, the whole network thick with the band of its errors."""
    axes.axhline(1.0, color=_GREY, linewidth=1.0, zorder=0)
    log = name == "trace_ratio"
    layers = [block for block in found if block != WHOLE]
    for block, line in found.items():
        line = [(step, f) for step, f in line if not log or f.value > 0]
        if not line:
            continue
        style = _style(block, layers)
        label = style.pop("label")
        steps = [step for step, _ in line]
        (drawn,) = axes.plot(steps, [f.value for _, f in line], **style)
        handles.setdefault(_literal(label), drawn)
        if block == WHOLE or len(layers) == len(found) == 1:
            low, high = zip(*(_band(f, log) for _, f in line), strict=True)
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0)
    if log:
        _logarithmic(axes)
    _finish(axes, _TITLES[name])


def _style(block: str, layers: Sequence[str]) -> dict[str, Any]:
    if block == WHOLE:
        marker = {"marker": "o", "markersize": 3.5, "zorder": 3}
        return {"color": _INK, "linewidth": 2.0, "label": WHOLE, **marker}
    if len(layers) > _LAYERS:
        return {"color": "#8b939c", "linewidth": 0.7, "alpha": 0.7, "label": "the layers"}
    # From the first layer to the last, dark to light.
    from matplotlib import colormaps

    place = layers.index(block) / max(len(layers) - 1, 1)
    return {
        "color": colormaps["viridis"](0.12 + 0.75 * place),
        "linewidth": 1.2,
        "marker": "o",
        "markersize": 2.5,
        "label": printable(block),
    }


def _band(figure: Figure, log: bool) -> tuple[float, float]:
    """The interval, or the value where it has none; above zero on a logarithmic axis."""
    low, high = interval(figure)
    if not (math.isfinite(low) and math.isfinite(high)):
        return figure.value, figure.value
    return (max(low, 0.05 * figure.value), high) if log else (low, high)


def _logarithmic(axes: Any) -> None:
    """A logarithmic axis with plain numbers, also where it spans less than a decade."""
    from matplotlib import ticker

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high / low < 4:  # room, so that noise around one does not look like an effect
        middle = (low * high) ** 0.5
        axes.set_ylim(min(low, middle / 2), max(high, middle * 2))
    steps = (1.0, 2.0, 5.0) if high / low < 50 else (1.0,)
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=steps, numticks=8))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def _state(axes: Any, records: _Records, names: Sequence[str]) -> None:
    """Wrong predictions; entropy and likelihood, which calibration makes equal, on another axis."""
    drawn = [axes, axes.twinx()][: len(names)]
    labels = {
        "wrong": "share of wrong predictions",
        "entropy": "entropy (dashed: −log likelihood), nats",
    }
    colours = {"wrong": _WRONG, "entropy": _ENTROPY}
    for ax, name in zip(drawn, names, strict=True):
        for what, line in ((name, "o-"), ("nll", "--"))[: 1 + (name == "entropy")]:
            found = [(r["step"], r[PREFIX + what]) for r in records if PREFIX + what in r]
            if found:
                ax.plot(*zip(*found, strict=True), line, color=colours[name], markersize=2.5)
        ax.set_ylabel(labels[name], color=colours[name], fontsize=8)
        ax.set_ylim(bottom=0)
        ax.tick_params(axis="y", colors=colours[name], labelsize=8)
    _finish(axes, "the model: errors and doubt", labels=False)
    for ax in drawn[1:]:
        for side in ("top", "left"):
            ax.spines[side].set_visible(False)


def _finish(axes: Any, title: str, *, labels: bool = True) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("steps", fontsize=8)
    axes.tick_params(axis="both" if labels else "x", labelsize=8)
    axes.grid(axis="y", color=_GREY, linewidth=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _literal(name: str) -> str:
    """A name in which dollars are no mathematics."""
    return printable(name).replace("$", r"\$")
