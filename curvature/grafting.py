"""Grafting: the direction of one update with the length of another, layer by layer.

Agarwal et al. (2020), "Disentangling adaptive gradient methods from learning rates".
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from curvature.meshes import automatic
from curvature.registry import Layer

PyTree = Any


def grafted(layers: Sequence[Layer], direction: PyTree, like: PyTree) -> PyTree:
    """`direction` with every layer's part as long as that of `like`.

    Args:
      layers: the layers; each copy in a stack has its own length.
      direction: a tree like the parameters.
      like: another.

    Returns:
      The rescaled tree; zero outside the layers, and where the direction is.
    """
    leaves, structure = jax.tree.flatten(direction)
    others = jax.tree.leaves(like)
    scaled = automatic(functools.partial(_rescaled, layers), leaves, others, like=leaves)
    return jax.tree.unflatten(structure, scaled)


def _rescaled(
    layers: Sequence[Layer], leaves: list[jax.Array], others: list[jax.Array]
) -> list[jax.Array]:
    out = [jnp.zeros_like(leaf) for leaf in leaves]
    for layer in layers:
        part = layer.gather(leaves)
        axes = tuple(range(len(layer.stack), part.ndim))
        length, wanted = (
            jnp.sqrt(jnp.sum(x**2, axis=axes, keepdims=True)) for x in (part, layer.gather(others))
        )
        scaled = part * (wanted / jnp.where(length > 0, length, 1))
        for leaf, x in layer.scatter(scaled).items():
            out[leaf] = out[leaf] + x.astype(out[leaf].dtype)
    return out
