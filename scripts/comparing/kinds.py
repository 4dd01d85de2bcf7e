"""Kinds of curvature by their names on the command line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import curvature

NAMES = ("fisher", "empirical", "gauss-newton")
MANY = 100  # passes over every batch, from which on a run says what it is in for


def kind(text: str) -> Any:
    """`fisher`, `fisher:4`, `empirical`, `gauss-newton`, `gauss-newton:4`."""
    name, colon, number = text.partition(":")
    if name not in NAMES:
        raise ValueError(
            f"{text!r} is not one of {', '.join(NAMES)} (fisher and gauss-newton also with a "
            "number of samples, as in fisher:4)"
        )
    if name == "empirical":
        if colon:
            raise ValueError(f"{text!r}: the empirical Fisher draws no samples")
        return curvature.EmpiricalFisher()
    count = None
    if colon:
        if not number.isdecimal() or int(number) < 1:
            raise ValueError(
                f"{text!r}: {number!r} is not a number of samples, a whole number from 1 on"
            )
        count = int(number)
    if name == "fisher":
        return curvature.Fisher(samples=count)
    return curvature.GaussNewton(probes=count)


def warning(kinds: Sequence[Any], registry: curvature.Registry) -> str | None:
    """What to know before exact kinds of a model with very many outputs are computed."""
    outputs = sum(math.prod(tag.lead) * tag.columns for tag in registry.losses)
    exact = [k for k in kinds if k in (curvature.Fisher(samples=None), curvature.GaussNewton())]
    if outputs < MANY or not exact:
        return None
    return (
        f"An example has {outputs:,} outputs, so exact kinds take {outputs:,} backward passes over "
        "every batch: fisher:4 and gauss-newton:4 take 20."
    )
