"""How one equation meets a parameter: moves it, contracts it with data, adds it as a bias, ...

Every function looks at one live equation with a parameter among its operands and says what its
outputs are, or None where the rule does not apply.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from curvature import _jax
from curvature.trace import layouts, liveness
from curvature.trace.environment import Environment, Known, OneHot, Product, Ragged, Value, Wide
from curvature.trace.layouts import Elementwise
from curvature.trace.program import Use
from curvature.trace.views import Joined, Shape, View

PASSES = (
    "convert_element_type",
    "copy",
    "copy_p",
    "device_put",
    "name",
    "optimization_barrier",
    "pcast",
    "pvary",
    "reduce_precision",
    "reshard",
    "sharding_constraint",
)

IDENTITIES = ("device_put", "optimization_barrier")  # of several operands


def moved(equation: _jax.Equation, value: Value, batched: bool) -> list[Value] | None:
    """The outputs of an equation that only moves its operand's entries."""
    if isinstance(value, Product):
        views = _moved(equation, value.view, batched)
        if views is None or not all(isinstance(v, View) for v in views):
            return None
        return [dataclasses.replace(value, view=v) for v in views if isinstance(v, View)]
    if isinstance(value, View):
        return _moved(equation, value, batched)
    if isinstance(value, Wide):
        name, params = equation.primitive.name, equation.params
        if name in PASSES:
            return [value]
        if name == "broadcast_in_dim":
            axes = tuple(params["broadcast_dimensions"][a] for a in value.axes)
            return [Wide(value.view, tuple(params["shape"]), axes)]
    return None


def _moved(equation: _jax.Equation, view: View, batched: bool) -> list[Value] | None:
    name, params = equation.primitive.name, equation.params
    shape = tuple(equation.outvars[0].aval.shape)
    if name in PASSES:
        floating = jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating)
        return [view] if floating else None
    if name == "squeeze" or (name == "reshape" and params.get("dimensions") is None):
        return [view.reshape(shape)]
    if name == "reduce_sum" and math.prod(shape) == math.prod(view.inner):  # of single entries
        return [view.reshape(shape)]
    if name == "transpose":
        return [view.transpose(tuple(params["permutation"]))]
    if name == "slice":
        return [view.slice(params["start_indices"], params["limit_indices"], params["strides"])]
    if name == "rev":
        return [view.reverse(tuple(params["dimensions"]))]
    if name == "split":
        return _split(view, params["axis"], params["sizes"])
    if name == "tile":
        stretched = [n for n, times in zip(view.inner, params["reps"], strict=True) if times > 1]
        whole = all(n == 1 for n in stretched)
        return [Wide(view, shape, tuple(range(len(shape))))] if whole else None
    if name == "broadcast_in_dim":
        # Where only axes of size one are new, and none of them is the batch, it is a reshape.
        if math.prod(shape) == math.prod(view.inner) and not batched:
            return [view.reshape(shape)]
        return [Wide(view, shape, tuple(params["broadcast_dimensions"]))]
    return None


def _split(view: View, axis: int, sizes: Sequence[int]) -> list[Value]:
    parts: list[Value] = []
    start = 0
    for size in sizes:
        starts, stops = [0] * len(view.inner), list(view.inner)
        starts[axis], stops[axis] = start, start + int(size)
        parts.append(view.slice(tuple(starts), tuple(stops), None))
        start += int(size)
    return parts


def joined(equation: _jax.Equation, values: Sequence[Value]) -> View | None:
    """The concatenation of nothing but parameters: one operand made of ranges of leaves."""
    name, params = equation.primitive.name, equation.params
    views = [v for v in values if isinstance(v, View) and not v.curved]
    if name not in ("concatenate", "stack") or len(views) < len(values):
        return None
    if len({(v.stack, v.scale) for v in views}) > 1:
        return None
    axis = int(params["dimension"] if name == "concatenate" else params["axis"])
    if name == "stack":
        views = [v.reshape((*v.inner[:axis], 1, *v.inner[axis:])) for v in views]
    parts = tuple(dataclasses.replace(v, scale=1.0) for v in views)
    return Joined(parts, axis + len(views[0].stack)).view(views[0].scale)


