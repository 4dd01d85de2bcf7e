"""What has been compiled for a registry: kept with it, and gone with it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from curvature.trace import Registry

T = TypeVar("T")
_MOST = 256  # entries of one registry


def compiled(registry: Registry, what: Hashable, make: Callable[[], T]) -> T:
    """What `make` gave the first time, for this registry.

    The registry itself holds it: a cache of our own, or of `jax.jit` with static arguments, would
    keep the registry alive for ever, and all that the loss function closes over.
    """
    kept: dict[Hashable, Any] = registry.__dict__.setdefault("_compiled", {})
    if what not in kept:
        if len(kept) >= _MOST:
            kept.pop(next(iter(kept)))
        kept[what] = make()
    found: T = kept[what]
    return found
