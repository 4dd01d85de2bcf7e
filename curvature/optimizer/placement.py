"""Where an optimizer's state lives on a mesh."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from curvature import _jax

PyTree = Any


def state_shardings(tx: optax.GradientTransformation, params: PyTree) -> PyTree:
    """How the state of an optimizer is divided over the mesh of the parameters.

    What is like the parameters (momentum, accumulated gradients, Adam's means) is divided as they
    are; factors, inverses and bases over the devices that share them, with `gather="updates"`; else
    they are on every device, and so are numbers. For `out_shardings` of a jitted
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
    >>> places[0].mu["w"] == divided, places[0].count.spec == PartitionSpec()
    (True, True)
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

    own, state = _own(tx, params)
    found: PyTree = optax.tree_utils.tree_map_params(
        tx, like, state, params, transform_non_params=lambda _: everywhere
    )
    places, structure = jax.tree.flatten(found)
    pairs = zip(own, places, strict=True)
    places = [place if x is None else NamedSharding(everywhere.mesh, x.spec) for x, place in pairs]
    return jax.tree.unflatten(structure, places)


def state_memory(tx: optax.GradientTransformation, params: PyTree) -> dict[str, int]:
    """The bytes of an optimizer's state on each device, by what they are for; nothing is allocated.

    Args:
      tx: any optax transformation, of this library or not.
      params: parameters: arrays, or shapes. Where they have a `NamedSharding`, the state is taken
        to be divided as `state_shardings` says; else one device has all of it but for what
        `gather="updates"` divides.

    Returns:
      Bytes by the name of the state's field (`statistics`, `inverse`, `bases`, ...), and `total`.

    >>> import jax, jax.numpy as jnp, optax, curvature
    >>> params = {"w": jax.ShapeDtypeStruct((1000, 250), jnp.float32)}
    >>> curvature.state_memory(optax.adam(1e-3), params)
    {'count': 4, 'mu': 1000000, 'nu': 1000000, 'total': 2000004}
    """
    places, state = _own(tx, params)
    leaves = jax.tree.leaves(params)
    if all(isinstance(getattr(x, "sharding", None), NamedSharding) for x in leaves):
        places = jax.tree.leaves(state_shardings(tx, params))
    found: dict[str, int] = {}
    pairs = zip(jax.tree_util.tree_leaves_with_path(state), places, strict=True)
    for (path, leaf), place in pairs:
        shape = leaf.shape if place is None else place.shard_shape(leaf.shape)
        name = _field(path)
        found[name] = found.get(name, 0) + math.prod(shape) * leaf.dtype.itemsize
    return found | {"total": sum(found.values())}


def _own(
    tx: optax.GradientTransformation, params: PyTree
) -> tuple[list[NamedSharding | None], PyTree]:
    """Of each leaf of a state how it divides itself, where it does; and the state's shapes."""
    jaxpr, state = _jax.trace(tx.init, params)
    return _jax.constraints(jaxpr), state


def _field(path: Sequence[Any]) -> str:
    """The name of the field of a state that a leaf is in; that of `curvature`'s own, of it."""
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    inner = names[1:] if names[:1] == ["curvature"] else names
    return inner[0] if inner else jax.tree_util.keystr(tuple(path[:1]))