def translated(equation: _jax.Equation, values: Sequence[Value], env: Environment) -> View | None:
    """A view plus or minus a value that has no batch axis: the same entries, moved elsewhere.

    So are weights rounded with a straight-through gradient, and frozen weights with something
    trained added.
    """
    if equation.primitive.name not in ("add", "add_any", "sub") or len(values) != 2:
        return None
    (out,) = equation.outvars
    for view, other in (values, values[::-1]):
        if not isinstance(view, View) or isinstance(other, (View, Wide, Product)):
            continue
        if view.curved:  # its slope is carried along
            continue
        if tuple(out.aval.shape) != view.inner or env.batch(out) is not None:
            continue
        subtracted = equation.primitive.name == "sub" and view is values[1]
        return view.scaled(-1.0) if subtracted else view
    return None


def scaled(equation: _jax.Equation, values: Sequence[Value]) -> View | None:
    """A view multiplied by, divided by, or subtracted from nothing but a constant number."""
    name = equation.primitive.name
    if any(isinstance(v, View) and v.curved for v in values):
        return None  # its slope is carried along
    if name == "neg" and isinstance(values[0], View):
        return values[0].scaled(-1.0)
    if name not in ("mul", "div") or len(values) != 2:
        return None
    for view, other in (values, values[::-1]):
        if isinstance(view, View) and isinstance(other, Known) and other.value.ndim == 0:
            factor = float(other.value)
            if name == "div":
                return view.scaled(1 / factor) if view is values[0] and factor else None
            return view.scaled(factor)
    return None


def contraction(
    equation: _jax.Equation, values: Sequence[Value], env: Environment
) -> tuple[Use, Product] | None:
    """A dense, convolutional or embedding layer.

    Of an elementwise function of a weight (a mask, a rounded weight), too: a bias is then no part
    of the layer, whose derivative is another one.
    """
    sides = [i for i in range(min(len(values), 2)) if isinstance(values[i], View)]
    parameters = [v for v in values if isinstance(v, (View, Wide))]
    if len(sides) != 1 or len(parameters) != 1:
        return None
    view = values[sides[0]]
    assert isinstance(view, View)
    other = 1 - sides[0]
    if other >= len(equation.invars):
        return None
    rule = CONTRACTIONS.get(equation.primitive.name)
    operand = Operand(other, values[other], env.batch(equation.invars[other]))
    found = rule(equation, operand, view.inner) if rule is not None else None
    if found is None:
        return None
    kind, layout, moves = found
    unbatched = env.batch(equation.outvars[0]) is None
    shape = tuple(equation.outvars[0].aval.shape)
    slope = _placed(View.of(None, view.inner), moves) if view.curved else None
    target = dataclasses.replace(_placed(view, moves), curved=False)
    layout = dataclasses.replace(layout, scale=view.scale)
    use = Use(target, layout, kind, equation.primitive.name, unbatched=unbatched, slope=slope)
    return use, Product(use, View.of(use, shape))


class Operand(NamedTuple):
    """The data that a weight is contracted with.

    Attributes:
      position: of the operand, 0 or 1.
      value: what is known of it.
      batch: its batch axis; None without one.
    """

    position: int
    value: Value
    batch: layouts.Batch | None


class Contracted(NamedTuple):
    """A layer that was found.

    Attributes:
      kind: `"dense"`, `"conv"` or `"embedding"`.
      layout: how the weight meets the data.
      moves: how to bring it into block coordinates: permutations and shapes in turn.
    """

    kind: str
    layout: layouts.Contraction
    moves: tuple[Shape, ...]


def _dot(equation: _jax.Equation, data: Operand, weight: Shape) -> Contracted | None:
    x = tuple(equation.invars[data.position].aval.shape)
    layout, order, matrix = layouts.dense(equation, data.position, x, weight, data.batch)
    whole = layout.x_order[-1] == len(x) - 1 and layout.d_in == x[-1]
    one_hot, ragged = isinstance(data.value, OneHot) and whole, isinstance(data.value, Ragged)
    layout = dataclasses.replace(layout, one_hot=one_hot, ragged=ragged)
    return Contracted("embedding" if one_hot else "dense", layout, (order, matrix))


def _convolution(equation: _jax.Equation, data: Operand, weight: Shape) -> Contracted | None:
    x = tuple(equation.invars[data.position].aval.shape)
    found = layouts.convolution(equation, x, weight, data.batch) if data.position == 0 else None
    if found is None:
        return None
    layout, order, apart, matrix = found
    return Contracted("conv", layout, (order, apart, (1, 0, 2), matrix))


