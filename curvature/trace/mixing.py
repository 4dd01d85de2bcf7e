"""Where examples meet each other on the way to a tagged loss.

Batch norm in training, outputs centred over the batch, similarities of all pairs, differences of
neighbours, nodes of a graph: there the output of one example depends on what other examples were
before. A cotangent that lights one example's output comes back in every example's rows, so the rows
of one example say nothing of the curvature; their sum over all examples does, with a random sign
for each.

One walk backwards through the jaxpr follows what reaches a tagged loss, and looks at the axes that
grow in the twin: does an equation take row n of an operand to row n of its output, or elsewhere?
Statistics under `stop_gradient` and running ones do not reach a loss, and do not count. Where an
equation cannot be told, examples are taken to meet if the axis is gone, or if there is one more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from curvature import _jax
from curvature._jax import Jaxpr, Literal
from curvature.losses import TAG
from curvature.trace import liveness
from curvature.trace.layouts import ELEMENTWISE, Examples
from curvature.trace.program import Program, Step

# How a value reaches a tagged loss: not at all, with every example by itself, or meeting others at
# this place.
Reach = str | None
_APART = ""

Axes = frozenset[int]
_NO_AXES: Axes = frozenset()

_SORTS = ("sort", "top_k", "approx_top_k")
_MATRICES = ("cholesky", "eig", "eigh", "lu", "qr", "svd", "triangular_solve", "geqrf", "schur")
_DEVICES = ("all_gather", "all_gather_invariant", "all_to_all", "ppermute", "reduce_scatter")
_WINDOWS = ("reduce_window", "reduce_window_max", "reduce_window_min", "reduce_window_sum")


def mark(
    program: Program, twin: Jaxpr | None, parameters: int, batches: tuple[Examples, ...]
) -> None:
    """Notes at every use of a parameter where its examples meet on the way to a tagged loss.

    Args:
      program: of the loss.
      twin: its jaxpr with more examples; None where there is none: then an axis of the batch's size
        of what depends on the data is taken for the batch.
      parameters: how many of the jaxpr's inputs are parameters.
      batches: how many examples there are.
    """
    jaxpr = program.jaxpr
    varies = [i >= parameters for i in range(len(jaxpr.invars))]
    _Walk(batches).back(jaxpr, twin, program, varies, [None] * len(jaxpr.outvars))


class _Walk:
    """One walk backwards."""

    def __init__(self, batches: tuple[Examples, ...]) -> None:
        self.batches = batches
        self._callers: list[str] = []
        # The mesh axes over which examples are divided, in the shard_maps around.
        self._meshes: list[frozenset[str]] = []

    def back(
        self,
        jaxpr: Jaxpr,
        twin: Jaxpr | None,
        program: Program | None,
        varies: Sequence[bool],
        outs: Sequence[Reach],
    ) -> list[Reach]:
        """How the inputs of a jaxpr reach a tagged loss, from how its outputs do.

        Args:
          jaxpr: what to walk.
          twin: the same with more examples.
          program: its program, whose uses are marked; None where no parameter is met.
          varies: which inputs depend on the data.
          outs: how the outputs reach a loss.
        """
        twin = twin if twin is not None and _jax.alike(jaxpr, twin) else None
        divided = frozenset().union(*self._meshes) if self._meshes else None
        rows = _Rows(jaxpr, twin, varies, self.batches, divided)
        reach: dict[Any, Reach] = {}
        _meet(reach, jaxpr.outvars, outs)
        for i in reversed(range(len(jaxpr.equations))):
            equation = jaxpr.equations[i]
            other = twin.equations[i] if twin is not None else None
            step = program.steps[i] if program is not None else None
            found = [reach.get(v) for v in equation.outvars]
            operands = self._equation(equation, other, step, rows, found)
            _meet(reach, equation.invars, operands)
            if step is not None:
                _mark(step, found, operands)
        return [reach.get(v) for v in jaxpr.invars]

    def _equation(
        self,
        equation: _jax.Equation,
        twin: _jax.Equation | None,
        step: Step | None,
        rows: _Rows,
        outs: list[Reach],
    ) -> list[Reach]:
        """How the operands of an equation reach a tagged loss."""
        name = equation.primitive.name
        if name == TAG:
            z = equation.invars[0]
            events = equation.params["loss"].event_ndim
            inside = any(a >= z.aval.ndim - events for a in rows.axes(z))
            first = self._place(equation) if inside else _APART
            return [first] + [None] * (len(equation.invars) - 1)
        call, bodies = _bodies(equation)
        if bodies:
            return self._call(equation, twin, step, rows, outs, call, bodies)
        if name == "stop_gradient" or all(r is None for r in outs):
            return [None] * len(equation.invars)
        behind = _worst(outs)
        return [
            self._place(equation) if _mixes(equation, i, rows) else behind
            for i in range(len(equation.invars))
        ]

    def _call(
        self,
        equation: _jax.Equation,
        twin: _jax.Equation | None,
        step: Step | None,
        rows: _Rows,
        outs: list[Reach],
        call: _jax.Call,
        bodies: Sequence[Jaxpr],
    ) -> list[Reach]:
        """The same of a call: of a scan in any iteration, of a cond in any branch."""
        twins: Sequence[Jaxpr | None] = _bodies(twin)[1] if twin is not None else ()
        twins = twins if len(twins) == len(bodies) else [None] * len(bodies)
        programs: Sequence[Program | None] = step.bodies if step is not None else ()
        programs = programs if len(programs) == len(bodies) else [None] * len(bodies)
        varies = [rows.varies(v) for v in equation.invars[call.skip :]]
        carried = range(call.num_consts, call.num_consts + call.num_carry)
        varies = [v or (i in carried and any(varies)) for i, v in enumerate(varies)]
        self._callers.append(_jax.location(equation))
        if call.kind == "shard_map":
            # Where a loss is inside, devices that have the same examples count as others: each has
            # the loss of them once more.
            parts = zip(equation.invars, _jax.sharded_operands(equation), strict=True)
            divided = [names for v, axes in parts for a, names, _ in axes if a in rows.axes(v)]
            names = _jax.devices_apart(equation)[0] if liveness.has_tag(bodies[0]) else ()
            self._meshes.append(frozenset(names).union(*divided))
        outs = list(outs)
        while True:
            found = [
                self.back(body, other, program, varies, outs)
                for body, other, program in zip(bodies, twins, programs, strict=True)
            ]
            operands = [_worst(column) for column in zip(*found, strict=True)]
            before = list(outs)
            for i, place in enumerate(carried):
                passed = operands[place]
                if passed is not None and _looped(equation, call, rows):
                    passed = self._place(equation)
                outs[i] = _worst([outs[i], passed])
            if outs == before:
                break
        self._callers.pop()
        if call.kind == "shard_map":
            self._meshes.pop()
        return [None] * call.skip + operands

    def _place(self, equation: _jax.Equation) -> str:
        callers = (c for c in reversed(self._callers) if c)
        where = _jax.location(equation) or next(callers, "?")
        return f"{equation.primitive.name} at {where}"


class _Rows:
    """The axes of a jaxpr's variables along which there are examples."""

    def __init__(
        self,
        jaxpr: Jaxpr,
        twin: Jaxpr | None,
        varies: Sequence[bool],
        batches: tuple[Examples, ...],
        divided: frozenset[str] | None,
    ) -> None:
        self._batches, self.divided = batches, divided
        examples = self._examples = batches[0].number
        self._varies = {v for v, on in zip(jaxpr.invars, varies, strict=True) if on}
        self._varies |= {v for v in jaxpr.constvars if examples in _shape(v)}
        self._makers: dict[Any, Any] = {}
        for equation in jaxpr.equations:
            self._makers.update(dict.fromkeys(equation.outvars, equation))
            if any(self.varies(v) for v in equation.invars):
                self._varies.update(equation.outvars)
        self._consts = dict(zip(jaxpr.constvars, jaxpr.consts, strict=True))
        self._twins: dict[Any, tuple[int, ...]] | None = None
        if twin is not None:
            self._twins = dict(zip(jaxpr.invars, map(_shape, twin.invars), strict=True))
            for mine, other in zip(jaxpr.equations, twin.equations, strict=True):
                self._twins.update(zip(mine.outvars, map(_shape, other.outvars), strict=True))

    def varies(self, variable: Any) -> bool:
        """Whether a value depends on the data."""
        return not isinstance(variable, Literal) and variable in self._varies

    def axes(self, variable: Any) -> Axes:
        """The axes of a value along which there are examples."""
        if isinstance(variable, Literal):
            return _NO_AXES
        shape = _shape(variable)
        if self._twins is None:
            known = self.varies(variable) and self._examples > 1 and self._examples in shape
            return frozenset([shape.index(self._examples)]) if known else _NO_AXES
        pairs = zip(shape, self._twins.get(variable, shape), strict=True)
        return frozenset(a for a, (n, more) in enumerate(pairs) if n != more)

    def whole(self, variable: Any) -> bool:
        """Whether one axis holds all the examples, and each of them entire."""
        axes = self.axes(variable)
        if len(axes) != 1 or self._twins is None:
            return False
        (axis,), shape = axes, _shape(variable)
        n, more = shape[axis], self._twins[variable][axis]
        return any(batch.along(n, more) for batch in self._batches)

    def counts(self, indices: Any, column: int) -> bool:
        """Whether a column of index vectors counts 0, 1, 2, ..., as `x[jnp.arange(n), i]` does."""
        maker = self._makers.get(indices)
        if maker is not None and maker.primitive.name == "concatenate":
            start = 0
            for part in maker.invars:
                width = _shape(part)[-1]
                if start <= column < start + width:
                    return width == 1 and self._counted(part)
                start += width
        return self._counted(indices)

    def _counted(self, variable: Any) -> bool:
        if isinstance(variable, Literal):
            return False
        if variable in self._consts:
            values = np.ravel(self._consts[variable])
            return bool(np.array_equal(values, np.arange(values.size)))
        maker = self._makers.get(variable)
        if maker is None:
            return False
        name = maker.primitive.name
        if name == "iota":
            shape = _shape(variable)
            return bool(shape[maker.params["dimension"]] == np.prod(shape))
        if name in ("broadcast_in_dim", "reshape", "convert_element_type", "squeeze"):
            return self._counted(maker.invars[0])
        if name == "select_n":  # negative indices count from the end
            return self._counted(maker.invars[1])
        return False


