"""The rows of a layer in one backward pass: inputs and output cotangents, and their moments.

`Rows` holds arrays of shape `members + (examples, positions, features)`. A convolution makes its
patches for a few examples at a time, so that no patch tensor is larger than the layer's input (or
one example's patches); a lookup never makes its one-hot input.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvature.precision import HIGHEST
from curvature.registry.taps import Contraction, Convolution, Dense, Lookup
from curvature.registry.views import Shape


@dataclasses.dataclass(frozen=True)
class Rows:
    """Inputs and output cotangents of one use.

    Attributes:
      how: the use.
      x: the layer's input: `members + (examples, positions, d_in)`; for a convolution the image
        `(examples, channels, spatial...)`, for a lookup the indices `(examples, positions)`.
      g: output cotangents, `members + (examples, positions, d_out)`.
      bias: the homogeneous coordinate (1 times the bias's scale); None without a bias.
      alive: 1 for rows that a loss depends on, 0 for others, `members + (examples, positions)`;
        None where all count.
    """

    how: Contraction
    x: jax.Array
    g: jax.Array
    bias: float | None
    alive: jax.Array | None = None

    def count(self) -> jax.Array:
        """Rows of every member."""
        if self.alive is not None:
            return self.alive.sum(axis=(-2, -1))
        rows = math.prod(self.g.shape[len(self.how.members) : -1])
        return jnp.full(self.how.members, rows, self.g.dtype)

    def input_moment(self, diagonal: bool) -> jax.Array:
        """Sum over rows of a a', or its diagonal."""
        if isinstance(self.how, Lookup):
            ones = jnp.ones(self.x.shape, self.g.dtype) if self.alive is None else self.alive
            return self._scattered(ones[..., None])[:, 0] * self.how.scale**2
        if isinstance(self.how, Convolution):
            images = self.x.shape[0]
            chunk = max(1, images // math.prod(self.how.window))

            def moment(x: jax.Array, *alive: jax.Array) -> jax.Array:
                rows = self._with_bias(self._patches(x))
                for part in alive:
                    rows = rows * jnp.moveaxis(part, 0, -2)[..., None]
                return _moment(rows, diagonal)

            if self.alive is None:
                return _sum_over_examples(moment, chunk, self.x)
            alive = self.alive.reshape((*self.how.members, images, -1))
            return _sum_over_examples(moment, chunk, self.x, jnp.moveaxis(alive, -2, 0))
        a = self._with_bias(self.x * _scale(self.how, self.x))
        return _moment(a if self.alive is None else a * self.alive[..., None], diagonal)

    def output_moment(self, diagonal: bool) -> jax.Array:
        """Sum over rows of g g', or its diagonal."""
        return _moment(self.g, diagonal)

    def gradients(self) -> jax.Array:
        """Per-example gradients, `(examples,) + members + (d_in [+ 1], d_out)`."""
        if isinstance(self.how, Lookup):
            tables: jax.Array = jax.vmap(functools.partial(_scatter, self.how))(self.x, self.g)
            return tables * self.how.scale
        x = self.x
        if isinstance(self.how, Convolution):
            x = self._patches(x)
            x = x.reshape((*self.how.members, self.g.shape[-3], -1, x.shape[-1]))
        a = self._with_bias(x * _scale(self.how, x))
        products = jnp.einsum("...nti,...nto->n...io", a, self.g, precision=HIGHEST)
        return products

    def squares(self) -> jax.Array:
        """Sum over examples of the squared per-example gradients."""
        if isinstance(self.how, Lookup):
            return self._lookup_squares()
        if isinstance(self.how, Convolution):

            def squares(x: jax.Array, g: jax.Array) -> jax.Array:
                x = x.reshape((-1, *x.shape[2:]))
                return jnp.sum(dataclasses.replace(self, x=x, g=g).gradients() ** 2, axis=0)

            x = self.x.reshape((self.how.examples, -1, *self.x.shape[1:]))
            return (
                squares(x, self.g)
                if self.how.members
                else _sum_over_examples(squares, 1, x, self.g)
            )
        if self.g.shape[-2] == 1:  # one row an example: (a^2)' g^2, no per-example gradients
            a = self._with_bias(self.x * _scale(self.how, self.x))[..., 0, :]
            g = self.g[..., 0, :]
            return jnp.einsum("...ni,...no->...io", a * a, g * g, precision=HIGHEST)
        return jnp.sum(self.gradients() ** 2, axis=0)

    def _lookup_squares(self) -> jax.Array:
        """As `squares`, without tables for every example.

        An entry's gradient in one example is the sum of the cotangents at the places where it is
        looked up; each of those places adds the same square, so it is shared among them.
        """
        same = (self.x[:, :, None] == self.x[:, None, :]).astype(self.g.dtype)
        sums = jnp.einsum("nst,nto->nso", same, self.g, precision=HIGHEST)
        shared = sums**2 / same.sum(axis=-1, keepdims=True)
        return self._scattered(shared) * self.how.scale**2

    def _scattered(self, values: jax.Array) -> jax.Array:
        return _scatter(self.how, self.x.ravel(), values.reshape((-1, values.shape[-1])))

    def _with_bias(self, a: jax.Array) -> jax.Array:
        if self.bias is None:
            return a
        return jnp.concatenate([a, jnp.full((*a.shape[:-1], 1), self.bias, a.dtype)], axis=-1)

    def _patches(self, x: jax.Array) -> jax.Array:
        """The windows of images `(examples, channels, spatial...)` as rows."""
        how = self.how
        assert isinstance(how, Convolution)
        groups = how.members[0] if how.members else 1
        patches = jax.lax.conv_general_dilated_patches(
            x * _scale(how, x),
            how.window,
            how.strides,
            how.padding,
            lhs_dilation=how.x_dilation,
            rhs_dilation=how.window_dilation,
            precision=HIGHEST,
        )
        split = patches.reshape((x.shape[0], groups, how.d_in, -1))
        rows = split.transpose((1, 0, 3, 2))
        return rows if how.members else rows[0]


def rows_of(
    how: Contraction,
    x: jax.Array,
    g: jax.Array,
    bias: float | None,
    alive: jax.Array | None,
    dtype: Any,
) -> Rows:
    """The rows of one use, from the equation's data operand and its output's cotangent."""
    g = output_rows(how, g).astype(dtype)
    if isinstance(how, Convolution):
        x = x.transpose(how.x_order).astype(dtype)
    elif isinstance(how, Lookup):
        x = x.transpose(how.i_order)[..., how.column].reshape((how.examples, -1))
    else:
        lead = (*how.members, how.examples)
        x = x.transpose(how.x_order).astype(dtype).reshape((*lead, -1, how.d_in))
    return Rows(how, x, g, bias, None if alive is None else alive.astype(dtype))


def output_rows(how: Contraction, g: jax.Array) -> jax.Array:
    """A use's output, or its cotangent, as `members + (examples, positions, d_out)`."""
    g = g.transpose(how.y_order)
    if not isinstance(how, Convolution):
        return g.reshape((*how.members, how.examples, -1, how.d_out))
    g = g.reshape((how.examples, -1, g.shape[-1]))
    if how.members:
        g = g.reshape((*g.shape[:2], *how.members, how.d_out)).transpose((2, 0, 1, 3))
    return g


def _scale(how: Dense | Convolution | Lookup, x: jax.Array) -> jax.Array:
    return jnp.asarray(how.scale, x.dtype)


def _moment(x: jax.Array, diagonal: bool) -> jax.Array:
    if diagonal:
        return jnp.sum(x * x, axis=(-3, -2))
    return jnp.einsum("...nti,...ntj->...ij", x, x, precision=HIGHEST)


def _scatter(how: Contraction, indices: jax.Array, values: jax.Array) -> jax.Array:
    """Adds rows of `values` into a table; indices out of bounds as the lookup treats them."""
    assert isinstance(how, Lookup)
    mode = "clip" if how.clip else "drop"
    return jnp.zeros((how.d_in, values.shape[-1]), values.dtype).at[indices].add(values, mode=mode)


def _sum_over_examples(one: Callable[..., jax.Array], chunk: int, *arrays: jax.Array) -> jax.Array:
    """The sum of `one` over chunks of the arrays' leading axis."""
    examples = arrays[0].shape[0]
    if chunk >= examples:
        return one(*arrays)
    groups, rest = divmod(examples, chunk)
    head = [x[: groups * chunk].reshape((groups, chunk, *x.shape[1:])) for x in arrays]
    shape: Shape = jax.eval_shape(one, *(x[0] for x in head)).shape
    zero = jnp.zeros(shape, arrays[0].dtype)
    total, _ = jax.lax.scan(lambda sum_, part: (sum_ + one(*part), None), zero, tuple(head))
    return total + one(*(x[groups * chunk :] for x in arrays)) if rest else total