def _gather(equation: _jax.Equation, data: Operand, weight: Shape) -> Contracted | None:
    indices = tuple(equation.invars[data.position].aval.shape)
    found = layouts.lookup(equation, weight, indices, data.batch) if data.position == 1 else None
    if found is None:
        return None
    layout, order, matrix = found
    return Contracted("embedding", layout, (order, matrix))


CONTRACTIONS: dict[str, Callable[[_jax.Equation, Operand, Shape], Contracted | None]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "gather": _gather,
}
"""By primitive, the layer that a weight of some shape and the data make; None for no layer."""


def _placed(view: View, moves: Sequence[Shape]) -> View:
    """An operand in block coordinates: permutations and shapes in turn."""
    for i, argument in enumerate(moves):
        view = view.reshape(argument) if i % 2 else view.transpose(argument)
    return view


def picked(equation: _jax.Equation, values: Sequence[Value]) -> View | None:
    """A gather of consecutive rows with known indices (a positional table): a slice."""
    view, index = values[0], values[1] if len(values) > 1 else None
    if equation.primitive.name != "gather" or not isinstance(view, View):
        return None
    if not isinstance(index, Known):
        return None
    found = layouts.lookup(equation, view.inner, index.value.shape, None)
    if found is None:
        return None
    layout, order, _ = found
    flat = index.value[..., layout.column].ravel()
    if not len(flat) or not np.array_equal(flat, flat[0] + np.arange(len(flat))):
        return None
    rest = tuple(view.inner[a] for a in order[1:])
    rows = view.transpose(order).slice(
        (int(flat[0]), *[0] * len(rest)), (int(flat[-1]) + 1, *rest), None
    )
    # The gathered axes lie where the indices' axes go in the output.
    shape = tuple(equation.outvars[0].aval.shape)
    rows = rows.reshape(tuple(shape[a] for a in layout.y_order))
    inverse = np.argsort(layout.y_order)
    return rows.transpose(tuple(int(a) for a in inverse))


def bias(equation: _jax.Equation, values: Sequence[Value]) -> tuple[Use, View] | None:
    """A parameter added to the output of a contraction: the use it joins, and its entries."""
    if equation.primitive.name not in ("add", "add_any"):
        return None
    shape = tuple(equation.outvars[0].aval.shape)
    for product, other in (values, values[::-1]):
        if not (isinstance(product, Product) and isinstance(other, (View, Wide))):
            continue
        use, view = product.use, other if isinstance(other, View) else other.view
        layout = use.layout
        assert isinstance(layout, (layouts.Dense, layouts.Convolution, layouts.Lookup))
        joined = use.bias is not None or layout.one_hot or view.curved
        if not joined and view.stack == use.view.stack and _is_bias(shape, product, other):
            return use, view.reshape((*layout.members, layout.d_out))
    return None


def _is_bias(shape: Shape, product: Product, bias: View | Wide) -> bool:
    """Whether entry o of the bias is added to output o of every row, for every o in order.

    Both operands are followed as arrays of output indices, broadcast with stride 0 along the rows,
    so nothing of the size of the activations is made.
    """
    view = bias if isinstance(bias, View) else bias.view
    full = product.view.source_shape
    layout = product.use.layout
    assert isinstance(layout, (layouts.Dense, layouts.Convolution, layouts.Lookup))
    count = math.prod(full[a] for a in layout.bias_axes)
    if math.prod(view.inner) != count or product.view.shape != shape:
        return False
    aligned = tuple(n if a in layout.bias_axes else 1 for a, n in enumerate(full))
    outputs = product.view(np.broadcast_to(np.arange(count).reshape(aligned), full))
    entries = np.arange(count).reshape(view.inner)
    if isinstance(bias, Wide):
        expanded = [1] * len(bias.shape)
        for axis, size in zip(bias.axes, view.inner, strict=True):
            expanded[axis] = size
        entries = np.broadcast_to(entries.reshape(expanded), bias.shape)
    if entries.ndim != len(shape):
        return False
    entries = np.broadcast_to(entries, shape)
    constant = tuple(
        slice(0, 1) if outputs.strides[a] == 0 and entries.strides[a] == 0 else slice(None)
        for a in range(len(shape))
    )
    return bool(np.array_equal(outputs[constant], entries[constant]))


