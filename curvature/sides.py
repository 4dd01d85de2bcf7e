"""The forms that the factor of one side of a Kronecker block can have, and products with them.

Of `size` coordinates it is a matrix `(size, size)`; its diagonal, `(size,)`; or blocks along its
diagonal, `(count, width, width)`, each of `width` coordinates that follow each other. Sizes are
seldom multiples of widths (a bias is one more), so the last block is filled up with zeros. A stack
of factors has its axes in front of these, and so have eigenbases.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from curvature.linalg import diagonal, diagonal_matrices, eigh
from curvature.precision import Precision, product

Shape = tuple[int, ...]
WideFactors = Literal["diagonal", "blocks"]


class Limit(NamedTuple):
    """How wide a factor may be.

    Attributes:
      widest: the most coordinates of a matrix.
      wide: what is kept of a factor with more: its diagonal, or blocks no wider than that.
    """

    widest: int
    wide: WideFactors = "diagonal"

    def form(self, size: int) -> Shape:
        """The shape of a factor."""
        if size <= self.widest:
            return (size, size)
        if self.wide == "diagonal":
            return (size,)
        count = -(-size // self.widest)
        width = -(-size // count)  # about equal, so that they are inverted together
        return (count, width, width)


def check_limit(widest: int, wide: str) -> None:
    """Raises where `max_factor_dim` is no width, or `wide_factors` none of its values."""
    if wide not in get_args(WideFactors):
        raise ValueError(f"wide_factors is {wide!r}, expected 'diagonal' or 'blocks'.")
    least = 1 if wide == "blocks" else 0  # without a width every factor may be a diagonal
    whole = isinstance(widest, (int, np.integer)) and not isinstance(widest, bool)
    if not whole or widest < least:
        raise ValueError(
            f"max_factor_dim is {widest!r}, expected a whole number, at least {least}."
        )


def is_diagonal(factor: jax.Array, stack_ndim: int) -> bool:
    """Whether a factor, or an eigenbasis, is kept as a diagonal."""
    return factor.ndim == stack_ndim + 1


def in_blocks(factor: jax.Array, stack_ndim: int) -> bool:
    """Whether it is kept as blocks along the diagonal."""
    return factor.ndim == stack_ndim + 3


def left(
    subscripts: str, factor: jax.Array, v: jax.Array, stack_ndim: int, precision: Precision
) -> jax.Array:
    """The product of a factor, not a diagonal one, with the last axis but one of v.

    Args:
      subscripts: `"...ij,...jk->...ik"`, or `"...ji,...jk->...ik"` for its transpose.
      factor: the factor or eigenbasis.
      v: block coordinates `stack + (d_in, d_out)`; more axes may be in front.
      stack_ndim: number of the factor's stack axes.
      precision: of the product.
    """
    if not in_blocks(factor, stack_ndim):
        return product(subscripts, factor, v, precision)
    parts = split(v, factor.shape[-3:-1], axis=-2)
    return joined(product(subscripts, factor, parts, precision), v.shape[-2], axis=-2)


def right(
    subscripts: str,
    v: jax.Array,
    factor: jax.Array,
    stack_ndim: int,
    precision: Precision,
    rows: int = 1,
) -> jax.Array:
    """The product of the last axis of v with a factor that is not a diagonal one.

    Args:
      subscripts: of v and the factor, as `"...ij,...jk->...ik"`.
      v: `stack + rows + (size,)`; more axes may be in front.
      factor: the factor or eigenbasis.
      stack_ndim: number of the factor's stack axes.
      precision: of the product.
      rows: how many axes of v are rows.
    """
    if not in_blocks(factor, stack_ndim):
        return product(subscripts, v, factor, precision)
    parts = jnp.moveaxis(split(v, factor.shape[-3:-1]), -2, -2 - rows)
    found = jnp.moveaxis(product(subscripts, parts, factor, precision), -2 - rows, -2)
    return joined(found, v.shape[-1])


def split(x: jax.Array, form: Shape, axis: int = -1) -> jax.Array:
    """An axis as `(count, width)`, filled up with zeros.

    Args:
      x: the array.
      form: count and width.
      axis: which, from the end.
    """
    count, width = form
    axis += x.ndim
    missing = [(0, 0)] * x.ndim
    missing[axis] = (0, count * width - x.shape[axis])
    return jnp.pad(x, missing).reshape((*x.shape[:axis], count, width, *x.shape[axis + 1 :]))


def joined(parts: jax.Array, size: int, axis: int = -1) -> jax.Array:
    """`(count, width)`, the axes up to `axis`, as one axis of `size`."""
    axis += parts.ndim
    whole = parts.reshape((*parts.shape[: axis - 1], -1, *parts.shape[axis + 1 :]))
    return jax.lax.slice_in_dim(whole, 0, size, axis=axis - 1)


def entries(factor: jax.Array, size: int, stack_ndim: int) -> jax.Array:
    """The diagonal of a factor, `stack + (size,)`."""
    if is_diagonal(factor, stack_ndim):
        return factor
    found = diagonal(factor)
    return joined(found, size) if in_blocks(factor, stack_ndim) else found


def full(factor: jax.Array, size: int, stack_ndim: int) -> jax.Array:
    """The matrix that a factor stands for, `stack + (size, size)`."""
    if is_diagonal(factor, stack_ndim):
        return diagonal_matrices(factor)
    if not in_blocks(factor, stack_ndim):
        return factor
    count, width = factor.shape[-3:-1]
    apart = factor[..., :, :, None, :] * jnp.eye(count, dtype=factor.dtype)[:, None, :, None]
    return apart.reshape((*factor.shape[:-3], count * width, count * width))[..., :size, :size]


def unit(factor: jax.Array, stack_ndim: int) -> jax.Array:
    """The identity in a factor's form; ones where that is a diagonal."""
    if is_diagonal(factor, stack_ndim):
        return jnp.ones_like(factor)
    return jnp.broadcast_to(jnp.eye(factor.shape[-1], dtype=factor.dtype), factor.shape)


