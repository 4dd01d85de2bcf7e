"""The comparison in sentences that say no more than its numbers and their errors allow.

A difference is stated only where the whole 95 % interval shows it; otherwise the sentence gives the
number with its error, or says that it cannot be told.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from curvature.comparison.result import Comparison, Directions, Figure, Pair
from curvature.report import reasons
from curvature.report.labels import (
    is_empirical,
    labels,
    layers,
    main_pairs,
    other_pairs,
    pairs,
    spoken,
    topic,
    with_pair,
)
from curvature.report.verdicts import ALIKE, Side, away, factor, same_matrix, side, times
from curvature.report.writing import angle, every, interval, plural, rounded, text

_WIDE_COSINE = 0.15


def summary(comparison: Comparison) -> list[str]:
    """What the comparison found, a paragraph for each entry.

    Args:
      comparison: the result of `curvature.compare`; it may be partial.

    Returns:
      Sentences in plain text; names of layers stand between backticks.
    """
    return [said for _, said in [*paragraphs(comparison), *others(comparison)]]


def others(comparison: Comparison) -> list[tuple[str, str]]:
    """What there is to say, topic by topic, about the pairs without the reference."""
    return _joined([said for key in other_pairs(comparison) for said in _pair(comparison, key)])


def paragraphs(comparison: Comparison) -> list[tuple[str, str]]:
    """What there is to say, topic by topic, about everything else."""
    found = [("Model", reasons.state(comparison))]
    keys = main_pairs(comparison)
    if not keys:
        found.append(("Pairs", ["No two kinds of curvature could be compared."]))
    for key in keys:
        found.extend(_pair(comparison, key))
    found.append(("Calibration", reasons.calibration(comparison)))
    found.append(("Approximations", reasons.approximations(comparison)))
    found.append(("Sampling", reasons.sampling(comparison)))
    found.append(("Certainty", reasons.caution(comparison)))
    return _joined(found)


def _joined(found: Iterable[tuple[str, list[str]]]) -> list[tuple[str, str]]:
    return [(topic, " ".join(sentences)) for topic, sentences in found if sentences]


def _pair(comparison: Comparison, key: tuple[str, str]) -> list[tuple[str, list[str]]]:
    """What there is to say about one pair: the whole network, then its layers."""
    names = _Names(comparison, key)
    found = [pair for _, pair in with_pair(comparison.blocks, key)]
    if all(map(same_matrix, found)):
        most = max(interval(pair.frobenius_distance)[1] for pair in found)
        where = every(len(found), "block") if len(found) > 1 else "the one block compared"
        return [
            (
                names.topic,
                [
                    f"In {where} {names.b} and {names.a} are the same matrix up to rounding "
                    f"(relative distance {'at most ' if len(found) > 1 else ''}{rounded(most)})."
                ],
            )
        ]
    return [(names.topic, _whole(comparison, key)), ("Layer by layer", _layers(comparison, key))]


_DRAWN = re.compile(r"(samples|probes)=(\d+)")


def _drawn(comparison: Comparison, kind: str) -> str:
    """`4 samples of the Fisher`: figures of steps are those of so many, not of their limit."""
    found = _DRAWN.search(comparison.kinds.get(kind, ""))
    if found is None:
        return ""
    word, count = found.groups()
    return f"{count} {word[:-1] if count == '1' else word} of {spoken(comparison, kind)}"


class _Names:
    """How a pair's two kinds are spoken of."""

    def __init__(self, comparison: Comparison, key: tuple[str, str]) -> None:
        self.a, self.b = (spoken(comparison, kind) for kind in key)
        self.topic = topic(comparison, key[1])
        if sum(b == key[1] for _, b in pairs(comparison)) > 1:
            self.topic += f" against {labels(comparison).get(key[0], key[0])}"
        told = [text for kind in key if (text := _drawn(comparison, kind))]
        self.samples = f", from {' and '.join(told)}," if told else ""
        # Only the empirical Fisher is meant to be the other one, and so can be "too" small.
        empirical = is_empirical(comparison, key[1])
        self.sizes = ("too small", "too large") if empirical else ("smaller", "larger")
        self.than = "" if empirical else f" than {self.a}"