# Which equations take rows elsewhere --------------------------------------------------------------


def _mixes(equation: _jax.Equation, position: int, rows: _Rows) -> bool:
    """Whether row n of an operand gets elsewhere than to row n of some output."""
    variable, name = equation.invars[position], equation.primitive.name
    axes = rows.axes(variable)
    if not axes or not liveness.carries(variable):
        return False
    known = _never if name in ELEMENTWISE else _RULES.get(name)
    if known is not None and known(equation, position, axes, rows):
        return True
    if "axes" in equation.params and name.startswith(("reduce_", "arg")):
        return bool(axes & set(equation.params["axes"]))
    outs = [rows.axes(v) for v in equation.outvars if liveness.carries(v)]
    more = any(len(out) > len(axes) for out in outs)  # rows of all pairs
    return more or (known is None and not all(outs))


def _cumulates(equation: _jax.Equation, position: int, axes: Axes, rows: _Rows) -> bool:
    return equation.params["axis"] in axes


def _sorts(equation: _jax.Equation, position: int, axes: Axes, rows: _Rows) -> bool:
    last = len(_shape(equation.invars[position])) - 1
    return equation.params.get("dimension", equation.params.get("axis", last)) in axes


def _contracts(equation: _jax.Equation, position: int, axes: Axes, rows: _Rows) -> bool:
    return bool(axes & set(equation.params["dimension_numbers"][0][position]))


