"""Factors of one size go through a method together, in one batched call.

Windows of several stacks are joined for it: that costs size^2 for each matrix, solving size^3. Over
a mesh a batch can be dealt to devices: each solves its share, and the results are gathered, or stay
where they are.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from curvature.meshes import devices, divided, whole
from curvature.optimizer.refresh.methods import QR, Eigh, Method

Key = tuple[int, str]
"""Number of the window, side."""
Solved = dict[Key, tuple[jax.Array, ...]]
"""By key: (inverse,), or (eigenvalues, eigenvectors)."""
Solve = Callable[..., tuple[jax.Array, ...]]
"""From batches of factors and previous results, and `first`, to results and their staleness."""


class Job(NamedTuple):
    """Factors to solve.

    Attributes:
      factor: the factors, `(copies, size, size)` or, of blocks along a diagonal, `(copies, count,
        width, width)`; damped if they are to be inverted.
      previous: their inverses or eigenbases so far.
      eigen: whether eigenbases are wanted.
    """

    factor: jax.Array
    previous: jax.Array
    eigen: bool


def solved(
    jobs: Mapping[Key, Job],
    method: Method,
    first: jax.Array,
    over: NamedSharding | None = None,
    *,
    apart: bool = False,
) -> tuple[Solved, list[jax.Array]]:
    """What a method gives for every job, and how stale the previous results were.

    Args:
      jobs: by key.
      method: how factors are inverted, or their eigenbases found.
      first: whether there are no results so far.
      over: how a batch is divided over devices; None where each solves all of it.
      apart: whether factors and results are divided like that too; else every device has all.
    """
    parts = devices(over) if apart else 1
    batches: dict[object, list[Key]] = {}
    for key, job in jobs.items():
        kind = (job.eigen, job.factor.shape[-1], job.factor.dtype.name)
        batches.setdefault(kind, []).append(key)
    found: Solved = {}
    staleness = []
    for keys in batches.values():
        batch = [jobs[key] for key in keys]
        factors = _stacked([_matrices(job.factor) for job in batch], parts)
        previous = _stacked([_matrices(job.previous) for job in batch], parts)
        solve: Solve = functools.partial(_solve, method, eigen=batch[0].eigen)
        if devices(over) > 1:
            assert over is not None
            solve = _dealt(solve, over, len(factors), apart=apart)
        *results, stale = solve(factors, previous, first)
        staleness.append(jnp.max(stale))
        stacks = [job.factor.shape[:-2] for job in batch]
        sizes = [math.prod(stack) // parts for stack in stacks]
        starts = itertools.accumulate([0, *sizes])
        for key, start, size, stack in zip(keys, starts, sizes, stacks, strict=False):
            each = (_part(x, parts, start, size) for x in results)
            found[key] = tuple(x.reshape(*stack, *x.shape[1:]) for x in each)
    return found, staleness


def _dealt(solve: Solve, over: NamedSharding, count: int, *, apart: bool) -> Solve:
    """`solve` with its batch dealt to devices, filled up with the last matrix."""
    missing, lead = -count % devices(over), PartitionSpec(*over.spec[:1])
    mesh = over.mesh if jax.sharding.get_abstract_mesh().empty else None
    placed = functools.partial(divided if apart else whole, over=over)
    each = jax.shard_map(
        solve, mesh=mesh, in_specs=(lead, lead, PartitionSpec()), out_specs=lead, check_vma=False
    )

    def filled(x: jax.Array) -> jax.Array:
        # A gather, of which each device makes its share: a part of a concatenation is many slices.
        return x[jnp.minimum(jnp.arange(count + missing), count - 1)] if missing else x

    def batched(factors: jax.Array, previous: jax.Array, first: jax.Array) -> Any:
        results = each(*map(filled, placed((factors, previous))), first)
        return tuple(x[:count] for x in placed(results))

    return batched


def _solve(
    method: Method, factors: jax.Array, previous: jax.Array, first: jax.Array, *, eigen: bool
) -> tuple[jax.Array, ...]:
    if isinstance(method, Eigh | QR):
        return method.basis(factors, previous, first)
    if eigen:
        return Eigh().basis(factors, previous, first)
    return method.inverse(factors, previous)


def _matrices(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[-2:])


def _stacked(arrays: list[jax.Array], parts: int) -> jax.Array:
    """Batches joined within each of the parts that their first axes are divided into."""
    if len(arrays) == 1:
        return arrays[0]
    apart = [x.reshape(parts, -1, *x.shape[1:]) for x in arrays]
    return jnp.concatenate(apart, axis=1).reshape(-1, *arrays[0].shape[1:])


def _part(x: jax.Array, parts: int, start: int, size: int) -> jax.Array:
    """One of the batches that were joined."""
    apart = x.reshape(parts, -1, *x.shape[1:])
    return apart[:, start : start + size].reshape(-1, *x.shape[1:])
