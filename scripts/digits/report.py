"""Tables for the terminal, and metrics as JSON."""

from __future__ import annotations

import json
import math
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from curvature.text import plain

PACKAGES = ("jax", "jaxlib", "optax", "flax", "dm-haiku", "numpy", "scikit-learn")


def environment() -> dict[str, Any]:
    """What a reader needs to judge or repeat the numbers; nothing that names the machine."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "versions": versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "cores": _usable_cores(),
    }


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes strict JSON: what is not finite becomes null, which JSON has no number for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain(content), indent=1, allow_nan=False) + "\n")


def json_line(content: dict[str, Any]) -> str:
    """One line of strict JSON."""
    return json.dumps(plain(content), allow_nan=False) + "\n"


def steps_took(seconds: float, median: float) -> str:
    """How long a run's steps took, and the median of them, where this process made one."""
    each = "" if math.isnan(median) else f" (median {1e3 * median:.2f} ms)"
    return f"{seconds:.2f} s in steps{each}"


def heading(text: str) -> str:
    return f"\n{text}\n{'=' * len(text)}"
