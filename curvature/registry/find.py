"""Finding layers: follow every parameter forwards through a jaxpr until it meets the data.

A variable is either data (None), a `View` of a parameter, a `Wide` one (a view repeated along new
axes, as a bias is), or a `Product` (the output of a dense layer that has only been moved since, to
which a bias may still be added).
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from curvature import _jax
from curvature._jax import Jaxpr, Literal
from curvature.losses import TAG
from curvature.registry import flow
from curvature.registry.plan import Contraction, LossTag, Plan, Step, Use
from curvature.registry.views import Shape, View


@dataclasses.dataclass(frozen=True)
class Wide:
    """`broadcast_in_dim(view, shape, axes)`."""

    view: View
    shape: Shape
    axes: Shape


@dataclasses.dataclass(frozen=True)
class Product:
    """The output of a dense use, moved but not otherwise touched."""

    use: Use
    view: View


Value = View | Wide | Product | None

_PASSES = (
    "convert_element_type",
    "copy",
    "copy_p",
    "name",
    "reduce_precision",
    "sharding_constraint",
)


class Finder:
    """Walks a jaxpr once and collects uses, losses and the plan."""

    def __init__(self) -> None:
        self.uses: list[Use] = []
        self.losses: list[LossTag] = []
        self.stopped: set[Any] = set()  # sources of views that met stop_gradient
        self._loops: list[tuple[int, int]] = []  # (scan's id, length) around the current equation
        self._callers: list[str] = []  # locations of the calls around the current equation

    def walk(
        self, jaxpr: Jaxpr, values: Sequence[Value], after: Sequence[bool], out_live: Sequence[bool]
    ) -> tuple[Plan, list[Value]]:
        """The plan of a jaxpr, and what its outputs are.

        Args:
          jaxpr: what to walk.
          values: what its inputs are.
          after: for each input, whether it depends on a tagged loss.
          out_live: for each output, whether a tagged loss depends on it.
        """
        live, _ = flow.reaches_loss(jaxpr, out_live)
        frame = _Frame(jaxpr, values, after, live, out_live)
        steps = [self._step(e, frame, live[i]) for i, e in enumerate(jaxpr.equations)]
        return Plan(jaxpr, steps), [frame.sole(v) for v in jaxpr.outvars]

    def _step(self, equation: _jax.Equation, frame: _Frame, live: bool) -> Step:
        after = [frame.after(v) for v in equation.invars]
        out_after = flow.after_loss_equation(equation, after)
        frame.mark(equation.outvars, out_after)
        if equation.primitive.name == TAG:
            return self._loss(equation, after)
        values = [frame.sole(v) for v in equation.invars]
        call = _jax.call_of(equation)
        if call is not None and self._enters(call, values, after):
            return self._call(equation, call, frame, values, after)
        cut = tuple(any(after) and not a for a in after)
        step = Step(equation, cut)
        if not live:
            self._note_stopped(equation, values)
        elif any(v is not None for v in values):
            outs, step.use = self._meet(equation, values)
            frame.define(equation.outvars, outs)
        return step

    def _where(self, equation: _jax.Equation) -> str:
        """The user's line; of the innermost call that has one, where a cached trace has none."""
        return _jax.location(equation) or next((c for c in reversed(self._callers) if c), "?")

    # Calls ------------------------------------------------------------------------------------

    def _enters(self, call: _jax.Call, values: list[Value], after: list[bool]) -> bool:
        mixed = any(after) and not all(after)
        return mixed or any(v is not None for v in values) or any(map(flow.has_tag, call.bodies))

    def _call(
        self,
        equation: _jax.Equation,
        call: _jax.Call,
        frame: _Frame,
        values: list[Value],
        after: list[bool],
    ) -> Step:
        operands_live, out_live = flow.live_call(call, [frame.is_live(v) for v in equation.outvars])
        inside_after = flow.scan_fixpoint(call, after[call.skip :])
        inside = self._enter(equation, call, values[call.skip :], operands_live)
        if call.kind == "scan":
            self._loops.append((id(equation), equation.params["length"]))
        self._callers.append(self._where(equation))
        walked = [self.walk(body, inside, inside_after, out_live) for body in call.bodies]
        self._callers.pop()
        if call.kind == "scan":
            self._loops.pop()
        plans = tuple(plan for plan, _ in walked)
        if call.kind in ("scan", "cond"):
            where = f"returned by a {call.kind} at {self._where(equation)}"
            for outs in (outs for _, outs in walked):
                self._generic([o for o, keep in zip(outs, out_live, strict=True) if keep], where)
        else:
            frame.define(equation.outvars, walked[0][1])
        # A carry that starts before the loss but accumulates it: its start is cut off.
        cut = [b and not a for a, b in zip(after[call.skip :], inside_after, strict=True)]
        return Step(equation, (*[False] * call.skip, *cut), call, plans)

    def _enter(
        self, equation: _jax.Equation, call: _jax.Call, values: list[Value], live: list[bool]
    ) -> list[Value]:
        """What the operands of a call are inside its bodies."""
        if call.kind != "scan":
            return values
        inside: list[Value] = []
        for i, value in enumerate(values):
            if i < call.num_consts:
                inside.append(value if not isinstance(value, Product) else None)
            elif i >= call.num_consts + call.num_carry and isinstance(value, View):
                inside.append(value.pushed(id(equation)))
            else:
                if live[i]:
                    how = "carried" if i < call.num_consts + call.num_carry else "scanned"
                    self._generic([value], f"{how} by a scan at {self._where(equation)}")
                inside.append(None)
        return inside

    # Losses -----------------------------------------------------------------------------------

    def _loss(self, equation: _jax.Equation, after: list[bool]) -> Step:
        loss, where = equation.params["loss"], self._where(equation)
        if after[0]:
            raise ValueError(
                f"The predictions of the tagged loss {loss.name} at {where} depend on the value of "
                "another tagged loss, so its weight is no gradient of the total loss. Pass "
                "jax.lax.stop_gradient of that value, or use an untagged loss there."
            )
        lead = tuple(length for _, length in self._loops)
        self.losses.append(LossTag(loss.name, loss, equation.invars[0].aval, lead, where))
        return Step(equation, (False,) * len(after), loss=len(self.losses) - 1)

    # Parameters -------------------------------------------------------------------------------

    def _meet(self, equation: _jax.Equation, values: list[Value]) -> tuple[list[Value], Use | None]:
        """One live equation with a parameter among its operands."""
        none: list[Value] = [None] * len(equation.outvars)
        name = equation.primitive.name
        if len(values) == 1:
            moved = _move(equation, values[0])
            if moved is not None:
                return moved, None
        if name == "dot_general":
            use = self._dense(equation, values)
            if use is not None:
                shape = equation.outvars[0].aval.shape
                return [Product(use, View.of(use, shape))], use
        if name in ("add", "add_any") and _add_bias(equation, values):
            return none, None
        parameters = [v for v in values if isinstance(v, (View, Wide))]
        what = f"{name} of {len(parameters)} parameters" if len(parameters) > 1 else name
        self._generic(values, f"{what} at {self._where(equation)}")
        return none, None

    def _dense(self, equation: _jax.Equation, values: list[Value]) -> Use | None:
        """`dot_general` of data with one parameter view, without batch axes."""
        (left, right), (left_batch, _) = equation.params["dimension_numbers"]
        sides = [i for i in (0, 1) if isinstance(values[i], (View, Wide))]
        if len(sides) != 1 or left_batch:
            return None
        view = values[sides[0]]
        if not isinstance(view, View):
            return None
        contracted = (left, right)[sides[0]]
        free = tuple(a for a in range(len(view.inner)) if a not in contracted)
        d_in = math.prod(view.inner[a] for a in contracted)
        d_out = math.prod(view.inner[a] for a in free)
        matrix = view.transpose((*contracted, *free)).reshape((d_in, d_out))
        operand = 1 - sides[0]
        x = equation.invars[operand].aval.shape
        x_contracted = tuple(int(a) for a in (left, right)[operand])
        rows = tuple(a for a in range(len(x)) if a not in x_contracted)
        first = len(rows) if operand == 0 else 0
        out_axes = tuple(range(first, first + len(free)))
        use = Use(
            matrix,
            Contraction(operand, x_contracted, rows, out_axes, d_in, d_out),
            f"dot_general at {self._where(equation)}",
            rows=math.prod(x[a] for a in rows),
            examples=x[rows[0]] if rows else 1,
            loops=tuple(scan for scan, _ in self._loops),
        )
        self.uses.append(use)
        return use

    def _generic(self, values: Sequence[Value], reason: str) -> None:
        for value in values:
            if isinstance(value, Wide):
                value = value.view
            if isinstance(value, View):
                self.uses.append(Use(value, None, reason))

    def _note_stopped(self, equation: _jax.Equation, values: list[Value]) -> None:
        if equation.primitive.name == "stop_gradient" and isinstance(values[0], View):
            self.stopped.add(values[0].source)


