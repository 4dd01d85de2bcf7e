"""What is asked of `curvature.compare`: checks, the kinds by name, and the layers to compare."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from curvature.comparison.accumulate import Plan
from curvature.comparison.structured import NAMES
from curvature.statistics import EmpiricalFisher, Fisher, GaussNewton
from curvature.statistics.kinds import Kind
from curvature.trace import Layer, LossTag, Registry
from curvature.trace.layers import EXCLUDED

PyTree = Any
_COLUMNS = 32  # of an example's output, up to which the Fisher is exact unless asked otherwise
_SAMPLES = 4


def check(
    params: PyTree, approximations: Sequence[str], damping: float, top: int, limit: int
) -> None:
    """Raises where an argument is out of range, or a parameter not finite."""
    unknown = [name for name in approximations if name not in NAMES]
    if isinstance(approximations, str) or unknown:
        raise ValueError(f"approximations={approximations!r}: expected some of {NAMES}.")
    if not (damping > 0 and math.isfinite(damping)) or top < 1 or limit < 10:
        raise ValueError(
            f"Expected damping > 0, top >= 1 and limit >= 10, found {damping=}, {top=}, {limit=}."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not bool(jnp.all(jnp.isfinite(leaf))):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} has entries that are not finite: there is no "
                "curvature there. Go back to the last parameters that were."
            )


def named(
    registry: Registry, kinds: Mapping[str, Kind] | Sequence[Kind] | None
) -> tuple[dict[str, Kind], list[str]]:
    """The kinds by name, and what there is to say about a choice of ours."""
    if isinstance(kinds, Mapping):
        found = dict(kinds)
    elif kinds is not None:
        found = {_name(kind): kind for kind in kinds}
        if len(found) < len(kinds):
            raise ValueError(f"Two kinds are the same: found {list(kinds)}.")
    else:
        return _default(registry.losses)
    for name, kind in found.items():
        if isinstance(kind, type) or not hasattr(kind, "cotangent"):
            raise TypeError(
                f"kinds has {kind!r} ({name}), expected instances such as curvature.Fisher()."
            )
    if not found:
        raise ValueError("kinds is empty: expected at least one kind of curvature.")
    return found, []


def _default(losses: Sequence[LossTag]) -> tuple[dict[str, Kind], list[str]]:
    columns = sum(math.prod(tag.lead) * tag.columns for tag in losses)
    exact, notes = columns <= _COLUMNS, []
    if not exact:
        notes.append(
            f"An example has {columns} outputs: the Fisher is estimated from {_SAMPLES} samples, "
            "five times. kinds=[curvature.Fisher(samples=None), ...] makes it exact."
        )
    fisher = Fisher(samples=None if exact else _SAMPLES)
    kinds: dict[str, Kind] = {"Fisher": fisher, "empirical Fisher": EmpiricalFisher()}
    if all(tag.loss.fisher_is_hessian for tag in losses):
        notes.append("The Gauss-Newton matrix of these losses is the Fisher.")
    else:
        kinds["Gauss-Newton"] = GaussNewton(probes=None if exact else _SAMPLES)
    return kinds, notes


def _name(kind: Kind) -> str:
    match kind:
        case Fisher(samples=None):
            return "Fisher"
        case Fisher(samples=k):
            return f"Fisher ({k} sample{'s' if k != 1 else ''})"
        case EmpiricalFisher():
            return "empirical Fisher"
        case GaussNewton(probes=None, metric=None):
            return "Gauss-Newton"
        case GaussNewton(probes=k, metric=None):
            return f"Gauss-Newton ({k} probe{'s' if k != 1 else ''})"
    return repr(kind)


def planned(
    registry: Registry,
    params: PyTree,
    args: tuple[PyTree, ...],
    kinds: dict[str, Kind],
    blocks: str | Sequence[str] | None,
    limit: int,
    memory: float,
) -> tuple[Plan, list[str]]:
    """What to measure, and notes on what is left out."""
    layers = registry.analyse(params, args).layers
    patterns = [blocks] if isinstance(blocks, str) else blocks
    if patterns is not None:
        layers = tuple(x for x in layers if any(_matches(x, p) for p in patterns))
    obstacles = {x.name: _obstacle(x) for x in layers}
    kept = tuple(x for x in layers if obstacles[x.name] is None)
    if not kept:
        names = ", ".join(layer.name for layer in registry.layers)
        why = "; ".join(f"{name}: {reason}" for name, reason in obstacles.items())
        raise ValueError(
            f"No layer can be compared (blocks={blocks!r}; {why or 'none matches'}). "
            f"The layers are: {names}."
        )
    notes = [f"{name} is left out: {reason}." for name, reason in obstacles.items() if reason]
    notes += _meetings(kept)
    whole: tuple[str, ...] = ()
    if patterns is None:
        examples = registry.analyse(params, args).losses[0].examples
        whole = tuple(x.name for x in kept if x.examples == examples)
        others = [x.name for x in kept if x.examples != examples]
        if others:
            notes.append(
                f"{', '.join(others)} left out of the whole network: their examples are others "
                "than the loss's."
            )
    return Plan(registry, kinds, kept, whole, limit, int(memory)), notes


def _meetings(layers: Sequence[Layer]) -> list[str]:
    """What there is to say of layers whose examples meet on the way to the loss."""
    mixed = [layer for layer in layers if layer.mixed]
    if not mixed:
        return []
    places = ", ".join(dict.fromkeys(layer.meeting for layer in mixed))
    names = ", ".join(layer.name for layer in mixed)
    return [
        f"Examples meet ({places}) before the loss: figures of {names}, and of the whole network, "
        "are estimates for every kind, from random signs of the examples. Their errors say how far "
        "off they are, but rank and directions are those of a few dozen draws. Approximations that "
        "square gradients (EKFAC, diagonal) are left out there: one draw of them is too noisy."
    ]


def _matches(layer: Layer, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(layer.name, p) for p in (pattern, f"*/{pattern}"))


def _obstacle(layer: Layer) -> str | None:
    """Why a layer cannot be compared."""
    if layer.block == EXCLUDED:
        return "the registry excludes it"
    if layer.uses == 0:
        return "the loss does not depend on it"
    if not layer.structured or layer.unbatched or layer.examples == 1:
        return "its examples cannot be told apart" + (
            f" ({layer.reason})" if not layer.structured else ""
        )
    return None