def _whole(comparison: Comparison, key: tuple[str, str]) -> list[str]:
    block = comparison.whole
    if block is None or key not in block.pairs:
        return []
    pair, names = block.pairs[key], _Names(comparison, key)
    if same_matrix(pair):
        distance = rounded(interval(pair.frobenius_distance)[1])
        return [
            f"Over the whole network {names.b} and {names.a} are the same matrix up to rounding "
            f"(relative distance {distance})."
        ]
    found = [_scale(pair.trace_ratio, names), _shape(pair.cosine, names)]
    if pair.directions is not None:
        found.extend(_training(pair.directions, names, comparison.damping))
    return [sentence for sentence in found if sentence]


def _scale(ratio: Figure, names: _Names) -> str:
    given = f"(trace ratio {text(ratio, 3)})"
    lead = f"Over the whole network {names.b}"
    match side(ratio):
        case Side.UNKNOWN:
            return f"{lead} has no trace to set against that of {names.a}."
        case Side.SAME:
            return f"{lead} has the scale of {names.a} {given}."
        case Side.UNCLEAR:
            return f"{lead} cannot be told from {names.a} in scale {given}."
        case _:
            return f"{lead} is {factor(ratio, names.sizes)}{names.than} {given}."


def _shape(cosine: Figure, names: _Names) -> str:
    low, high = interval(cosine)
    given = f"(Frobenius cosine {text(cosine, 3)})"
    if not math.isfinite(low):
        return ""
    if high - low > 2 * _WIDE_COSINE:
        return f"How alike the two are in shape cannot be told {given}."
    if low >= 0.99:
        return f"But for scale the two matrices are nearly the same {given}."
    if low >= 0.9:
        return f"Its shape is much like that of {names.a} {given}."
    if high < 0.5:
        return f"Its shape has little in common with that of {names.a} {given}."
    if high < 0.9:
        return f"Its shape differs from that of {names.a} {given}."
    return f"In shape the two are related {given}."


def _training(directions: Directions, names: _Names, damping: float) -> list[str]:
    """What its natural-gradient step would do to training."""
    found = []
    says = []
    match side(directions.length_ratio):
        case Side.SMALL | Side.LARGE:
            says.append("is " + factor(directions.length_ratio, ("shorter", "longer")))
        case Side.SAME:
            says.append("is as long")
    if points := away(directions.cosine):
        says.append(points)
    if says:
        found.append(f"At damping {damping:.3g}{names.samples} its step {' and '.join(says)}.")
    found.append(_decrease(directions, names))
    low, high = interval(directions.agreement)
    if low > damping and math.isfinite(high):
        value = rounded(directions.agreement.value)
        found.append(f"The directions agree (cosine 0.99 or more) only from damping {value} on.")
    return found


def _decrease(directions: Directions, names: _Names) -> str:
    """What a step takes off the reference's quadratic model, in full and at its best length."""
    full, best = directions.decrease, directions.best_decrease
    low, high = interval(full)
    own = f"of what the step of {names.a} takes off its own quadratic model"
    known = math.isfinite(best.value)
    then = f"at its best length it takes off {_percent(best)} {own}" if known else ""
    if known and interval(best)[0] <= 0 and best.error is not None:
        then = f"how much it takes off at its best length cannot be told (share {text(best, 2)})"
    if not math.isfinite(full.value):
        return f"{_up(then)}." if known else ""
    if low > 0:
        then = f", at its best length {_percent(best)}" if known else ""
        return f"Taken in full it takes off {_percent(full)} {own}{then}."
    if high < 0:
        first = f"Taken in full it would raise the quadratic model of {names.a}"
    else:
        first = f"Whether, taken in full, it lowers the quadratic model of {names.a} cannot be told"
        first += f" (share {text(full, 2)})"
    then = then.replace("its own quadratic model", "it")
    return f"{first}; {then}." if known else f"{first}."