class _Frame:
    """What is known of the variables of one jaxpr."""

    def __init__(
        self,
        jaxpr: Jaxpr,
        values: Sequence[Value],
        after: Sequence[bool],
        live: Sequence[bool],
        out_live: Sequence[bool],
    ) -> None:
        self._values: dict[Any, Value] = dict(zip(jaxpr.invars, values, strict=True))
        self._after = {v for v, a in zip(jaxpr.invars, after, strict=True) if a}
        self._readers: collections.Counter[Any] = collections.Counter()
        for equation, keep in zip(jaxpr.equations, live, strict=True):
            if keep:
                self._readers.update(v for v in equation.invars if not isinstance(v, Literal))
        self._readers.update(
            v
            for v, keep in zip(jaxpr.outvars, out_live, strict=True)
            if keep and not isinstance(v, Literal)
        )

    def sole(self, variable: Any) -> Value:
        """What a variable is; a product only for its sole reader, who may add a bias to it."""
        if isinstance(variable, Literal):
            return None
        value = self._values.get(variable)
        return None if isinstance(value, Product) and self._readers[variable] > 1 else value

    def after(self, variable: Any) -> bool:
        return not isinstance(variable, Literal) and variable in self._after

    def is_live(self, variable: Any) -> bool:
        return self._readers[variable] > 0

    def define(self, variables: Sequence[Any], values: Sequence[Value]) -> None:
        self._values.update(zip(variables, values, strict=True))

    def mark(self, variables: Sequence[Any], after: Sequence[bool]) -> None:
        self._after.update(v for v, a in zip(variables, after, strict=True) if a)


