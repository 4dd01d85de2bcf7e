"""How far the model has learnt its targets: wrong predictions, their likelihood, their entropy."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy

from curvature.comparison.compiled import compiled
from curvature.comparison.result import ModelState
from curvature.losses import Bernoulli, Categorical, Targets
from curvature.trace import Registry
from curvature.trace.outputs import linearise

PyTree = Any


class Prediction:
    """Sums over the units of all classifying losses; units of weight zero do not count."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._sums: Any = jnp.zeros(4)

    def add(self, params: PyTree, args: tuple[PyTree, ...]) -> None:
        """Adds a batch."""
        registry = self._registry
        run = compiled(registry, _sums, lambda: jax.jit(functools.partial(_sums, registry)))
        self._sums = self._sums + run(params, args)

    def state(self, examples: float, loss: float) -> ModelState:
        """What was found."""
        *sums, mass = (float(x) for x in self._sums)
        wrong, nll, entropy = (x / mass if mass else None for x in sums)
        return ModelState(round(examples), loss, wrong, nll, entropy)


def _sums(registry: Registry, params: PyTree, args: tuple[PyTree, ...]) -> jax.Array:
    """The sums of `_of_units`."""
    total = jnp.zeros(4)
    for output in linearise(registry.loss_fn, registry.has_aux, params, args).outputs:
        found = _of_units(output.tag.loss, output.z, output.targets)
        if found is not None:
            counts = (output.weights != 0) & (found[-1] != 0)
            # Chosen, not multiplied: a unit without classes has no entropy.
            total += jnp.stack([jnp.where(counts, x.astype(total.dtype), 0.0).sum() for x in found])
    return total


def _of_units(loss: Any, z: jax.Array, targets: Targets) -> tuple[jax.Array, ...] | None:
    """Whether each unit is wrong, its negative log-likelihood and entropy, and its target's mass.

    The first three are multiplied by the mass. None without classes. A unit is wrong if its
    likeliest target is not the given one, which of a distribution is its likeliest class.
    """
    if isinstance(loss, Categorical):
        mass = loss.mass(z, targets)[..., 0]
        masked = jnp.where(targets[1], z, -jnp.inf) if len(targets) > 1 else z
        q = jax.nn.softmax(masked)
        entropy = -jnp.sum(xlogy(q, q), axis=-1)
        given = targets[0] if targets[0].ndim < z.ndim else jnp.argmax(targets[0], axis=-1)
        wrong = jnp.where(jnp.argmax(masked, axis=-1) != given, mass, 0.0)
        return wrong, loss.value(z, targets), entropy * mass, mass
    if isinstance(loss, Bernoulli):
        both = jnp.stack([jax.nn.sigmoid(z), jax.nn.sigmoid(-z)])
        entropy = -jnp.sum(xlogy(both, both), axis=0)
        wrong = (z > 0) != (targets[0] > 0.5)
        return wrong, loss.value(z, targets), entropy, jnp.ones_like(z)
    return None