def told_apart(factor: jax.Array, size: int, stack_ndim: int) -> jax.Array:
    """A factor whose last block has what fills it up as its largest eigenvalues, of its own.

    So an eigenvector is one of the factor or of what is filled up, not of both, the latter come
    last, and there is an inverse where the factor has one. A multiple of the largest sum of a row
    is enough. Other forms are as they are.
    """
    filled = _filled(factor, size, stack_ndim)
    if filled is None:
        return factor
    bound = jnp.max(jnp.sum(jnp.abs(jax.lax.stop_gradient(factor)), axis=-1), axis=-1)
    bound = jnp.where(bound > 0, 1.5 * bound, 1)[..., None]
    return factor + diagonal_matrices(jnp.where(filled, bound, 0))


def emptied(factor: jax.Array, size: int, stack_ndim: int) -> jax.Array:
    """A factor with zeros again where its last block is filled up."""
    filled = _filled(factor, size, stack_ndim)
    return factor if filled is None else jnp.where(filled[..., None], 0, factor)


def side_eigh(factor: jax.Array, size: int, stack_ndim: int) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues `stack + (size,)`, and the eigenbasis in the factor's form.

    Those of blocks are block by block, ascending in each.
    """
    if is_diagonal(factor, stack_ndim):
        return factor, jnp.ones_like(factor)
    values, vectors = eigh(told_apart(factor, size, stack_ndim))
    return (joined(values, size) if in_blocks(factor, stack_ndim) else values), vectors


def _filled(factor: jax.Array, size: int, stack_ndim: int) -> jax.Array | None:
    """Which coordinates fill up the last block, `(count, width)`; None where none do."""
    if not in_blocks(factor, stack_ndim):
        return None
    count, width = factor.shape[-3:-1]
    if count * width == size:
        return None
    return (jnp.arange(count * width) >= size).reshape(count, width)
