"""How a parameter meets the data: the static description of one use.

Each description says which axes of the equation's operands are what. Two kinds of row axes are told
apart: *examples* (the batch, over which squared gradients are summed) and the rest (positions, over
which an example's gradient is summed). Axes on which the weight itself has copies (experts, feature
groups, an ensemble) are *members*: they stack in front, as the axes of a scan do.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from curvature.trace.views import Shape


@dataclasses.dataclass(frozen=True)
class Dense:
    """`dot_general` of an input with a weight.

    Attributes:
      operand: which operand the input is (0 or 1).
      x_order: the input's axes as (members, examples, positions, contracted).
      y_order: the output's axes as (members, examples, positions, outputs).
      bias_axes: the output's axes that a bias spans (members and outputs).
      members: sizes of the weight's batch axes.
      examples: number of examples among the rows; 1 where the rows have no batch axis.
      d_in: contracted entries.
      d_out: outputs per row.
      scale: the constant the weight is multiplied by before it meets the input.
      one_hot: whether the input is one-hot, so that its second moment is diagonal.
      ragged: whether each row belongs to one member, and is zero in the others.
    """

    operand: int
    x_order: Shape
    y_order: Shape
    bias_axes: Shape
    members: Shape
    examples: int
    d_in: int
    d_out: int
    scale: float = 1.0
    one_hot: bool = False
    ragged: bool = False


@dataclasses.dataclass(frozen=True)
class Convolution:
    """`conv_general_dilated` of an input with a kernel; feature groups are members.

    Attributes:
      x_order: the input's axes as (examples, channels, spatial...).
      y_order: the output's axes as (examples, spatial..., channels).
      window: the kernel's spatial shape.
      strides: window strides.
      padding: (low, high) for each spatial axis.
      x_dilation: dilation of the input (transposed convolutions).
      window_dilation: dilation of the kernel.
      members: (groups,) where there are several.
      examples: number of examples; 1 where the input has no batch axis.
      d_in: input channels of a group times window entries, channels first.
      d_out: output channels of a group.
      scale: the constant the kernel is multiplied by.
    """

    x_order: Shape
    y_order: Shape
    window: Shape
    strides: Shape
    padding: tuple[tuple[int, int], ...]
    x_dilation: Shape
    window_dilation: Shape
    members: Shape
    examples: int
    d_in: int
    d_out: int
    scale: float = 1.0
    operand: int = 0
    one_hot: bool = False

    @property
    def bias_axes(self) -> Shape:
        """The output's axis of channels."""
        return self.y_order[-1:]


@dataclasses.dataclass(frozen=True)
class Lookup:
    """`gather` of rows of a table: an input that is one-hot and never made.

    Attributes:
      i_order: the indices' axes as (examples, positions, 1).
      column: the entry of an index vector that counts rows of the table.
      y_order: the output's axes as (examples, positions, outputs).
      clip: whether indices out of bounds are clipped; dropped otherwise.
      examples: number of examples; 1 where the indices have no batch axis.
      d_in: rows of the table.
      d_out: entries of a row.
      scale: the constant the table is multiplied by.
    """

    i_order: Shape
    column: int
    y_order: Shape
    clip: bool
    examples: int
    d_in: int
    d_out: int
    scale: float = 1.0
    operand: int = 1
    members: Shape = ()
    one_hot: bool = True

    @property
    def bias_axes(self) -> Shape:
        """The output's axes that come from the table."""
        return self.y_order[len(self.i_order) - 1 :]


@dataclasses.dataclass(frozen=True)
class Elementwise:
    """A parameter broadcast against the data: norm scales, offsets, positional tables, tokens.

    Attributes:
      shape: the shape to which it is broadcast.
      axes: for each axis of the parameter view, its axis in `shape`.
      example_axis: the batch axis in `shape`, examples first; None where there is none.
      examples: number of examples; 1 where there is no batch axis.
      curved: whether the operand is an elementwise function of the parameter, whose derivative
        the evaluator brings along.
      scale: the constant the parameter is multiplied by.
    """

    shape: Shape
    axes: Shape
    example_axis: int | None
    examples: int
    curved: bool = False
    scale: float = 1.0


Contraction = Dense | Convolution | Lookup
Layout = Contraction | Elementwise


@dataclasses.dataclass(frozen=True)
class Batch:
    """The batch axis of a value, of size examples x `each`.

    Attributes:
      axis: which axis it is.
      each: how many entries along it belong to one example.
      first: whether they lie side by side, examples first; otherwise (an axis of time and batch,
        in this order, was flattened) examples cannot be told apart.
    """

    axis: int
    each: int = 1
    first: bool = True

    def examples(self, size: int) -> int:
        """The number of examples that can be told apart along the axis."""
        return size // self.each if self.first else 1


@dataclasses.dataclass(frozen=True)
class Examples:
    """How many examples a batch has, and how many more there are of them in the twin.

    Batches of one loss (points inside and on the boundary, labelled and unlabelled data) have
    different numbers, and different ratios of the two.
    """

    number: int
    more: int = 1

    def along(self, size: int, larger: int) -> int:
        """Entries of an axis for each example, from its size here and in the twin; 0 for none."""
        if larger == size or self.number == 0:
            return 0
        whole = size % self.number == 0 and (larger - size) * self.number == size * self.more
        return size // self.number if whole else 0


def split_rows(rows: list[int], batch: Batch | None, size: int) -> tuple[list[int], int]:
    """Row axes with the batch axis first, and the number of examples among them."""
    if batch is None or batch.axis not in rows:
        return rows, 1
    return [batch.axis, *(a for a in rows if a != batch.axis)], batch.examples(size)


