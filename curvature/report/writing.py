"""How numbers are written: as many digits as their errors leave standing."""

from __future__ import annotations

import math
from typing import NamedTuple

from curvature.comparison.result import Figure

MISSING = "-"
_DIGITS = 5  # no value is written with more significant ones, however small its error

_TINY = 1e-300  # what is smaller is nothing: powers of ten end there
_HUGE = 1e100


class Written(NamedTuple):
    """A number in parts, so that text and HTML can put it together in their own way.

    Attributes:
      value: its digits, with a minus sign where it is negative.
      error: those of its error; None for an exact number.
      exponent: of the power of ten that both are to be multiplied by; 0 for most.
    """

    value: str
    error: str | None
    exponent: int


def write(figure: Figure, digits: int = 4) -> Written | None:
    """A figure in parts; None where there is no value.

    Args:
      figure: what to write.
      digits: significant digits of an exact number.
    """
    value, error = figure
    if not math.isfinite(value):
        return None
    value = 0.0 if abs(value) < _TINY else value
    error = None if error is None or not math.isfinite(error) else abs(error)
    error = 0.0 if error is not None and error < _TINY else error
    exponent = _exponent(value, error or 0.0)
    value = value / 10.0**exponent
    if figure.error is None and value == 0:
        return Written("0", None, 0)
    if figure.error is None:
        return Written(_significant(value, digits), None, exponent)
    if error is None:  # there is an error, and nobody knows how large
        return Written(_significant(value, 3), "?", exponent)
    error = error / 10.0**exponent
    if error == 0:
        return Written(_significant(value, digits), "0", exponent)
    places = _places(error)
    most = _DIGITS - 1 - _power(value)
    if value and places > most:
        return Written(_fixed(value, most), f"{error:.0e}", exponent)
    return Written(_fixed(value, places), _fixed(error, places), exponent)


def text(figure: Figure, digits: int = 4) -> str:
    """A figure as plain text: `0.071 ± 0.004`, `(3.2 ± 0.4)e-06`, or `-` where there is none."""
    written = write(figure, digits)
    if written is None:
        return MISSING
    value, error, exponent = written
    power = f"e{exponent:+03d}" if exponent else ""
    if error is None:
        return value + power
    return f"({value} ± {error}){power}" if power else f"{value} ± {error}"


def rounded(value: float, digits: int = 2) -> str:
    """A number within a sentence: `14`, `1.8`, `3,400`."""
    if not math.isfinite(value):
        return MISSING
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    return _significant(value, digits) if value else "0"


def interval(figure: Figure) -> tuple[float, float]:
    """Where the value lies; all there is where its error is unknown."""
    error = 0.0 if figure.error is None else abs(figure.error)
    if not math.isfinite(figure.value) or math.isnan(error):
        return -math.inf, math.inf
    return figure.value - error, figure.value + error


def angle(cosine: Figure) -> tuple[float, float, float]:
    """The angle of a cosine in degrees, and where it lies: value, smallest, largest."""
    low, high = interval(cosine)
    return _degrees(cosine.value), _degrees(high), _degrees(low)


def plural(count: int, noun: str) -> str:
    """`1 layer`, `12 layers`, `2,048 examples`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def every(count: int, noun: str) -> str:
    """`both layers`, `all 12 layers`."""
    return f"both {noun}s" if count == 2 else f"all {count:,} {noun}s"


def printable(name: str) -> str:
    """The user's name of something on one line, without what moves a terminal's cursor."""
    return "".join(c if c.isprintable() else " " for c in name)


def drawable(figure: Figure, *, log: bool) -> bool:
    """Whether an axis has a place for it: what is absurdly large is left out of drawings."""
    size = abs(figure.value)
    return math.isfinite(size) and size < _HUGE and (not log or figure.value > 1 / _HUGE)


def _degrees(cosine: float) -> float:
    if math.isnan(cosine):
        return math.nan
    return math.degrees(math.acos(min(max(cosine, -1.0), 1.0)))


def _exponent(value: float, error: float) -> int:
    size = max(abs(value), error)
    return 0 if size == 0 or 1e-3 <= size < 1e5 else _power(size)


def _power(value: float) -> int:
    """The power of ten of the leading digit, which rounding may have moved."""
    if value == 0:
        return 0
    return int(f"{abs(value):.{_DIGITS - 1}e}".partition("e")[2])


def _places(error: float) -> int:
    """Decimal places that leave an error one digit, or two where the first is a 1."""
    mantissa, _, power = f"{error:.1e}".partition("e")
    return -int(power) + (1 if mantissa.startswith("1") else 0)


def _significant(value: float, digits: int) -> str:
    value = float(f"{value:.{digits - 1}e}")
    return _fixed(value, digits - 1 - _power(value))


def _fixed(value: float, places: int) -> str:
    """With that many places; negative ones round to tens, hundreds, ..."""
    written = f"{round(value, places):,.{max(places, 0)}f}"
    if not any(c in "123456789" for c in written):
        return written.lstrip("-")
    return written
