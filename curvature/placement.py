"""Where an optimizer's state lives on a mesh."""

from __future__ import annotations

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

PyTree = Any


def state_shardings(tx: optax.GradientTransformation, params: PyTree) -> PyTree:
    """How the state of an optimizer is divided over the mesh of the parameters.

    What is like the parameters (momentum, accumulated gradients, Adam's means) is divided as they
    are; factors, inverses, bases and numbers are on every device. For `out_shardings` of a jitted
    `tx.init` and of a step, so that the first state is where later ones are and the step compiles
    once, and for restoring a checkpoint. Without, a new state is on one device.

    Args:
      tx: any optax transformation, of this library or not.
      params: parameters with a `NamedSharding` each: arrays, or shapes that have one.

    Returns:
      A tree of `NamedSharding` of the structure of `tx.init(params)`.

    Raises:
      ValueError: a parameter is on no mesh.

    >>> import jax, jax.numpy as jnp, optax, curvature
    >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec
    >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))
    >>> divided = NamedSharding(mesh, PartitionSpec("model"))
    >>> params = jax.device_put({"w": jnp.ones((2, 3))}, divided)
    >>> tx = optax.adam(1e-3)
    >>> places = curvature.state_shardings(tx, params)
    >>> places[0].mu["w"].spec, places[0].count.spec
    (PartitionSpec('model',), PartitionSpec())
    >>> state = jax.jit(tx.init, out_shardings=places)(params)
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not isinstance(getattr(leaf, "sharding", None), NamedSharding):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} is on no mesh: give it a NamedSharding, as by "
                "jax.device_put(params, NamedSharding(mesh, PartitionSpec()))."
            )
    everywhere = NamedSharding(jax.tree.leaves(params)[0].sharding.mesh, PartitionSpec())

    def like(leaf: Any, param: Any) -> NamedSharding:
        found: NamedSharding = param.sharding
        return found if leaf.shape == param.shape else everywhere

    state = jax.eval_shape(tx.init, params)
    found: PyTree = optax.tree_utils.tree_map_params(
        tx, like, state, params, transform_non_params=lambda _: everywhere
    )
    return found