def dense(
    equation: Any, operand: int, x: Shape, w: Shape, batch: Batch | None
) -> tuple[Dense, Shape, Shape]:
    """The description of a `dot_general`; the weight's axis order and shape as a matrix."""
    contract, batched = equation.params["dimension_numbers"]
    x_in, x_batch = contract[operand], batched[operand]
    w_in, w_batch = contract[1 - operand], batched[1 - operand]
    w_out = [a for a in range(len(w)) if a not in w_in and a not in w_batch]
    free = [a for a in range(len(x)) if a not in x_in and a not in x_batch]
    rows, examples = split_rows(free, batch, x[batch.axis] if batch else 1)
    # The output's axes: batch, then the left operand's free axes, then the right one's.
    lead = tuple(range(len(x_batch)))
    first = len(lead) if operand == 0 else len(lead) + len(w_out)
    place = {axis: first + i for i, axis in enumerate(free)}
    start = len(lead) + len(free) if operand == 0 else len(lead)
    out = tuple(range(start, start + len(w_out)))
    members = tuple(w[a] for a in w_batch)
    d_in, d_out = math.prod(w[a] for a in w_in), math.prod(w[a] for a in w_out)
    layout = Dense(
        operand,
        x_order=(*x_batch, *rows, *x_in),
        y_order=(*lead, *(place[a] for a in rows), *out),
        bias_axes=(*lead, *out),
        members=members,
        examples=examples,
        d_in=d_in,
        d_out=d_out,
    )
    return layout, (*w_batch, *w_in, *w_out), (*members, d_in, d_out)


def convolution(
    equation: Any, x: Shape, w: Shape, batch: Batch | None
) -> tuple[Convolution, Shape, Shape, Shape] | None:
    """The description of a convolution.

    Returns also how to bring the kernel into block coordinates: a permutation to (in channels,
    window, out channels), the shape with groups apart, and the matrix shape with groups in front.
    None for convolutions with batch groups.
    """
    params = equation.params
    if params["batch_group_count"] != 1:
        return None
    numbers, groups = params["dimension_numbers"], int(params["feature_group_count"])
    (w_out, w_in, *w_window), (y_batch, y_out, *y_window) = numbers.rhs_spec, numbers.out_spec
    window = tuple(w[a] for a in w_window)
    d_in, d_out = w[w_in] * math.prod(window), w[w_out] // groups
    x_batch = numbers.lhs_spec[0]
    is_batch = batch is not None and batch.axis == x_batch
    layout = Convolution(
        x_order=tuple(numbers.lhs_spec),
        y_order=(y_batch, *y_window, y_out),
        window=window,
        strides=tuple(params["window_strides"]),
        padding=tuple((int(a), int(b)) for a, b in params["padding"]),
        x_dilation=tuple(params["lhs_dilation"]),
        window_dilation=tuple(params["rhs_dilation"]),
        members=(groups,) if groups > 1 else (),
        examples=batch.examples(x[x_batch]) if is_batch and batch else 1,
        d_in=d_in,
        d_out=d_out,
    )
    order = (w_in, *w_window, w_out)
    return layout, order, (d_in, groups, d_out), (*layout.members, d_in, d_out)


def lookup(
    equation: Any, table: Shape, indices: Shape, batch: Batch | None
) -> tuple[Lookup, Shape, Shape] | None:
    """The description of a `gather` of whole rows along one axis; None for any other gather."""
    numbers, mode = equation.params["dimension_numbers"], str(equation.params["mode"])
    sizes, indexed = equation.params["slice_sizes"], numbers.start_index_map
    # An axis of which the slice is the whole can only start at zero, whatever its index says.
    moving = [a for a in indexed if sizes[a] != table[a] or len(indexed) == 1]
    if len(moving) != 1 or numbers.operand_batching_dims or (len(indexed) > 1 and "FILL" in mode):
        return None
    (axis,) = moving
    rest = [a for a in range(len(table)) if a != axis]
    if set(numbers.collapsed_slice_dims) - {axis} or any(sizes[a] != table[a] for a in rest):
        return None
    if sizes[axis] != 1:
        return None
    out = equation.outvars[0].aval.ndim
    places = [a for a in range(out) if a not in numbers.offset_dims]  # of the indices' axes
    free = list(range(len(indices) - 1))  # the last axis holds the index vector
    rows, examples = split_rows(free, batch, indices[batch.axis] if batch else 1)
    layout = Lookup(
        i_order=(*rows, len(indices) - 1),
        column=tuple(indexed).index(axis),
        y_order=(*(places[a] for a in rows), *numbers.offset_dims),
        clip="CLIP" in mode,
        examples=examples,
        d_in=table[axis],
        d_out=math.prod(table[a] for a in rest),
    )
    return layout, (axis, *rest), (layout.d_in, layout.d_out)


# Primitives that act on every entry by itself, whatever their other operands hold there.
ELEMENTWISE = frozenset(
    [
        "abs",
        "acos",
        "acosh",
        "add",
        "add_any",
        "and",
        "asin",
        "asinh",
        "atan",
        "atan2",
        "atanh",
        "cbrt",
        "ceil",
        "clamp",
        "convert_element_type",
        "copy",
        "copy_p",
        "cos",
        "cosh",
        "digamma",
        "div",
        "eq",
        "erf",
        "erf_inv",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "ge",
        "gt",
        "integer_pow",
        "is_finite",
        "le",
        "lgamma",
        "log",
        "log1p",
        "logistic",
        "lt",
        "max",
        "min",
        "mul",
        "name",
        "ne",
        "neg",
        "nextafter",
        "not",
        "or",
        "pow",
        "reduce_precision",
        "rem",
        "round",
        "rsqrt",
        "select_n",
        "sign",
        "sin",
        "sinh",
        "sqrt",
        "square",
        "stop_gradient",
        "sub",
        "tan",
        "tanh",
        "xor",
    ]
)
