"""Drawings for the report, as inline SVG that takes its colours from the page's style sheet.

Classes `k0`, `k1`, ... stand for the kinds; nothing here names a colour.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from html import escape

from curvature.comparison.result import Figure
from curvature.report.writing import drawable, interval

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_WIDTH, _HEIGHT = 320, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 10, 30


@dataclasses.dataclass(frozen=True)
class Axis:
    """A map from values to pixels.

    Attributes:
      low: the value at the start.
      high: the value at the end.
      start: pixel of the start.
      end: pixel of the end.
      log: whether values are drawn by their logarithms.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value; values outside are drawn at the end."""
        low, high = self.low, self.high
        if self.log:
            value = math.log10(value) if value > 0 else -math.inf
            low, high = math.log10(low), math.log10(high)
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """A few round values."""
        if self.log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            step = max(1, math.ceil((last - first) / 4))
            return [10.0**power for power in range(first, last + 1, step)]
        wide = self.high - self.low
        unit = 10.0 ** math.floor(math.log10(wide))
        gap = next(g for g in (unit / 5, unit / 2, unit, 2 * unit) if wide / g <= 6)
        first, last = math.ceil(self.low / gap - 1e-9), math.floor(self.high / gap + 1e-9)
        return [i * gap for i in range(first, last + 1)]


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
      name: what it is.
      style: number of its class.
      points: x and figure.
    """

    name: str
    style: int
    points: Sequence[tuple[float, Figure]]


def log_axis(values: Sequence[float], start: float, end: float) -> Axis | None:
    """An axis of whole decades around positive values; None without any."""
    known = [v for v in values if math.isfinite(v) and v > 0]
    if not known:
        return None
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    return Axis(10.0**low, 10.0 ** max(high, low + 1), start, end, log=True)


def decade(value: float) -> str:
    """A tick of a logarithmic axis: `10⁻³`, `1`."""
    power = round(math.log10(value))
    return {0: "1", 1: "10"}.get(power, "10" + str(power).translate(_SUPERSCRIPTS))


def ratio_axis(ratios: Sequence[Figure], start: float, end: float) -> Axis:
    """A logarithmic axis with these ratios, their errors and one."""
    known = [ratio for ratio in ratios if drawable(ratio, log=True)]
    ends = [1.0]
    for ratio in known:
        low, high = interval(ratio)
        # Errors that reach down to zero, or up to anywhere, run out of the drawing.
        ends += [max(low, ratio.value / 5), min(high, 5 * ratio.value)]
    return Axis(min(ends) / 1.2, max(ends) * 1.2, start, end, log=True)


def whisker(figure: Figure, axis: Axis, reference: float, label: str, style: int) -> str:
    """A point with its error in a table's cell, and a line at the reference value."""
    width = axis.start + axis.end  # as much room on either side
    line = axis(reference)
    inside = f'<path class="track" d="M{axis.start} 9H{axis.end}"/>'
    inside += f'<path class="zero" d="M{line} 2V16"/>'
    if drawable(figure, log=axis.log):
        low, high = interval(figure)
        if figure.error is not None:
            inside += f'<path class="error k{style}" d="M{axis(low)} 9H{axis(high)}"/>'
        inside += f'<circle class="dot k{style}" cx="{axis(figure.value)}" cy="9" r="3"/>'
    return _svg(width, 18, label, inside, "whisker")


def dial(value: float, low: float, high: float, styles: tuple[int, int]) -> str:
    """The direction of B's step beside that of A's, which points to the right."""
    if not math.isfinite(value):
        return ""
    length, x, y = 17, 18, 19

    def end(degrees: float, radius: float) -> str:
        angle = math.radians(degrees)
        return f"{x + radius * math.cos(angle):.1f} {y - radius * math.sin(angle):.1f}"

    inside = (
        f'<path class="track" d="M{end(0, length)}A{length} {length} 0 0 0 {end(180, length)}"/>'
    )
    if high - low > 0.5:
        inside += (
            f'<path class="fan k{styles[1]}" d="M{x} {y}L{end(low, length)}'
            f'A{length} {length} 0 0 0 {end(high, length)}Z"/>'
        )
    inside += f'<path class="ray k{styles[0]}" d="M{x} {y}L{end(0, length)}"/>'
    inside += f'<path class="ray k{styles[1]}" d="M{x} {y}L{end(value, length)}"/>'
    return _svg(2 * x, 21, f"an angle of {value:.0f} degrees", inside, "dial")


