"""What the kinds are called in sentences, and which pairs and blocks there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from curvature.comparison.result import WHOLE, Block, Comparison, Pair

_KNOWN = {
    "fisher": "true Fisher",
    "truefisher": "true Fisher",
    "empirical": "empirical Fisher",
    "empiricalfisher": "empirical Fisher",
    "gaussnewton": "Gauss-Newton matrix",
    "ggn": "Gauss-Newton matrix",
}


def labels(comparison: Comparison) -> dict[str, str]:
    """A readable name for every kind: its own, unless it is well known."""
    names = {name: _KNOWN.get(_letters(name), name) for name in comparison.kinds}
    # Two kinds may be one curvature with two settings: only their own names tell them apart.
    return {
        name: label if list(names.values()).count(label) == 1 else name
        for name, label in names.items()
    }


def is_empirical(comparison: Comparison, kind: str) -> bool:
    """Whether a kind is an empirical Fisher."""
    return "empirical" in (kind + comparison.kinds.get(kind, "")).lower()


def is_fisher_like(comparison: Comparison, kind: str) -> bool:
    """Whether a kind is what the empirical Fisher stands in for: a true Fisher or Gauss-Newton."""
    if is_empirical(comparison, kind):
        return False
    letters = _letters(kind + comparison.kinds.get(kind, ""))
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
