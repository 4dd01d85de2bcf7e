"""Meshes with explicit axes, where the type of every array says how it is divided over devices.

`jax.make_mesh` makes such axes by default. The user's loss is traced, evaluated and differentiated
as it was written, in explicit mode. What is curvature's own (rows and their moments, inverses,
operators) is no function of how arrays are divided, and reshapes them in ways that explicit types
do not allow: there, `automatic` leaves the division to the compiler and gives results back as
whole arrays, or divided as others are.

Without `jax.set_mesh`, arrays know their mesh, but new ones have none: `on_mesh` enters that of the
arguments, so that zeros made in there have the types of what they are added to.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from curvature import _jax

PyTree = Any
T = TypeVar("T")


def mesh_of(*trees: PyTree) -> AbstractMesh | None:
    """The first mesh with an explicit axis that an array, or shape, in the trees is on."""
    for leaf in jax.tree.leaves(trees):
        sharding = _sharding(leaf)
        if sharding is not None:
            return sharding.mesh.abstract_mesh
    return None


@contextlib.contextmanager
def on_mesh(*trees: PyTree) -> Iterator[None]:
    """The mesh of the arrays in some trees, if it has explicit axes and none is set."""
    mesh = mesh_of(*trees) if jax.sharding.get_abstract_mesh().empty else None
    if mesh is None:
        yield
        return
    concrete = None if _jax.under_jit() else _concrete(trees)
    with jax.set_mesh(concrete) if concrete else jax.sharding.use_abstract_mesh(mesh):
        yield


def entering(
    tx: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """A transformation that is run on the mesh of its arguments, with its state on it as well."""

    def init(params: PyTree) -> PyTree:
        with on_mesh(params):
            return tx.init(params)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        with on_mesh(updates, params, extra.get("loss_args")):
            return tx.update(updates, here(state), params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def explicit_axes() -> tuple[str, ...]:
    """The explicit axes of the mesh that is set."""
    mesh = jax.sharding.get_abstract_mesh()
    pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in pairs if kind == AxisType.Explicit)


def automatic(function: Callable[..., T], *args: PyTree, like: PyTree = None) -> T:
    """`function(*args)` on arrays whose types say nothing of how they are divided.

    Args:
      function: from trees of arrays to a tree of arrays.
      *args: its arguments.
      like: a tree of arrays (or `PartitionSpec`), of the result's structure; the result is divided
        as they are. None: every device has all of the result.
    """
    axes = explicit_axes()
    if not axes:
        return function(*args)
    out = PartitionSpec() if like is None else jax.tree.map(_spec, like)
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=out)(*args)


def bind(equation: _jax.Equation, operands: Sequence[Any]) -> list[Any]:
    """Evaluates one equation on new operands.

    JAX vectorises a convolution by reshapes that explicit types do not allow.
    """
    if equation.primitive.name != "conv_general_dilated":
        return _jax.bind(equation, operands)
    like = [v.aval for v in equation.outvars]
    return automatic(lambda *xs: _jax.unplaced(equation, xs), *operands, like=like)


def devices(over: NamedSharding | None) -> int:
    """How many devices the axes of a sharding's leading part have; 1 of None."""
    if over is None:
        return 1
    lead = over.spec[0]
    axes = (lead,) if isinstance(lead, str) else lead
    return math.prod(over.mesh.shape[axis] for axis in axes)


def divided(tree: PyTree, over: NamedSharding | None) -> PyTree:
    """Arrays whose first axis is divided as the leading part of a sharding says; None: as it is."""
    if over is None:
        return tree
    spec = PartitionSpec(*over.spec[:1])
    if explicit_axes():
        return jax.tree.map(lambda x: jax.reshard(x, spec), tree)
    if not jax.sharding.get_abstract_mesh().empty:
        # It is the mesh that arrays are on; its axes may be of another type here.
        return jax.lax.with_sharding_constraint(tree, spec)
    sharding = NamedSharding(over.mesh, spec)
    if AxisType.Explicit in over.mesh.axis_types:
        return jax.tree.map(lambda x: jax.reshard(x, sharding), tree)
    return jax.lax.with_sharding_constraint(tree, sharding)


def whole(tree: PyTree, over: NamedSharding | None) -> PyTree:
    """Arrays of which every device has all; None: as they are."""
    return tree if over is None else divided(tree, NamedSharding(over.mesh, PartitionSpec(None)))


def here(tree: PyTree) -> PyTree:
    """A tree of whole arrays, with the types they have on the mesh that is set.

    A part of the loss may be in a mode of its own (`auto_axes`), and arrays may be on no mesh yet.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree

    def one(x: Any) -> Any:
        there = jax.typeof(x).sharding.mesh
        if there == mesh or AxisType.Explicit not in (*there.axis_types, *mesh.axis_types):
            return x
        return jax.reshard(x, PartitionSpec())

    return jax.tree.map(one, tree)


def divided_like(x: jax.Array, like: Any) -> jax.Array:
    """`x` divided as an array, or abstract value, of its shape."""
    sharding = _sharding(like)
    if sharding is None or not explicit_axes() or jax.typeof(x).sharding == sharding:
        return x
    return jax.reshard(x, sharding)


def divided_zeros(like: Any, lead: tuple[int, ...] = ()) -> jax.Array:
    """Zeros of the shape `lead + like.shape`, divided and varying as an abstract value."""
    zeros = _jax.varying_like(jnp.zeros((*lead, *like.shape), like.dtype), like)
    sharding = _sharding(like)
    if sharding is None or not explicit_axes():
        return zeros
    return jax.reshard(zeros, PartitionSpec(*(None for _ in lead), *sharding.spec))


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array, scalar or shape; and how it is divided, on explicit axes."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    aval = jax.typeof(leaf)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=_sharding(leaf))


def off_mesh(tree: PyTree) -> PyTree:
    """A tree of whole arrays on one device, with types that know of no mesh."""
    return jax.tree.map(lambda x: x if _sharding(x) is None else jnp.asarray(np.asarray(x)), tree)


def _sharding(leaf: Any) -> NamedSharding | None:
    """How an array is divided over explicit axes, as its type says."""
    known = jax.typeof(leaf) if isinstance(leaf, jax.Array) else leaf  # else a shape, or a number
    sharding = getattr(known, "sharding", None)
    if not isinstance(sharding, NamedSharding) or AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return NamedSharding(sharding.mesh.abstract_mesh, sharding.spec)


def _spec(x: Any) -> PartitionSpec:
    if isinstance(x, PartitionSpec):
        return x
    sharding = _sharding(x)
    return PartitionSpec() if sharding is None else sharding.spec


def _concrete(trees: PyTree) -> jax.sharding.Mesh | None:
    for leaf in jax.tree.leaves(trees):
        sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, jax.sharding.Mesh):
            return sharding.mesh
    return None
