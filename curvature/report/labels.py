"""What the kinds are called in sentences, and which pairs and blocks there are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from curvature.comparison.result import WHOLE, Block, Comparison, Pair
from curvature.report.writing import plural

_KNOWN = {
    "fisher": "true Fisher",
    "truefisher": "true Fisher",
    "empirical": "empirical Fisher",
    "empiricalfisher": "empirical Fisher",
    "gaussnewton": "Gauss-Newton matrix",
    "ggn": "Gauss-Newton matrix",
}
_SAMPLED = (
    (r"Fisher \((\d+) samples?\)", "true Fisher", "sample"),
    (r"Gauss-Newton \((\d+) probes?\)", "Gauss-Newton matrix", "probe"),
)
_ABOUT = {
    "true Fisher": "Gradients at targets drawn from the model.",
    "empirical Fisher": "Gradients at the given targets.",
    "Gauss-Newton matrix": "The loss's curvature at the outputs, pulled back to the parameters.",
}


def labels(comparison: Comparison) -> dict[str, str]:
    """A readable name for every kind: its own, unless it is well known."""
    return {name: known or name for name, known in _known(comparison).items()}


def spoken(comparison: Comparison, kind: str) -> str:
    """A kind within a sentence: `the true Fisher`; names that are not ours are code."""
    known = _known(comparison).get(kind)
    return f"the {known}" if known else f"`{kind}`"


def topic(comparison: Comparison, kind: str) -> str:
    """A kind at the start of a line."""
    known = _known(comparison).get(kind)
    return known[0].upper() + known[1:] if known else kind


def about(comparison: Comparison, kind: str) -> str:
    """What a well-known kind is; nothing for others."""
    known = _known(comparison).get(kind) or ""
    return _ABOUT.get(known.partition(" from ")[0], "")


def _known(comparison: Comparison) -> dict[str, str | None]:
    names = {name: _recognised(name) for name in comparison.kinds}
    # Two kinds may be one curvature with two settings: only their own names tell them apart.
    found = list(names.values())
    return {n: known if found.count(known) == 1 else None for n, known in names.items()}


def _recognised(name: str) -> str | None:
    for pattern, what, draw in _SAMPLED:
        if sampled := re.fullmatch(pattern, name):
            return f"{what} from {plural(int(sampled[1]), draw)}"
    return _KNOWN.get(_letters(name))


def is_empirical(comparison: Comparison, kind: str) -> bool:
    """Whether a kind is an empirical Fisher."""
    return "empirical" in (kind + comparison.kinds.get(kind, "")).lower()


def is_fisher_like(comparison: Comparison, kind: str) -> bool:
    """Whether a kind is what the empirical Fisher stands in for: a true Fisher or Gauss-Newton."""
    if is_empirical(comparison, kind):
        return False
    described = comparison.kinds.get(kind, "")
    if "metric=" in described and "metric=None" not in described:
        return False  # another metric in the place of the loss's
    letters = _letters(kind + described)
    return "fisher" in letters or "gaussnewton" in letters or "ggn" in letters


def styles(comparison: Comparison) -> dict[str, int]:
    """The style in which every kind is drawn.

    0 is the reference's and 1, the accent, that of the empirical Fisher, or of the second kind
    where there is none.
    """
    reference, *others = comparison.kinds or [""]
    others.sort(key=lambda kind: not is_empirical(comparison, kind))
    return {kind: min(i, 4) for i, kind in enumerate([reference, *others])}


def pairs(comparison: Comparison) -> list[tuple[str, str]]:
    """The pairs that some block has, in the order of the kinds."""
    found = {key for block in comparison.blocks for key in block.pairs}
    order = list(comparison.kinds)

    def place(key: tuple[str, str]) -> tuple[int, int, tuple[str, str]]:
        first, second = (order.index(k) if k in order else len(order) for k in key)
        return first, second, key

    return sorted(found, key=place)


def main_pairs(comparison: Comparison) -> list[tuple[str, str]]:
    """The pairs with the reference; a report folds the others away, as these imply most of them."""
    keys, reference = pairs(comparison), next(iter(comparison.kinds), None)
    return [key for key in keys if key[0] == reference] or keys


def other_pairs(comparison: Comparison) -> list[tuple[str, str]]:
    """The pairs without the reference."""
    main = main_pairs(comparison)
    return [key for key in pairs(comparison) if key not in main]


def layers(comparison: Comparison) -> list[Block]:
    """The blocks but for the whole network."""
    return [block for block in comparison.blocks if block.name != WHOLE]


def with_pair(blocks: Iterable[Block], key: tuple[str, str]) -> Iterator[tuple[Block, Pair]]:
    """The blocks that have this pair."""
    for block in blocks:
        if key in block.pairs:
            yield block, block.pairs[key]


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalpha())