def _convolves(equation: _jax.Equation, position: int, axes: Axes, rows: _Rows) -> bool:
    return position != 0 or axes != {equation.params["dimension_numbers"].lhs_spec[0]}


def _slices(equation: _jax.Equation, position: int, axes: Axes, rows: _Rows) -> bool:
    starts, strides = equation.params["start_indices"], equation.params["strides"]
    return any(starts[a] != 0 or (strides is not None and strides[a] != 1) for a in axes)


def _slices_anywhere(equation: _jax.Equation, position: int, axes: Axes, rows: _Rows) -> bool:
    shape, sizes = _shape(equation.invars[0]), equation.params["slice_sizes"]
    return position == 0 and any(sizes[a] != shape[a] for a in axes)


def _updates(equation: _jax.Equation, position: int, axes: Axes, rows: _Rows) -> bool:
    shape, part = _shape(equation.invars[0]), _shape(equation.invars[1])
    return position == 1 and any(part[a] != shape[a] for a in axes)


def _splits(equation: _jax.Equation, position: int, axes: Axes, rows: _Rows) -> bool:
    return equation.params["axis"] in axes


def _appends(equation: _jax.Equation, position: int, axes: Axes, rows: _Rows) -> bool:
    return position > 0 and equation.params["dimension"] in axes


def _pads(equation: _jax.Equation, position: int, axes: Axes, rows: _Rows) -> bool:
    padding = equation.params["padding_config"]
    return any(padding[a][0] != 0 or padding[a][2] != 0 for a in axes)


def _reverses(equation: _jax.Equation, position: int, axes: Axes, rows: _Rows) -> bool:
    return bool(axes & set(equation.params["dimensions"]))


def _reshapes(equation: _jax.Equation, position: int, axes: Axes, rows: _Rows) -> bool:
    return rows.whole(equation.invars[0]) and not rows.whole(equation.outvars[0])


