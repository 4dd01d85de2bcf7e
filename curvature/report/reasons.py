"""Sentences on the model's state, why the empirical Fisher differs, and how sure that is."""

from __future__ import annotations

import math
import statistics

from curvature.comparison.result import Comparison, Figure
from curvature.report.labels import is_empirical, is_fisher_like, layers, pairs, spoken
from curvature.report.verdicts import Side, same_matrix, side
from curvature.report.writing import plural, rounded, text

_CLOSE = 0.1  # likelihood and entropy this close, relatively, are called about as large
_WIDE = 0.5  # relative error of a trace ratio that deserves a warning


def state(comparison: Comparison) -> list[str]:
    """How far the model has learnt its targets."""
    model = comparison.state
    parts = []
    if math.isfinite(model.loss):
        parts.append(f"the mean loss is {rounded(model.loss, 3)}")
    if model.wrong is not None and math.isfinite(model.wrong):
        likeliest = "the likeliest target is not the given one"
        parts.append(f"in {rounded(100 * model.wrong)} % of predictions {likeliest}")
    said = model.nll is not None and math.isclose(model.nll, model.loss, rel_tol=1e-3)
    if model.nll is not None and math.isfinite(model.nll) and not said:
        nll = rounded(model.nll, 3)
        parts.append(f"the given one has a mean negative log-likelihood of {nll} nats")
    if model.entropy is not None and math.isfinite(model.entropy):
        entropy = rounded(model.entropy, 3)
        parts.append(f"the predicted distribution has a mean entropy of {entropy} nats")
    if not parts:
        return []
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])}, and {parts[-1]}"
    return [f"Over {plural(model.examples, 'example')} {listed}."]


def calibration(comparison: Comparison) -> list[str]:
    """What the model's state says about the empirical Fisher."""
    keys = [key for key in pairs(comparison) if _stands_in(comparison, key)]
    if not keys:
        return []
    key = keys[0]
    sentences = [
        "The empirical Fisher approaches the true one as the model becomes calibrated: as the "
        "given targets surprise it no more and no less than targets drawn from itself."
    ]
    nll, entropy = comparison.state.nll, comparison.state.entropy
    if nll is None or entropy is None or not (math.isfinite(nll) and math.isfinite(entropy)):
        return [*sentences, "The model's state holds no entropy to judge that by."]
    given = f"mean negative log-likelihood {rounded(nll, 3)} against mean entropy "
    given += f"{rounded(entropy, 3)} nats"
    block = comparison.whole
    where = side(block.pairs[key].trace_ratio) if block and key in block.pairs else Side.UNCLEAR
    if is_empirical(comparison, key[0]):  # then the ratio is that of the true one to it
        where = {Side.SMALL: Side.LARGE, Side.LARGE: Side.SMALL}.get(where, where)
    return [*sentences, _surprise(nll, entropy, given, where)]


def _stands_in(comparison: Comparison, key: tuple[str, str]) -> bool:
    """Whether one of the two is an empirical Fisher and the other one what it stands in for."""
    a, b = key
    return (is_empirical(comparison, a) and is_fisher_like(comparison, b)) or (
        is_fisher_like(comparison, a) and is_empirical(comparison, b)
    )


def _surprise(nll: float, entropy: float, given: str, where: Side) -> str:
    """Whether the targets surprise the model, and whether that is what the scale shows."""
    if abs(nll - entropy) <= _CLOSE * max(nll, entropy):
        told = f"Here the two are about equal ({given})"
        if where is Side.SAME:
            return f"{told}, and so are the traces."
        if where in (Side.SMALL, Side.LARGE):
            return f"{told}, so that the means do not explain the difference in scale."
        return f"{told}."
    if nll < entropy:
        told = f"Here they surprise it less ({given}): it fits them better than it claims"
        expected, size = Side.SMALL, "small"
    else:
        told = f"Here they surprise it more ({given}): it is surer than it should be"
        expected, size = Side.LARGE, "large"
    if where is expected:
        return f"{told}, which goes with an empirical Fisher that is too {size}."
    if where in (Side.SMALL, Side.LARGE):
        return f"{told}, which does not explain why the empirical Fisher is too {_other(size)}."
    return f"{told}."


def _other(size: str) -> str:
    return "large" if size == "small" else "small"


def approximations(comparison: Comparison) -> list[str]:
    """How far the structured approximations are from the blocks of the reference."""
    if not comparison.kinds:
        return []
    kind = next(iter(comparison.kinds))
    found: dict[str, dict[str, float]] = {}
    for block in layers(comparison):
        for name, structured in block.structured.get(kind, {}).items():
            distance = structured.frobenius_distance.value
            if math.isfinite(distance):
                found.setdefault(name, {})[block.name] = distance
    same: dict[tuple[tuple[str, float], ...], list[str]] = {}
    for name, distances in found.items():  # two may be one: expand and reduce without positions
        same.setdefault(tuple(distances.items()), []).append(f"`{name}`")
    parts = []
    for of_layers, names in same.items():
        worst, most = max(of_layers, key=lambda layer: layer[1])
        told = f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} "
        if len(of_layers) == 1:
            parts.append(f"{told}{rounded(most)} away in `{worst}`")
            continue
        told += f"{rounded(statistics.median(distance for _, distance in of_layers))} away "
        told += f"(median of {plural(len(of_layers), 'layer')})"
        parts.append(f"{told}, at most {rounded(most)} (`{worst}`)")
    if not parts:
        return []
    told = "; ".join(parts)
    start = f"As approximations of {spoken(comparison, kind)}, by relative Frobenius distance:"
    return [f"{start} {told}."]


def sampling(comparison: Comparison) -> list[str]:
    """How noisy the samples of a training step are."""
    found = []
    for kind in comparison.kinds:
        errors = {
            block.name: block.spectra[kind].sampling_error
            for block in comparison.blocks
            if kind in block.spectra
        }
        known = {n: e for n, e in errors.items() if e is not None and math.isfinite(e.value)}
        if not known:
            continue
        whole = comparison.whole
        if whole is not None and whole.name in known:
            size, where = text(known[whole.name], 2), "over the whole network"
        elif len(known) == 1:
            ((name, error),) = known.items()
            size, where = text(error, 2), f"in layer `{name}`"
        else:
            size = rounded(statistics.median(e.value for e in known.values()))
            where = f"(median of {plural(len(known), 'layer')})"
        found.append(
            f"Sampled as in a training step, {spoken(comparison, kind)} is off by {size} times its "
            f"own norm {where}."
        )
    return found


def caution(comparison: Comparison) -> list[str]:
    """How many of the trace ratios are hardly known."""
    ratios = [
        pair.trace_ratio
        for block in comparison.blocks
        for pair in block.pairs.values()
        if not same_matrix(pair) and math.isfinite(pair.trace_ratio.value)
    ]
    wide = sum(_wide(ratio) for ratio in ratios)
    if not wide:
        return []
    have = "has an error" if wide == 1 else "have errors"
    return [
        f"{wide} of {plural(len(ratios), 'trace ratio')} {have} of more than half the value: more "
        "data would settle them."
    ]


def _wide(ratio: Figure) -> bool:
    if ratio.error is None:
        return False
    return not ratio.error <= _WIDE * abs(ratio.value)  # true for an error that is not a number
