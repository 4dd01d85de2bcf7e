"""Factors of one size go through a method together, in one batched call.

State stays in the layers' own arrays: stacking costs size^2 for each matrix, solving size^3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvature.refresh.methods import QR, Eigh, Method

Key = tuple[str, str]
"""Name of the layer, side."""
Solved = dict[Key, tuple[jax.Array, ...]]
"""By key: (inverse,), or (eigenvalues, eigenvectors)."""


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


def solved(
    jobs: Mapping[Key, Job], method: Method, first: jax.Array
) -> tuple[Solved, list[jax.Array]]:
    """What a method gives for every job, and how stale the previous results were."""
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
        *results, stale = _solve(method, factors, previous, first, eigen=batch[0].eigen)
        staleness.append(jnp.max(stale))
        start = 0
        for key, job in zip(keys, batch, strict=True):
            stack = job.factor.shape[:-2]
            stop = start + job.factor[..., 0, 0].size
            found[key] = tuple(x[start:stop].reshape(*stack, *x.shape[1:]) for x in results)
            start = stop
    return found, staleness


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