def _gathers(equation: _jax.Equation, position: int, axes: Axes, rows: _Rows) -> bool:
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    shape, indexed = _shape(equation.invars[0]), tuple(numbers.start_index_map)
    moving = [a for a in axes - set(numbers.operand_batching_dims) if sizes[a] != shape[a]]
    indices = equation.invars[1]
    return any(a not in indexed or not rows.counts(indices, indexed.index(a)) for a in moving)


def _scatters(equation: _jax.Equation, position: int, axes: Axes, rows: _Rows) -> bool:
    numbers = equation.params["dimension_numbers"]
    if position != 2 or numbers.operand_batching_dims:
        return False
    if axes <= set(numbers.update_window_dims):
        return False
    columns = range(len(numbers.scatter_dims_to_operand_dims))
    return not any(rows.counts(equation.invars[1], column) for column in columns)


def _windows(equation: _jax.Equation, position: int, axes: Axes, rows: _Rows) -> bool:
    return any(equation.params["window_dimensions"][a] != 1 for a in axes)


def _factorises(equation: _jax.Equation, position: int, axes: Axes, rows: _Rows) -> bool:
    return max(axes) >= len(_shape(equation.invars[position])) - 2


def _transforms(equation: _jax.Equation, position: int, axes: Axes, rows: _Rows) -> bool:
    return max(axes) >= len(_shape(equation.invars[0])) - len(equation.params["fft_lengths"])


def _crosses(equation: _jax.Equation, position: int, axes: Axes, rows: _Rows) -> bool:
    """Whether other devices have other examples; where the mesh is not known, they may."""
    names = equation.params.get("axis_name", equation.params.get("axes", ()))
    names = {names} if isinstance(names, str) else set(names)
    return rows.divided is None or bool(names & rows.divided)


def _never(equation: _jax.Equation, position: int, axes: Axes, rows: _Rows) -> bool:
    return False


_Rule = Callable[[_jax.Equation, int, Axes, _Rows], bool]
_RULES: dict[str, _Rule] = {
    "broadcast_in_dim": _never,
    "concatenate": _appends,
    "conv_general_dilated": _convolves,
    "dot_general": _contracts,
    "dynamic_slice": _slices_anywhere,
    "dynamic_update_slice": _updates,
    "fft": _transforms,
    "gather": _gathers,
    "pad": _pads,
    "reshape": _reshapes,
    "rev": _reverses,
    "slice": _slices,
    "split": _splits,
    "squeeze": _never,
    "transpose": _never,
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _cumulates),
    **dict.fromkeys(("scatter", "scatter-add", "scatter_add", "scatter_mul"), _scatters),
    **dict.fromkeys(_SORTS, _sorts),
    **dict.fromkeys(_WINDOWS, _windows),
    **dict.fromkeys(_MATRICES, _factorises),
    **dict.fromkeys(_DEVICES, _crosses),
}


# Helpers ------------------------------------------------------------------------------------------


def _mark(step: Step, outs: Sequence[Reach], operands: Sequence[Reach]) -> None:
    """Notes where the examples of the uses of one step meet, once it is known of some path."""
    if step.use is not None:
        step.use.meeting = step.use.meeting or _worst(outs) or ""
    for position, use in step.broadcasts:
        use.meeting = use.meeting or operands[position] or ""


def _looped(equation: _jax.Equation, call: _jax.Call, rows: _Rows) -> bool:
    """Whether a scan goes through the examples, one after the other."""
    scanned = equation.invars[call.num_consts + call.num_carry :]
    return call.kind == "scan" and any(0 in rows.axes(v) for v in scanned)


def _bodies(equation: _jax.Equation) -> tuple[_jax.Call, Sequence[Jaxpr]]:
    """What an equation runs on its operands; nothing where it is an equation like others."""
    call = _jax.call_of(equation)
    if call is not None:
        return call, call.bodies
    same = [
        body
        for body in _jax.nested(equation)
        if len(body.invars) == len(equation.invars) and len(body.outvars) == len(equation.outvars)
    ]
    looped = equation.primitive.name == "while"
    return _jax.Call("jit", ()), () if looped else same[:1]


def _meet(reach: dict[Any, Reach], variables: Sequence[Any], found: Sequence[Reach]) -> None:
    for variable, one in zip(variables, found, strict=True):
        if one is not None and liveness.carries(variable):
            reach[variable] = _worst([reach.get(variable), one])


def _worst(found: Sequence[Reach]) -> Reach:
    """How a value reaches a loss that does so in several ways."""
    meeting = next((one for one in found if one), None)
    return meeting or (_APART if any(one is not None for one in found) else None)


def _shape(variable: Any) -> tuple[int, ...]:
    return tuple(getattr(variable.aval, "shape", ()))