def _layers(comparison: Comparison, key: tuple[str, str]) -> list[str]:
    found = {block.name: pair for block, pair in with_pair(layers(comparison), key)}
    if not found:
        return []
    names = _Names(comparison, key)
    sentences = [_extreme(found, names)]
    if len(found) > 1:
        sentences.insert(0, _counts([pair.trace_ratio for pair in found.values()], names))
    return [sentence for sentence in sentences if sentence]


def _counts(ratios: list[Figure], names: _Names) -> str:
    """In how many layers the scale differs, and which way."""
    by_side: dict[Side, list[Figure]] = {s: [] for s in Side}
    for ratio in ratios:
        by_side[side(ratio)].append(ratio)
    total = f" of {plural(len(ratios), 'layer')}"

    def within(found: list[Figure]) -> str:
        """How many of how many, which only the first part says."""
        nonlocal total
        first, total = total, ""
        if len(found) == len(ratios):
            return every(len(found), "layer")
        return f"{len(found)}{first}"

    sized: list[str] = []
    for where, word in zip((Side.SMALL, Side.LARGE), names.sizes, strict=True):
        if found := by_side[where]:
            than = "" if sized else names.than
            sized.append(f"{word}{than} in {within(found)} ({_range(found)})")
    told = [f"{names.b} is {' and '.join(sized)}"] if sized else []
    for where, words in (
        (Side.SAME, "the two have the same scale"),
        (Side.UNCLEAR, "their scales cannot be told apart"),
        (Side.UNKNOWN, "there is no trace ratio"),
    ):
        if found := by_side[where]:
            told.append(f"in {within(found)} {words}")
    sentence = "; ".join(told)
    return f"{_up(sentence)}."


def _range(ratios: list[Figure]) -> str:
    """`2.0 to 14 times`, `up to 14 times`, `7 %`."""
    about = "" if all(ratio.error is None for ratio in ratios) else "about "
    sizes = sorted(max(r.value, 1 / r.value) if r.value > 0 else math.inf for r in ratios)
    least, most = times(sizes[0]), times(sizes[-1])
    if least == most:
        return about + most
    if least.endswith("%") or not least[0].isdigit():
        return f"up to {about}{most}"
    return f"{about}{least.removesuffix(' times')} to {most}"


def _extreme(found: Mapping[str, Pair], names: _Names) -> str:
    """The layers that are farthest off for certain, in scale and in direction."""
    scale = max(found, key=lambda name: _surely_off(found[name].trace_ratio))
    turned = max(found, key=lambda name: _surely_turned(found[name]))
    off = turn = ""
    if _surely_off(found[scale].trace_ratio) > 0:
        off = f"is {factor(found[scale].trace_ratio, names.sizes)}{names.than}"
    if _surely_turned(found[turned]) > ALIKE:
        directions = found[turned].directions
        assert directions is not None
        turn = away(directions.cosine)
    one = len(found) == 1
    if off and turn and scale == turned:
        lead = f"In layer `{scale}`" if one else f"Farthest off in both is layer `{scale}`, where"
        return f"{lead} {names.b} {off} and its step {turn}."
    sentences = []
    if off:
        lead = f"In layer `{scale}`" if one else f"Farthest off in scale is layer `{scale}`, where"
        sentences.append(f"{lead} {names.b} {off}.")
    if turn:
        lead = (
            f"In layer `{turned}`" if one else f"Farthest in direction is layer `{turned}`, where"
        )
        sentences.append(f"{lead} the step of {names.b} {turn}.")
    return " ".join(sentences)


def _surely_off(ratio: Figure) -> float:
    """How far from one a ratio is at least, as |log|."""
    low, high = interval(ratio)
    if side(ratio) is Side.SMALL:
        return -math.log(high) if high > 0 else math.inf
    return math.log(low) if side(ratio) is Side.LARGE else 0.0


def _surely_turned(pair: Pair) -> float:
    """How many degrees a direction is off at least."""
    if pair.directions is None or not math.isfinite(pair.directions.cosine.value):
        return 0.0
    return angle(pair.directions.cosine)[1]


def _up(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _percent(share: Figure) -> str:
    error = None if share.error is None else 100 * share.error
    return text(Figure(100 * share.value, error), 2) + " %"
