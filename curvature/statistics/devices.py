"""Devices that run the whole step, each on a batch of its own: inside `shard_map` or `pmap`.

The loss that is trained on is the mean of the devices' losses, so its curvature is the mean of
theirs, as its gradient is. Each device makes the sums of its own rows, with draws of its own, and
the sums are averaged before anything is made of them that is not linear: an input factor is then
the mean over all rows, whatever each device has of them, and an eigenbasis that of all devices.

Where JAX tracks what varies over an axis, a loss that is averaged inside the loss function is known
to be that of all devices. The weights of its units are then those of the whole batch, and what the
devices have of the curvature is to be added up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax

from curvature import _jax

PyTree = Any
Axes = tuple[str, ...] | None


def axes_of(axis_name: str | Sequence[str] | None) -> Axes:
    """The names of axes as a tuple; None where nothing was said.

    Raises:
      TypeError: they are no strings.
    """
    if axis_name is None:
        return None
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    if not isinstance(names, (tuple, list)) or not all(isinstance(n, str) for n in names):
        raise TypeError(
            f"axis_name is {axis_name!r}, expected the name of an axis of shard_map or pmap, such "
            "as 'data', or a tuple of names."
        )
    return tuple(names)


def check(axes: Axes, *trees: PyTree) -> None:
    """Raises inside `shard_map` or `pmap` if nothing was said of it, and outside of named axes.

    Args:
      axes: what was said.
      *trees: what curvature is computed from. Where JAX tracks that none of it varies over an axis,
        all devices compute the same, and nothing needs to be said.

    Raises:
      ValueError: devices would keep curvature of their own, or an axis is not there.
    """
    if axes is None:
        apart = tuple(a for a in _manual() if not _tracked(a) or a in _varying(trees))
        if apart:
            raise ValueError(_unsaid(apart))
        return
    missing = [a for a in axes if a not in _jax.named_axes()]
    if missing:
        raise ValueError(
            f"axis_name is {axes!r}, but no axis {missing[0]!r} is in scope here, only "
            f"{_jax.named_axes()}. Call update inside the shard_map or pmap over it, or leave "
            "axis_name out where the batch is one array."
        )


def _unsaid(axes: tuple[str, ...]) -> str:
    name = repr(axes[0]) if len(axes) == 1 else repr(axes)
    where, what = name, f"axis_name={name}"
    if any(a.startswith("_internal") for a in axes):  # a pmap to which none was given
        where, what = "an axis without a name", "axis_name='batch', say, to pmap and"
    return (
        f"Curvature is computed inside shard_map or pmap over {where}: every device would average "
        "statistics of its own examples, with the same random draws, and parameters would drift "
        f"apart. Pass {what} to kfac (ekfac, foof, scale_by_curvature, Estimator) to average over "
        "devices, as gradients are, or axis_name=() to keep devices apart: an ensemble of runs."
    )


def own(tree: PyTree, axes: Axes) -> PyTree:
    """Arrays of which each device has its own: a gradient in them is no sum over devices."""
    return jax.tree.map(lambda x: _jax.varying(x, axes or ()), tree)


def around(axes: Axes) -> tuple[tuple[str, ...], bool]:
    """The axes, over which draws differ, and whether JAX tracks what varies over them."""
    return axes or (), any(_tracked(axis) for axis in axes or ())


def mean(tree: PyTree, axes: Axes) -> PyTree:
    """The mean over devices."""
    return jax.lax.pmean(tree, axes) if axes else tree


def together(tree: PyTree, axes: Axes, loss: Any, outputs: Sequence[Any]) -> PyTree:
    """The curvature of the loss of all devices from what each device has of it.

    Args:
      tree: arrays that are linear in the weights dL/dl of the units.
      axes: the axes of devices.
      loss: the loss, or its type.
      outputs: the network's outputs at the tagged losses, or their types.
    """
    added = [
        axis
        for axis in axes or ()
        if axis not in _varying(loss) and any(axis in _varying(z) for z in outputs)
    ]
    count = math.prod(jax.lax.axis_size(axis) for axis in added)
    return jax.tree.map(lambda x: x * count, mean(tree, axes)) if added else mean(tree, axes)


def _manual() -> tuple[str, ...]:
    """The axes of the `shard_map`s and `pmap`s around; those of `vmap` are none."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def _tracked(axis: str) -> bool:
    """Whether JAX tracks what varies over an axis (`check_vma`)."""
    return axis in _jax.varying_over(jax.lax.axis_index(axis))


def _varying(tree: PyTree) -> frozenset[str]:
    return frozenset().union(*(_jax.varying_over(x) for x in jax.tree.leaves(tree)))