def _move(equation: _jax.Equation, value: Value) -> list[Value] | None:
    """The outputs of an equation that only moves its operand's entries; None for any other."""
    if isinstance(value, Product):
        moved = _moved(equation, value.view)
        if moved is None or not all(isinstance(m, View) for m in moved):
            return None
        return [Product(value.use, m) for m in moved if isinstance(m, View)]
    if isinstance(value, View):
        return _moved(equation, value)
    if isinstance(value, Wide):
        name, params = equation.primitive.name, equation.params
        if name in _PASSES:
            return [value]
        if name == "broadcast_in_dim":
            axes = tuple(params["broadcast_dimensions"][a] for a in value.axes)
            return [Wide(value.view, tuple(params["shape"]), axes)]
    return None


def _moved(equation: _jax.Equation, view: View) -> list[Value] | None:
    name, params = equation.primitive.name, equation.params
    shape = tuple(equation.outvars[0].aval.shape)
    if name in _PASSES:
        floating = jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating)
        return [view] if floating else None
    if name == "squeeze" or (name == "reshape" and params.get("dimensions") is None):
        return [view.reshape(shape)]
    if name == "transpose":
        return [view.transpose(tuple(params["permutation"]))]
    if name == "slice":
        return [view.slice(params["start_indices"], params["limit_indices"], params["strides"])]
    if name == "split":
        return _split(view, params["axis"], params["sizes"])
    if name == "broadcast_in_dim":
        axes = tuple(params["broadcast_dimensions"])
        if math.prod(shape) == math.prod(view.inner):  # only axes of size one are new
            return [view.reshape(shape)]
        return [Wide(view, shape, axes)]
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


def _add_bias(equation: _jax.Equation, values: list[Value]) -> bool:
    """Whether the sum is a dense layer's output plus its bias; the use then has it."""
    shape = equation.outvars[0].aval.shape
    for product, bias in (values, values[::-1]):
        if not (isinstance(product, Product) and isinstance(bias, (View, Wide))):
            continue
        use, view = product.use, bias if isinstance(bias, View) else bias.view
        assert use.contraction is not None
        if view.stack == use.view.stack and _is_bias(shape, product, bias, use.contraction):
            use.bias = view.reshape((use.contraction.d_out,))
            return True
    return False


def _is_bias(shape: Shape, product: Product, bias: View | Wide, how: Contraction) -> bool:
    """Whether entry o of the bias is added to output o of every row, for every o in order.

    Both operands are followed as arrays of output indices, broadcast with stride 0 along the rows,
    so nothing of the size of the activations is made.
    """
    view = bias if isinstance(bias, View) else bias.view
    if math.prod(view.inner) != how.d_out or product.view.shape != shape:
        return False
    full = product.view.source_shape
    aligned = tuple(n if a in how.out_axes else 1 for a, n in enumerate(full))
    outputs = np.broadcast_to(np.arange(how.d_out).reshape(aligned), full)
    outputs = product.view(outputs)
    entries = np.arange(how.d_out).reshape(view.inner)
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