def chart(
    series: Sequence[Series],
    label: str,
    x_label: str,
    *,
    log: bool,
    low: float | None = None,
    high: float | None = None,
) -> str:
    """Lines with error bars; empty where nothing can be drawn.

    Args:
      series: the lines; x counts from 1.
      label: what it shows, for those who cannot see it.
      x_label: below the horizontal axis.
      log: whether the vertical axis is logarithmic; values of zero and less are then left out.
      low: the lowest value of a linear vertical axis.
      high: the highest one.
    """
    kept = [
        dataclasses.replace(s, points=[p for p in s.points if drawable(p[1], log=log)])
        for s in series
    ]
    values = [figure.value for s in kept for _, figure in s.points]
    if not values:
        return ""
    bottom, top = _HEIGHT - _BOTTOM, _TOP
    if log:
        y = log_axis(values, bottom, top)
    else:
        y = Axis(
            min(values) if low is None else low, max(values) if high is None else high, bottom, top
        )
    assert y is not None
    count = max(x for s in kept for x, _ in s.points)
    x = Axis(0.5, max(count, 2) + 0.5, _LEFT, _WIDTH - _RIGHT)
    x_ticks = [(v, f"{v:g}") for v in x.ticks() if v == int(v) and v >= 1]
    if high == 90:
        y_ticks = [(v, f"{v:g}°") for v in (0.0, 30.0, 60.0, 90.0)]
    else:
        y_ticks = [(v, decade(v) if log else f"{v:g}") for v in y.ticks()]
    inside = _frame(x, y, x_ticks, y_ticks, x_label)
    for s in kept:
        inside += _line(s, x, y)
    return _svg(_WIDTH, _HEIGHT, label, inside, "chart")


def steps(densities: Sequence[tuple[int, Sequence[tuple[float, float]]]], label: str) -> str:
    """Numbers of eigenvalues by their size, as outlines.

    Args:
      densities: for every kind its style, and pairs of log10 of a bin's middle and a count.
      label: what it shows.
    """
    known = [
        (style, sorted(p for p in bins if abs(p[0]) < 100 and math.isfinite(p[1])))
        for style, bins in densities
    ]
    known = [(style, bins) for style, bins in known if bins]
    if not known:
        return ""
    gaps = [b[0] - a[0] for _, bins in known for a, b in itertools.pairwise(bins)]
    half = (min((gap for gap in gaps if gap > 1e-3), default=1.0)) / 2
    first = min(bins[0][0] for _, bins in known) - half
    last = max(bins[-1][0] for _, bins in known) + half
    most = max(count for _, bins in known for _, count in bins)
    x = Axis(first, last, _LEFT, _WIDTH - _RIGHT)
    y = Axis(0.0, 1.05 * most if most > 1e-6 else 1.0, _HEIGHT - _BOTTOM, _TOP)
    x_ticks = [(v, decade(10.0**v)) for v in x.ticks() if v == int(v)]
    y_ticks = [(v, f"{v:,g}") for v in y.ticks()]
    inside = _frame(x, y, x_ticks, y_ticks, "eigenvalue")
    for style, bins in known:
        path, right = "", -math.inf
        for middle, count in bins:
            if middle - half > right + half / 10:  # a gap: the outline goes down and starts anew
                path += f"V{y(0)}" if path else ""
                path += f"M{x(middle - half)} {y(0)}"
            right = middle + half
            path += f"V{y(count)}H{x(right)}"
        inside += f'<path class="line k{style}" d="{path}V{y(0)}"/>'
    return _svg(_WIDTH, _HEIGHT, label, inside, "chart")


def key(style: int) -> str:
    """The line of a legend."""
    line = f'<path class="line k{style}" d="M1 7H25"/>'
    dot = f'<circle class="dot k{style}" cx="13" cy="7" r="3"/>'
    box = 'class="key" viewBox="0 0 26 14" width="26" height="14" aria-hidden="true"'
    return f"<svg {box}>{line}{dot}</svg>"


def _line(series: Series, x: Axis, y: Axis) -> str:
    points = [(x(at), y(figure.value), figure) for at, figure in series.points]
    if not points:
        return ""
    style, inside = f"k{series.style}", ""
    for px, _, figure in points:
        if figure.error is not None and math.isfinite(figure.error):
            low, high = interval(figure)
            inside += f'<path class="error {style}" d="M{px} {y(low)}V{y(high)}"/>'
    path = "L".join(f"{px} {py}" for px, py, _ in points)
    inside += f'<path class="line {style}" d="M{path}"/>'
    for px, py, _ in points:
        inside += f'<circle class="dot {style}" cx="{px}" cy="{py}" r="2.5"/>'
    return f"<g><title>{escape(series.name)}</title>{inside}</g>"


def _frame(
    x: Axis,
    y: Axis,
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    x_label: str,
) -> str:
    """Grid lines, ticks and the label of the horizontal axis."""
    inside = ""
    for value, name in y_ticks:
        inside += f'<path class="grid" d="M{x.start} {y(value)}H{x.end}"/>'
        inside += f'<text class="tick end" x="{x.start - 6}" y="{y(value) + 4}">{name}</text>'
    for value, name in x_ticks:
        inside += f'<text class="tick middle" x="{x(value)}" y="{y.start + 14}">{name}</text>'
    inside += f'<path class="axis" d="M{x.start} {y.start}H{x.end}"/>'
    return (
        inside + f'<text class="tick end" x="{x.end}" y="{y.start + 27}">{escape(x_label)}</text>'
    )


def _svg(width: float, height: float, label: str, inside: str, kind: str) -> str:
    return (
        f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{escape(label)}">{inside}</svg>'
    )