def broadcast(
    equation: _jax.Equation, position: int, value: View | Wide, env: Environment
) -> Use | None:
    """The use of an operand that is a parameter broadcast against the data, if it is.

    It may be so before the equation (`broadcast_in_dim` to the batch) or by an elementwise equation
    itself, which stretches axes of size one. Data without a batch axis (nodes of graphs in one
    array) counts where the parameter is repeated along it: the use is then unbatched.
    """
    variable, out = equation.invars[position], equation.outvars[0]
    view = value if isinstance(value, View) else value.view
    shape, batch = tuple(variable.aval.shape), env.batch(variable)
    axes = tuple(range(len(shape))) if isinstance(value, View) else value.axes
    if batch is None:
        if equation.primitive.name not in layouts.ELEMENTWISE or len(shape) not in (
            0,
            out.aval.ndim,
        ):
            return None
        shape, batch = tuple(out.aval.shape), env.batch(out)
    kept = [i for i, n in enumerate(view.inner) if n != 1]
    axes = tuple(axes[i] for i in kept)
    repeated = env.varies(out) and math.prod(view.inner) < math.prod(shape)
    if batch.axis in axes if batch is not None else not repeated:
        return None
    axis, examples = (batch.axis, batch.examples(shape[batch.axis])) if batch else (None, 1)
    layout = Elementwise(shape, axes, axis, examples, view.curved, view.scale)
    kind = "scale" if equation.primitive.name in ("mul", "div") else "shift"
    view = view.reshape(tuple(view.inner[i] for i in kept))
    return Use(view, layout, kind, equation.primitive.name, unbatched=batch is None)


def carried_along(
    equation: _jax.Equation, values: Sequence[Value], env: Environment
) -> tuple[int, View] | None:
    """An elementwise function of one parameter and of values without a batch axis.

    Returns the operand and the view of the output: still an entry for an entry, whose derivative
    the evaluator brings along (`View.curved`).
    """
    positions = [i for i, v in enumerate(values) if isinstance(v, (View, Wide))]
    if len(positions) != 1 or len(equation.outvars) != 1:
        return None
    if not is_elementwise(equation) and not _rounds(equation, positions[0]):
        return None
    view, aval = values[positions[0]], equation.outvars[0].aval
    if not isinstance(view, View) or not jnp.issubdtype(aval.dtype, jnp.floating):
        return None
    if env.batch(equation.outvars[0]) is not None or aval.size != math.prod(view.inner):
        return None
    return positions[0], dataclasses.replace(view.reshape(tuple(aval.shape)), curved=True)


def _rounds(equation: _jax.Equation, position: int) -> bool:
    """Whether a rule of its own makes an equation elementwise in an operand, as rounding has."""
    x, out = equation.invars[position].aval, equation.outvars[0].aval
    if equation.primitive.name != "custom_vjp_call" or x.shape != out.shape:
        return False
    backward = _jax.backward_rule(equation, position)
    live, _ = liveness.reaches_loss(backward, [True], tags=False)
    return all(is_elementwise(e) for e, on in zip(backward.equations, live, strict=True) if on)


def gate(equation: _jax.Equation) -> int | None:
    """The operand of which an equation is an elementwise function, as a rectifier is.

    Its derivative may be zero in places, but is no mask. None where the equation is no such
    function of one array and single numbers, or is made to have no derivative.
    """
    outs, operands = equation.outvars, equation.invars
    wide = [i for i, v in enumerate(operands) if getattr(v.aval, "size", 1) > 1]
    if len(outs) != 1 or len(wide) != 1 or equation.primitive.name in ("mul", "div", "select_n"):
        return None
    (i,), (out,) = wide, outs
    same = operands[i].aval.shape == out.aval.shape and operands[i].aval.dtype == out.aval.dtype
    flat = primitives(equation) & {"stop_gradient", "round", "floor", "ceil", "sign"}
    floating = jnp.issubdtype(out.aval.dtype, jnp.floating)
    return i if same and floating and not flat and is_elementwise(equation) else None


def primitives(equation: _jax.Equation) -> set[str]:
    """The names of the primitives in an equation, at any depth."""
    inside = [primitives(e) for jaxpr in _jax.nested(equation) for e in jaxpr.equations]
    return set().union(*inside) if inside else {equation.primitive.name}


def is_elementwise(equation: _jax.Equation) -> bool:
    """Whether every output entry depends on the operands' entries in the same place only."""
    if equation.primitive.name in layouts.ELEMENTWISE:
        return True
    if equation.primitive.name == "broadcast_in_dim":  # of a single number
        return bool(equation.invars[0].aval.size == 1)
    call = _jax.call_of(equation)
    if call is None or call.kind not in ("jit", "custom_jvp"):
        return False
    return all(is_elementwise(e) for e in call.bodies[0].equations)
