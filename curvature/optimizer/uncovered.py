"""Parameters without curvature, what they step by, and those without a gradient.

No tagged loss depends on them: an auxiliary head whose loss is not tagged, learned weights of
losses, rows of a table that only a penalty sees. Divided by the damping, which is all there is of
their curvature, their gradient would be a step of any length.

What no gradient of the loss reaches is frozen or unused, and no penalty is to move it, either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from curvature.meshes import automatic
from curvature.optimizer.quadratic import dot
from curvature.trace import Layer, Registry
from curvature.trace.layers import EXCLUDED

PyTree = Any


def set_apart(registry: Registry) -> tuple[Registry, tuple[Layer, ...]]:
    """The registry without the layers that have no curvature, and those layers."""
    found = tuple(x for x in registry.layers if x.uses == 0 and x.block != EXCLUDED)
    layers = tuple(
        dataclasses.replace(x, block=EXCLUDED) if x in found else x for x in registry.layers
    )
    return dataclasses.replace(registry, layers=layers), found


def reached(registry: Registry, params: PyTree) -> PyTree:
    """The parameters, with zeros where the loss has no gradient: under `stop_gradient`, or unused.

    All of them where the registered loss is not what is minimised.
    """
    still = [layer for layer in registry.layers if not layer.reached]
    if not (still and registry.objective):
        return params
    marks = scaled(still, jax.tree.map(jnp.ones_like, params), jnp.ones(()))
    touched = {view.source for layer in still for view in layer.leaves}
    leaves, structure = jax.tree.flatten(params)
    for i, mark in enumerate(jax.tree.leaves(marks)):
        if i in touched:
            leaves[i] = jnp.where(mark != 0, 0, leaves[i])
    return jax.tree.unflatten(structure, leaves)


def typical_inverse(gradient: PyTree, direction: PyTree, squared: jax.Array) -> jax.Array:
    """The multiple of the identity that stands for the inverse curvature P where there is none.

    g'Pg / g'g over the parameters with curvature: what sees the gradient there as P does. 1 where
    that gradient is zero.

    Args:
      gradient: g.
      direction: P g, zero where there is no curvature.
      squared: g'Pg.
    """
    seen = jax.tree.map(lambda g, d: jnp.where(d != 0, g, 0), gradient, direction)
    length = dot(seen, seen, squared.dtype)
    good = (length > 0) & (squared > 0)
    return jnp.where(good, squared, 1) / jnp.where(good, length, 1)


def scaled(layers: Sequence[Layer], gradient: PyTree, scale: jax.Array) -> PyTree:
    """`scale` times the gradient in the layers; zero elsewhere."""
    gradients, structure = jax.tree.flatten(gradient)

    def parts(gradients: list[jax.Array], scale: jax.Array) -> list[jax.Array]:
        leaves = [jnp.zeros_like(g) for g in gradients]
        for layer in layers:
            part = layer.gather(gradients)
            for leaf, x in layer.scatter(part * scale.astype(part.dtype)).items():
                leaves[leaf] = leaves[leaf] + x.astype(leaves[leaf].dtype)
        return leaves

    return jax.tree.unflatten(structure, automatic(parts, gradients, scale, like=gradients))
