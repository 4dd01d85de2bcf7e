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
from curvature.trace import Layer

PyTree = Any


def grafted(
    layers: Sequence[Layer], gradient: PyTree, direction: PyTree, like: PyTree
) -> tuple[PyTree, jax.Array]:
    """`direction` with every layer's part as long as that of `like`.

    Args:
      layers: the layers; each copy in a stack has its own length.
      gradient: what `direction` is the preconditioned form of, P g.
      direction: a tree like the parameters.
      like: another.

    Returns:
      The rescaled tree d, zero outside the layers and where the direction is; and d'P^-1 d.
    """
    leaves, structure = jax.tree.flatten(direction)
    others, gradients = jax.tree.leaves(like), jax.tree.leaves(gradient)
    rescaled = functools.partial(_rescaled, layers)
    squared = jnp.zeros((), jnp.result_type(float))
    scaled, squared = automatic(rescaled, leaves, gradients, others, like=(leaves, squared))
    return jax.tree.unflatten(structure, scaled), squared


def _rescaled(
    layers: Sequence[Layer],
    leaves: list[jax.Array],
    gradients: list[jax.Array],
    others: list[jax.Array],
) -> tuple[list[jax.Array], jax.Array]:
    out = [jnp.zeros_like(leaf) for leaf in leaves]
    squared = jnp.zeros((), jnp.result_type(float))
    for layer in layers:
        part = layer.gather(leaves)
        axes = tuple(range(len(layer.stack), part.ndim))
        length, wanted = (
            jnp.sqrt(jnp.sum(x**2, axis=axes, keepdims=True)) for x in (part, layer.gather(others))
        )
        scale = wanted / jnp.where(length > 0, length, 1)
        squared += jnp.sum(scale**2 * part * layer.gather(gradients)).astype(squared.dtype)
        for leaf, x in layer.scatter(part * scale).items():
            out[leaf] = out[leaf] + x.astype(out[leaf].dtype)
    return out, squared
