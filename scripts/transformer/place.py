"""Meshes and processes, and how arrays are divided over them.

A mesh has up to three axes. `data` divides the batch; so does `fsdp`, which divides parameters as
well; `model` divides every matrix along the axis that is not summed over twice (tensor
parallelism). The library needs none of this: it sees arrays.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

PyTree = Any
AXES = ("data", "fsdp", "model")
ROWS = ("mix", "down")  # matrices whose inputs are divided over `model`; of others the outputs are


def connect(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins this process to the others, if there are any; before anything else of JAX."""
    if coordinator or processes:
        jax.distributed.initialize(coordinator, processes, process)


def mesh(sizes: dict[str, int] | None) -> Mesh:
    """A mesh of all devices, along `data` unless sizes say otherwise.

    Raises:
      ValueError: there are not as many devices.
    """
    sizes = sizes or {"data": jax.device_count()}
    if math.prod(sizes.values()) != jax.device_count():
        found = " x ".join(f"{name}={n}" for name, n in sizes.items())
        raise ValueError(f"--mesh {found} is not the number of devices, {jax.device_count()}")
    axes = {name: sizes.get(name, 1) for name in AXES}
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def rows(mesh: Mesh) -> NamedSharding:
    """How batches are divided."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def of_parameters(mesh: Mesh, shapes: PyTree) -> PyTree:
    """How parameters are divided: matrices along both axes, where these divide; others not."""

    def one(path: Any, x: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path)
        if x.ndim < 2 or "norm" in name:
            return NamedSharding(mesh, PartitionSpec())
        first = "embedding" in name or any(f"'{row}'" in name for row in ROWS)
        axes = ("model", "fsdp") if first else ("fsdp", "model")
        pairs = zip(axes, x.shape[-2:], strict=True)
        spec = [axis if n % mesh.shape[axis] == 0 else None for axis, n in pairs]
        return NamedSharding(mesh, PartitionSpec(*(None,) * (x.ndim - 2), *spec))

    return jax.tree_util.tree_map_with_path(one, shapes)


def divided(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every process has all of, divided: each device gets its part."""
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def all_devices(mesh: Mesh) -> NamedSharding | None:
    """What deals work to all devices; None where there is one."""
    return NamedSharding(mesh, PartitionSpec(AXES)) if mesh.size > 1 else None


def is_first() -> bool:
    """Whether this process writes what one of them has to write."""
    return jax.process_index() == 0
