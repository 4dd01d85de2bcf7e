"""How far the model has learnt its targets: the share of wrong predictions, and their entropy."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from curvature.comparison.result import ModelState
from curvature.losses import Bernoulli, Categorical, Targets
from curvature.outputs import linearise
from curvature.registry import Registry

PyTree = Any


class Prediction:
    """Sums over the units of all classifying losses; units of weight zero do not count."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._sums: Any = 0.0

    def add(self, params: PyTree, args: tuple[PyTree, ...]) -> None:
        """Adds a batch."""
        self._sums = self._sums + _sums(self._registry, params, args)

    def state(self, examples: float, loss: float) -> ModelState:
        """What was found."""
        wrong, entropy, units = (float(x) for x in self._sums)
        if not units:
            return ModelState(round(examples), loss, None, None)
        return ModelState(round(examples), loss, wrong / units, entropy / units)


@functools.partial(jax.jit, static_argnums=0)
def _sums(registry: Registry, params: PyTree, args: tuple[PyTree, ...]) -> jax.Array:
    """The number of wrong units, the sum of their entropies, and their number."""
    total = jnp.zeros(3)
    for output in linearise(registry.loss_fn, registry.has_aux, params, args).outputs:
        found = _of_units(output.tag.loss, output.z, output.targets)
        if found is None:
            continue
        counts = (output.weights != 0).astype(total.dtype)
        wrong, entropy = (jnp.sum(x.astype(total.dtype) * counts) for x in found)
        total = total + jnp.stack([wrong, entropy, counts.sum()])
    return total


def _of_units(loss: Any, z: jax.Array, targets: Targets) -> tuple[jax.Array, jax.Array] | None:
    """Whether each unit's likeliest target is not the given one, and the entropy; None if neither.

    A target that is a distribution counts as its likeliest class.
    """
    if isinstance(loss, Categorical):
        if len(targets) > 1:
            z = jnp.where(targets[1], z, -jnp.inf)
        given = targets[0] if targets[0].ndim < z.ndim else jnp.argmax(targets[0], axis=-1)
        q = jax.nn.softmax(z)
        wrong = jnp.argmax(z, axis=-1) != given
        return wrong, -jnp.sum(jax.scipy.special.xlogy(q, q), axis=-1)
    if isinstance(loss, Bernoulli):
        q = jax.nn.sigmoid(z)
        both = jnp.stack([q, jax.nn.sigmoid(-z)])
        return (z > 0) != (targets[0] > 0.5), -jnp.sum(jax.scipy.special.xlogy(both, both), axis=0)
    return None
