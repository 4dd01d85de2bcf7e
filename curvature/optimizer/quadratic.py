"""The quadratic model of the loss along a few directions, with the exact curvature.

With g the gradient and G the Gauss-Newton (or Fisher) matrix of the loss at w on one batch,

    M(v) = g'v + 1/2 v'(G + lam I)v

is what a step v is predicted to change. Only v'Gv is needed, so J is applied to each direction once
and nothing is pulled back. Martens and Grosse (2015), sections 6.4 and 7.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvature.losses import Targets
from curvature.meshes import automatic
from curvature.precision import HIGHEST, accumulator
from curvature.statistics import Fisher, Kind
from curvature.statistics.devices import Axes, own, together
from curvature.trace.outputs import Tag, linearise

PyTree = Any
_FISHER = Fisher()


class Quadratic(NamedTuple):
    """A quadratic function of coefficients c: linear'c + 1/2 c'matrix c.

    Attributes:
      linear: g'd_i for every direction d_i.
      matrix: d_i'(G + lam I)d_j.
      excess: by how much squared errors are above zero, in the mean over the batch's predictions:
        the scale of 1/2 v'Gv for one of them.
    """

    linear: jax.Array
    matrix: jax.Array
    excess: jax.Array

    def __call__(self, coefficients: jax.Array) -> jax.Array:
        """The predicted change of the loss."""
        product = jnp.dot(self.matrix, coefficients, precision=HIGHEST)
        return jnp.dot(self.linear + 0.5 * product, coefficients, precision=HIGHEST)

    def length(self, coefficients: jax.Array) -> jax.Array:
        """v'(G + lam I)v of a step."""
        product = jnp.dot(self.matrix, coefficients, precision=HIGHEST)
        return jnp.dot(coefficients, product, precision=HIGHEST)

    def minimiser(self) -> jax.Array:
        """The coefficients of the smallest value; zero along directions that are zero."""
        return automatic(_minimiser, self.linear, self.matrix)


def _minimiser(linear: jax.Array, matrix: jax.Array) -> jax.Array:
    squares = jnp.diagonal(matrix)
    scale = jnp.sqrt(jnp.where(squares > 0, squares, 1))  # in this order it has a derivative
    cosines = matrix / jnp.outer(scale, scale)
    tolerance = 10 * len(scale) * np.finfo(scale.dtype).eps
    inverse = jnp.linalg.pinv(cosines, rtol=tolerance, hermitian=True)
    return -jnp.dot(inverse, linear / scale, precision=HIGHEST) / scale


def along(
    loss_fn: Callable[..., Any],
    has_aux: bool,
    params: PyTree,
    args: tuple[PyTree, ...],
    gradient: PyTree,
    directions: Sequence[PyTree],
    damping: jax.Array,
    kind: Kind = _FISHER,
    axes: Axes = None,
) -> Quadratic:
    """The quadratic model of a loss along directions.

    G is the exact matrix of a kind of curvature: the Fisher or the Gauss-Newton matrix, by the
    kind's metric if it has one. For the empirical Fisher, which is no second-order model of a loss,
    it is the Fisher.

    Args:
      loss_fn: a loss function with tagged losses, `loss_fn(params, *args)`.
      has_aux: whether it returns `(loss, aux)`.
      params: the parameters.
      args: its other arguments.
      gradient: of the loss, or of the loss plus what else is trained on (weight decay).
      directions: trees like `params`.
      damping: lam.
      kind: whose G it is.
      axes: axes of devices, each with a batch of its own, over whose losses the mean is taken.
    """
    found = linearise(loss_fn, has_aux, params, args)
    dtype = accumulator(*(leaf.dtype for leaf in jax.tree.leaves(params)))
    tangents = [found.pushforward(direction) for direction in directions]
    count = len(directions)
    matrix, sums = own((jnp.zeros((count, count), dtype), jnp.zeros(2, dtype)), axes)
    for i, output in enumerate(found.outputs):
        us = [t[i].astype(dtype) for t in tangents]
        products = functools.partial(_products, kind, output.tag, len(output.event))
        matrix += automatic(products, output.z, output.targets, output.weights, us)
        summed = functools.partial(_excess, output.tag, dtype)
        sums += automatic(summed, output.z, output.targets, output.weights)
    matrix, sums = together(
        (matrix, sums), axes, found.loss, [output.z for output in found.outputs]
    )
    dots = jnp.stack([jnp.stack([dot(a, b, dtype) for a in directions]) for b in directions])
    linear = jnp.stack([dot(gradient, d, dtype) for d in directions])
    excess = sums[0] / jnp.where(sums[1] > 0, sums[1], 1)
    return Quadratic(linear, matrix + damping.astype(dtype) * dots, excess)


def _products(
    kind: Kind,
    tag: Tag,
    event: int,
    z: jax.Array,
    targets: Targets,
    weights: jax.Array,
    us: list[jax.Array],
) -> jax.Array:
    """The inner products u'Gv of tangents at one tagged loss: those of S' sqrt(w) u."""
    dtype = us[0].dtype
    roots = jnp.sqrt(jnp.abs(weights.astype(dtype)))
    roots = roots.reshape(roots.shape + (1,) * event)

    def transposed(z: jax.Array, targets: Targets, u: jax.Array) -> jax.Array:
        (out,) = jax.linear_transpose(lambda v: kind.root(tag.loss, v, z, targets), u)(u)
        return out

    for _ in tag.lead:  # a metric sees the outputs of one iteration
        transposed = jax.vmap(transposed)
    rooted = [transposed(z.astype(dtype), targets, roots * u) for u in us]
    return jnp.stack([jnp.stack([jnp.sum(a * b) for b in rooted]) for a in rooted])


def _excess(tag: Tag, dtype: Any, z: jax.Array, targets: Targets, weights: jax.Array) -> jax.Array:
    """The units' excess, summed by weight, and the sum of the weights."""
    excess = tag.loss.excess
    for _ in tag.lead:
        excess = jax.vmap(excess)
    weights = jnp.abs(weights.astype(dtype))
    # What is masked has no weight, and need not be finite.
    values = jnp.where(weights > 0, excess(z, targets).astype(dtype), 0)
    return jnp.stack([jnp.sum(weights * values), jnp.sum(weights)])


def dot(one: PyTree, other: PyTree, dtype: Any) -> jax.Array:
    """The inner product of two trees."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return sum((jnp.sum(a.astype(dtype) * b.astype(dtype)) for a, b in pairs), jnp.zeros((), dtype))
