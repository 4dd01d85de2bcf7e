"""What a ratio or an angle with its error allows to be said."""

from __future__ import annotations

import enum
import math

from curvature.comparison.result import Figure, Pair
from curvature.report.writing import angle, interval, rounded

ALIKE = 8.2  # degrees: a cosine of 0.99
_SAME = 0.02  # a ratio this close to one makes no difference to anybody
_SHARP = 0.1  # an interval no wider than this around one says "the same", not "cannot be told"
_WIDE_RATIO = 0.3  # relative error from which on only a bound is given
_WIDE_ANGLE = 20.0  # degrees between the ends from which on only the ends are given
_ROUNDING = 1e-4  # relative distance of matrices that float32 cannot tell apart


class Side(enum.Enum):
    """Where a ratio lies."""

    SMALL = "below one"
    LARGE = "above one"
    SAME = "one"
    UNCLEAR = "either side of one"
    UNKNOWN = "no ratio"


def side(ratio: Figure) -> Side:
    """Where the whole interval of a ratio lies."""
    low, high = interval(ratio)
    if not math.isfinite(ratio.value):
        return Side.UNKNOWN
    if 1 - _SAME <= ratio.value <= 1 + _SAME and high - low <= 2 * _SHARP:
        return Side.SAME
    if high < 1:
        return Side.SMALL
    return Side.LARGE if low > 1 else Side.UNCLEAR


def factor(ratio: Figure, words: tuple[str, str] = ("too small", "too large")) -> str:
    """How far a ratio is from one: `14 times too small`, `7 % too large`, `at least twice ...`.

    Args:
      ratio: one that `side` calls small or large.
      words: what small and large are to be called.
    """
    low, high = interval(ratio)
    small = high < 1
    wide = ratio.error is not None and ratio.error > _WIDE_RATIO * abs(ratio.value)
    value = (high if small else low) if wide else ratio.value
    return ("at least " if wide else "") + times(value) + " " + words[0 if small else 1]


def times(ratio: float) -> str:
    """`14 times` for 14 and for 1/14, `7 %` for a ratio close to one."""
    size = max(ratio, 1 / ratio) if ratio > 0 else math.inf
    if math.isinf(size):
        return "infinitely many times"
    return f"{rounded(100 * abs(ratio - 1))} %" if size < 1.25 else f"{rounded(size)} times"


def away(cosine: Figure) -> str:
    """How far a direction is from the reference's: `points 38° away (35° to 41°)`, or nothing."""
    value, low, high = angle(cosine)
    if math.isnan(value):
        return ""
    if low <= ALIKE and high >= 90:
        return ""  # anywhere
    if high <= ALIKE:
        return f"points the same way (within {_degrees(high)})"
    if high - low > _WIDE_ANGLE:
        if low > ALIKE:
            return f"points at least {_degrees(low)} away"
        return f"points at most {_degrees(high)} away"
    ends = "" if cosine.error is None else f" ({_degrees(low)} to {_degrees(high)})"
    return f"points {_degrees(value)} away{ends}"


def same_matrix(pair: Pair) -> bool:
    """Whether two matrices differ by rounding only."""
    return interval(pair.frobenius_distance)[1] <= _ROUNDING


def _degrees(value: float) -> str:
    return f"{value:.0f}°" if value >= 1 else f"{rounded(value, 1)}°"
