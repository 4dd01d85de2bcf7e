"""Factors of one size go through a method together, in one batched call.

State stays in the layers' own arrays: stacking costs size^2 for each matrix, solving size^3. Over a
mesh a batch can be dealt to devices: each solves its share, and the results are gathered.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from curvature.refresh.methods import QR, Eigh, Method

Key = tuple[int, str]
"""Number of the window, side."""
Solved = dict[Key, tuple[jax.Array, ...]]
"""By key: (inverse,), or (eigenvalues, eigenvectors)."""
Solve = Callable[..., tuple[jax.Array, ...]]
"""From batches of factors and previous results, and `first`, to results and their staleness."""


class Job(NamedTuple):
    """A factor to solve, `stack + (size, size)`.

    Attributes:
      factor: the factor, damped if it is to be inverted.
      previous: its inverse or eigenbasis so far.
      eigen: whether its eigenbasis is wanted.
    """

    factor: jax.Array
    previous: jax.Array
    eigen: bool


def devices(over: NamedSharding | None) -> int:
    """How many devices a batch is dealt to: those along the axes of its leading part."""
    if over is None:
        return 1
    lead = over.spec[0]
    axes = (lead,) if isinstance(lead, str) else lead
    return math.prod(over.mesh.shape[axis] for axis in axes)


def solved(
    jobs: Mapping[Key, Job],
    method: Method,
    first: jax.Array,
    over: NamedSharding | None = None,
) -> tuple[Solved, list[jax.Array]]:
    """What a method gives for every job, and how stale the previous results were.

    Args:
      jobs: by key.
      method: how factors are inverted, or their eigenbases found.
      first: whether there are no results so far.
      over: how a batch is divided over devices; None where each solves all of it.
    """
    batches: dict[object, list[Key]] = {}
    for key, job in jobs.items():
        kind = (job.eigen, job.factor.shape[-1], job.factor.dtype.name)
        batches.setdefault(kind, []).append(key)
    found: Solved = {}
    staleness = []
    for keys in batches.values():
        batch = [jobs[key] for key in keys]
        factors = _stacked([job.factor for job in batch])
        previous = _stacked([job.previous for job in batch])
        solve: Solve = functools.partial(_solve, method, eigen=batch[0].eigen)
        if devices(over) > 1:
            assert over is not None
            solve = _dealt(solve, over, len(factors))
        *results, stale = solve(factors, previous, first)
        staleness.append(jnp.max(stale))
        start = 0
        for key, job in zip(keys, batch, strict=True):
            stack = job.factor.shape[:-2]
            stop = start + job.factor[..., 0, 0].size
            found[key] = tuple(x[start:stop].reshape(*stack, *x.shape[1:]) for x in results)
            start = stop
    return found, staleness


def _dealt(solve: Solve, over: NamedSharding, count: int) -> Solve:
    """`solve` with its batch dealt to devices, filled up with identities."""
    missing, lead = -count % devices(over), PartitionSpec(*over.spec[:1])
    # A mesh that is set is the one that arrays are on; its axes may be of another type here.
    mesh = over.mesh if jax.sharding.get_abstract_mesh().empty else None
    everywhere = PartitionSpec() if mesh is None else NamedSharding(mesh, PartitionSpec())
    each = jax.shard_map(
        solve, mesh=mesh, in_specs=(lead, lead, PartitionSpec()), out_specs=lead, check_vma=False
    )

    def filled(x: jax.Array) -> jax.Array:
        identity = jnp.eye(x.shape[-1], dtype=x.dtype)
        more = jnp.broadcast_to(identity, (missing, *identity.shape))
        return jnp.concatenate([x, more]) if missing else x

    def dealt(factors: jax.Array, previous: jax.Array, first: jax.Array) -> Any:
        whole = jax.lax.with_sharding_constraint((factors, previous), everywhere)
        results = each(*map(filled, whole), first)
        return tuple(x[:count] for x in jax.lax.with_sharding_constraint(results, everywhere))

    return dealt


def _solve(
    method: Method, factors: jax.Array, previous: jax.Array, first: jax.Array, *, eigen: bool
) -> tuple[jax.Array, ...]:
    if isinstance(method, Eigh | QR):
        return method.basis(factors, previous, first)
    if eigen:
        return Eigh().basis(factors, previous, first)
    return method.inverse(factors, previous)


def _stacked(arrays: list[jax.Array]) -> jax.Array:
    flat = [x.reshape(-1, *x.shape[-2:]) for x in arrays]
    return flat[0] if len(flat) == 1 else jnp.concatenate(flat)
