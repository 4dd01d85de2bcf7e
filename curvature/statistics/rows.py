"""The rows of a layer in one backward pass: inputs and output cotangents, and their moments.

`Rows` holds arrays of shape `members + (examples, positions, features)`. A convolution makes its
patches for a few examples at a time, so that no patch tensor is much larger than the layer's input
(or one example's patches); a lookup never makes its one-hot input.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from curvature.precision import HIGHEST, Precision, accumulator, kept_by, narrow, product
from curvature.sides import Shape, is_diagonal, right, split
from curvature.statistics.chunks import map_over_examples, sum_over_examples
from curvature.trace.layouts import Contraction, Convolution, Dense, Lookup

# Numbers that patches and gradients of a few examples of a convolution may take: what a core's
# cache holds, and what keeps an accelerator busy.
_CACHED, _AT_ONCE = 2**18, 2**24


@dataclasses.dataclass(frozen=True)
class Rows:
    """Inputs and output cotangents of one use.

    Attributes:
      layout: the use.
      x: the layer's input: `members + (examples, positions, d_in)`; for a convolution the image
        `(examples, channels, spatial...)`, for a lookup the indices `(examples, positions)`.
      g: output cotangents, `members + (examples, positions, d_out)`.
      bias: the homogeneous coordinate (1 times the bias's scale); None without a bias.
      alive: 1 for rows that a loss depends on, 0 for others, `members + (examples, positions)`;
        None where all count.
      basis: an eigenbasis in which inputs are expressed, `members + (d_in, d_in)` or in blocks;
        None for the coordinates themselves.
      gains: what inputs are multiplied by, `members + (d_in,)`; None for ones.
      exact: dtypes of 16 bits that hold inputs and cotangents as they are; None where none does.
      precision: of products.
    """

    layout: Contraction
    x: jax.Array
    g: jax.Array
    bias: float | None
    alive: jax.Array | None = None
    basis: jax.Array | None = None
    gains: jax.Array | None = None
    exact: tuple[Any, Any] = (None, None)
    precision: Precision = HIGHEST

    def turned(self, inputs: jax.Array, outputs: jax.Array) -> Rows:
        """The rows in other bases, a Q_A and g Q_B; ones in place of a matrix for the identity."""
        members = len(self.layout.members)
        g = self.g if is_diagonal(outputs, members) else self._turned(self.g, outputs)
        basis = None if is_diagonal(inputs, members) else inputs
        return dataclasses.replace(self, g=g, basis=basis, exact=(None, None))

    def _turned(self, rows: jax.Array, basis: jax.Array) -> jax.Array:
        members = len(self.layout.members)
        return right("...nti,...ij->...ntj", rows, basis, members, self.precision, rows=2)

    def scaled(self, inputs: jax.Array, outputs: jax.Array) -> Rows:
        """The rows of a weight that is multiplied by a number for each input and each output."""
        g = self.g * outputs[..., None, None, :]
        return dataclasses.replace(self, g=g, gains=inputs, exact=(None, None))

    def count(self) -> jax.Array:
        """Rows of every member."""
        if self.alive is not None:
            return self.alive.sum(axis=(-2, -1))
        rows = math.prod(self.g.shape[len(self.layout.members) : -1])
        return jnp.full(self.layout.members, rows, self.g.dtype)

    def weights(self) -> jax.Array:
        """1 for rows that count, 0 for others, `members + (examples, positions)`."""
        return jnp.ones(self.g.shape[:-1], self.g.dtype) if self.alive is None else self.alive

    def input_moment(self, form: Shape, weights: jax.Array | None = None) -> jax.Array:
        """Sum over rows of a a', each times its weight (None for 1), in a form of `sides`."""
        if isinstance(self.layout, Lookup):
            ones = jnp.ones(self.x.shape, self.g.dtype) if weights is None else weights
            return self._of_entries(self._scattered(ones[..., None])[:, 0], 2)
        x, roots = self.x, [] if weights is None else [jnp.sqrt(weights)]
        if self.exact[0] is not None and (weights is None or weights is self.alive):
            x = x.astype(self.exact[0])
            roots = [root.astype(x.dtype) for root in roots]
        if isinstance(self.layout, Convolution):

            def of_images(x: jax.Array, *roots: jax.Array) -> jax.Array:
                rows = self._inputs(x)
                for root in roots:
                    rows = rows * jnp.moveaxis(root, 0, -2)[..., None]
                return moment(rows, form, self.precision)

            per_image = [r.reshape((*self.layout.members, len(x), -1)) for r in roots]
            leading = [jnp.moveaxis(r, -2, 0) for r in per_image]
            return sum_over_examples(of_images, self._images_at_once, x, *leading)
        a = self._inputs(x)
        for root in roots:
            a = a * root[..., None]
        return moment(a, form, self.precision)

    def output_moment(self, form: Shape, weights: jax.Array | None = None) -> jax.Array:
        """Sum over rows of g g', each times its weight (None for 1), in a form of `sides`."""
        g = self.g if weights is None else self.g * jnp.sqrt(weights)[..., None]
        if weights is None and self.exact[1] is not None:
            g = g.astype(self.exact[1])
        return moment(g, form, self.precision)

    def input_sums(self) -> jax.Array:
        """Sums of a over the positions of every example, `members + (examples, d_in [+ 1])`."""
        if isinstance(self.layout, Lookup):
            ones = self.weights()[..., None]
            counts = jax.vmap(functools.partial(_scatter, self.layout))(self.x, ones)[..., 0]
            return self._of_entries(counts, 1)
        if isinstance(self.layout, Convolution):
            x = self.x.reshape((self.layout.examples, -1, *self.x.shape[1:]))
            alive = jnp.moveaxis(self.weights(), -2, 0)

            def one(x: jax.Array, alive: jax.Array) -> jax.Array:
                rows = self._inputs(x.reshape((-1, *x.shape[2:])))
                rows = rows.reshape((*self.layout.members, len(x), -1, rows.shape[-1]))
                rows = rows * jnp.moveaxis(alive, 0, -2)[..., None]
                return jnp.moveaxis(jnp.sum(rows, axis=-2), -2, 0)

            return jnp.moveaxis(map_over_examples(one, self._images_at_once, x, alive), 0, -2)
        a = self._inputs(self.x)
        return jnp.sum(a if self.alive is None else a * self.alive[..., None], axis=-2)

    def input_norms(self) -> jax.Array:
        """|a|^2 of every row, `members + (examples, positions)`."""
        bias = 0.0 if self.bias is None else self.bias**2
        if isinstance(self.layout, Lookup):
            found = jnp.ones(self.x.shape, bool) if self.layout.clip else self.x < self.layout.d_in
            gains = 1.0 if self.gains is None else self.gains.at[self.x].get(mode="clip") ** 2
            return found.astype(self.g.dtype) * self.layout.scale**2 * gains
        if self.gains is not None:
            return jnp.sum(self._inputs(self.x) ** 2, axis=-1).reshape(self.g.shape[:-1])
        if isinstance(self.layout, Convolution):  # patches of |x|^2, which has one channel a group
            groups = self.layout.members[0] if self.layout.members else 1
            squares = self.x.reshape((len(self.x), groups, -1, *self.x.shape[2:])) ** 2
            patches = _windows(self.layout, jnp.sum(squares, axis=2))
            norms = patches.reshape((len(self.x), groups, math.prod(self.layout.window), -1)).sum(2)
            norms = jnp.moveaxis(norms, 1, 0).reshape(self.g.shape[:-1])
        else:
            norms = jnp.sum(self.x**2, axis=-1)
        return norms * self.layout.scale**2 + bias

    def gradients(self) -> jax.Array:
        """Per-example gradients, `(examples,) + members + (d_in [+ 1], d_out)`."""
        if isinstance(self.layout, Lookup):
            tables: jax.Array = jax.vmap(functools.partial(_scatter, self.layout))(self.x, self.g)
            return self._of_entries(tables.mT, 1).mT
        a = self._inputs(self.x)
        if isinstance(self.layout, Convolution):
            a = a.reshape((*self.layout.members, self.g.shape[-3], -1, a.shape[-1]))
        return product("...nti,...nto->n...io", a, self.g, self.precision)

    def total(self) -> jax.Array:
        """The sum of the gradients of all examples, `members + (d_in [+ 1], d_out)`."""
        if isinstance(self.layout, Lookup):
            return self._of_entries(self._scattered(self.g).mT, 1).mT
        if isinstance(self.layout, Convolution):

            def of_images(x: jax.Array, g: jax.Array) -> jax.Array:
                a, g = self._inputs(x), jnp.moveaxis(g, 0, -3)
                rows = (*self.layout.members, -1)
                a, g = a.reshape((*rows, a.shape[-1])), g.reshape((*rows, g.shape[-1]))
                return product("...ri,...ro->...io", a, g, self.precision)

            per_image = self.g.reshape((*self.layout.members, len(self.x), -1, self.layout.d_out))
            leading = jnp.moveaxis(per_image, -3, 0)
            return sum_over_examples(of_images, self._images_at_once, self.x, leading)
        a = self._inputs(self.x)
        return product("...nti,...nto->...io", a, self.g, self.precision)

    def squares(self) -> jax.Array:
        """Sum over examples of the squared per-example gradients."""
        if isinstance(self.layout, Lookup):
            return self._of_entries(self._lookup_squares(self.g).mT, 2).mT
        if isinstance(self.layout, Convolution):
            x = self.x.reshape((self.layout.examples, -1, *self.x.shape[1:]))
            found: jax.Array = jax.lax.platform_dependent(
                x,
                jnp.moveaxis(self.g, -3, 0),
                cpu=functools.partial(self._squares_of_images, _CACHED),
                default=functools.partial(self._squares_of_images, _AT_ONCE),
            )
            return found
        if self.g.shape[-2] == 1:  # one row an example: (a^2)' g^2, no per-example gradients
            a = self._inputs(self.x)[..., 0, :]
            g = self.g[..., 0, :]
            return product("...ni,...no->...io", a * a, g * g, self.precision)
        return jnp.sum(self.gradients() ** 2, axis=0)

    def _squares_of_images(self, entries: int, x: jax.Array, g: jax.Array) -> jax.Array:
        """`squares` of a convolution, from what examples have in front of inputs and cotangents."""

        def squares(x: jax.Array, g: jax.Array) -> jax.Array:
            part = dataclasses.replace(
                self, x=x.reshape((-1, *x.shape[2:])), g=jnp.moveaxis(g, 0, -3)
            )
            return jnp.sum(part.gradients() ** 2, axis=0)

        # An example has patches, maybe the same in another basis, and a gradient.
        each = (
            math.prod(self.layout.members)
            * self.layout.d_in
            * (2 * g.shape[-2] + self.layout.d_out)
        )
        return sum_over_examples(squares, entries // each, x, g)

    def squared_counts(self) -> jax.Array:
        """For a lookup, the sum over examples of each entry's squared share of the positions."""
        weights = self.weights()
        share = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1)
        return self._of_entries(self._lookup_squares(share[..., None])[:, 0], 2)

    @property
    def _images_at_once(self) -> int:
        """Images whose patches are no larger than the layer's input, or fit into a cache."""
        assert isinstance(self.layout, Convolution)
        images, window = len(self.x), math.prod(self.layout.window)
        patches = self.layout.d_in * math.prod(self.g.shape[:-1]) // images
        return max(images // window, _CACHED // patches)

    def _lookup_squares(self, values: jax.Array) -> jax.Array:
        """For a lookup, squares of the sums of `values` by example and entry, summed over examples.

        An entry's sum in one example is over the places where it is looked up; each of those places
        adds the same square, so it is shared among them, and no table is made for an example.
        """
        same = (self.x[:, :, None] == self.x[:, None, :]).astype(values.dtype)
        sums = product("nst,nto->nso", same, values, self.precision)
        return self._scattered(sums**2 / same.sum(axis=-1, keepdims=True))

    def _of_entries(self, values: jax.Array, power: int) -> jax.Array:
        """For a lookup, `(..., d_in)` values times a power of what each entry is multiplied by."""
        values = values * self.layout.scale**power
        return values if self.gains is None else values * self.gains**power

    def _scattered(self, values: jax.Array) -> jax.Array:
        return _scatter(self.layout, self.x.ravel(), values.reshape((-1, values.shape[-1])))

    def _inputs(self, x: jax.Array) -> jax.Array:
        """Rows a from (a part of) `x`: patches, scale, bias and basis; a lookup has none."""
        if isinstance(self.layout, Convolution):
            x = self._patches(x)
        scale = self.layout.scale
        a = x if scale == 1 else x * jnp.asarray(scale, x.dtype)
        if self.bias is not None:
            ones = jnp.full((*a.shape[:-1], 1), self.bias, a.dtype)
            a = jnp.concatenate([a, ones], axis=-1)
        if self.gains is not None:
            a = a * self.gains[..., None, None, :]
        if self.basis is None:
            return a
        return self._turned(a, self.basis)

    def _patches(self, x: jax.Array) -> jax.Array:
        """The windows of images `(examples, channels, spatial...)` as rows."""
        layout = self.layout
        assert isinstance(layout, Convolution)
        groups = layout.members[0] if layout.members else 1
        split = _windows(layout, x).reshape((x.shape[0], groups, layout.d_in, -1))
        rows = split.transpose((1, 0, 3, 2))
        return rows if layout.members else rows[0]


def rows_of(
    layout: Contraction,
    x: jax.Array,
    g: jax.Array,
    bias: float | None,
    alive: jax.Array | None,
    dtype: Any,
    precision: Precision,
) -> Rows:
    """The rows of one use, from the equation's data operand and its output's cotangent."""
    # Inputs of 16 bits stay so where a scale and a bias, mostly 1, need no more.
    whole = narrow(x.dtype) and layout.scale == 1 and (bias is None or kept_by(x.dtype, bias))
    exact = (x.dtype if whole else None, g.dtype if narrow(g.dtype) else None)
    g = output_rows(layout, g).astype(dtype)
    if isinstance(layout, Convolution):
        x = x.transpose(layout.x_order).astype(dtype)
    elif isinstance(layout, Lookup):
        x = x.transpose(layout.i_order)[..., layout.column].reshape((layout.examples, -1))
        # Out of bounds is the last row, or no row at all; a negative index is not the end.
        inside = (x >= 0) & (x < layout.d_in)
        x = jnp.clip(x, 0, layout.d_in - 1) if layout.clip else jnp.where(inside, x, layout.d_in)
    else:
        lead = (*layout.members, layout.examples)
        x = x.transpose(layout.x_order).astype(dtype).reshape((*lead, -1, layout.d_in))
    alive = None if alive is None else alive.astype(dtype)
    if isinstance(layout, Dense) and layout.ragged:  # a row counts where it has anything at all
        own = (jnp.any(x != 0, axis=-1) | jnp.any(g != 0, axis=-1)).astype(dtype)
        alive = own if alive is None else alive * own
    return Rows(layout, x, g, bias, alive, exact=exact, precision=precision)


def output_rows(layout: Contraction, g: jax.Array) -> jax.Array:
    """A use's output, or its cotangent, as `members + (examples, positions, d_out)`."""
    g = g.transpose(layout.y_order)
    if not isinstance(layout, Convolution):
        return g.reshape((*layout.members, layout.examples, -1, layout.d_out))
    g = g.reshape((layout.examples, -1, g.shape[-1]))
    if layout.members:
        g = g.reshape((*g.shape[:2], *layout.members, layout.d_out)).transpose((2, 0, 1, 3))
    return g


def _windows(layout: Convolution, x: jax.Array) -> jax.Array:
    """The windows of images, `(examples, channels * window entries, spatial...)`."""
    return jax.lax.conv_general_dilated_patches(
        x,
        layout.window,
        layout.strides,
        layout.padding,
        lhs_dilation=layout.x_dilation,
        rhs_dilation=layout.window_dilation,
        precision=HIGHEST,
    )


def moment(x: jax.Array, form: Shape, precision: Precision) -> jax.Array:
    """The sum of x x' over rows `(examples, positions)`, in a form of `sides`."""
    if len(form) == 1:
        x = x.astype(accumulator(x.dtype))
        return jnp.sum(x * x, axis=(-3, -2))
    if len(form) == 3:
        parts = split(x, form[:2])
        return product("...ntki,...ntkj->...kij", parts, parts, precision)
    return product("...nti,...ntj->...ij", x, x, precision)


def _scatter(layout: Contraction, indices: jax.Array, values: jax.Array) -> jax.Array:
    """Adds rows of `values` into a table; indices out of bounds as the lookup treats them."""
    assert isinstance(layout, Lookup)
    mode = "clip" if layout.clip else "drop"
    return (
        jnp.zeros((layout.d_in, values.shape[-1]), values.dtype).at[indices].add(values, mode=mode)
    )
