"""The same function, written so that parameters meet the data one at a time.

The curvature of `x @ (w * g)` has no structure that `interpreter` knows; that of `(x @ w) * g`,
the same function, has. `respelled` evaluates a jaxpr with, beside every value that depends on
parameters and not on the data, what sum of products it is (`weights.Weight`); where one meets the
data, the data takes the factors in turn (`products`). So do gains, low-rank products, sums,
repetitions and complex weights. A stack that a loop slices at known indices becomes one that it
scans over.

What is no product with the data (a norm, a standard deviation) is computed as it was. Of a
parameter that is also a factor beside it, as in `w / norm(w)`, it is held constant: the block of
`w` is the one that it has given its norm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvature import _jax
from curvature.meshes import here
from curvature.trace import loops, products, rules, weights
from curvature.trace.constants import known
from curvature.trace.environment import Known
from curvature.trace.views import Shape
from curvature.trace.weights import Factor, Weight

HELD = "a norm or a mean of it is held constant"
_VIEWS = ("concatenate", "dynamic_slice", "gather", "rev", "slice", "split", "stack", "tile")


@dataclasses.dataclass(frozen=True, eq=False)
class _Value:
    """A value, and what is known of it.

    Attributes:
      array: the value.
      weight: what sum of products of parameters it is; None for data, and what has no parameters.
      data: whether it depends on the data.
      fact: the value as a constant that does not depend on any input.
    """

    array: Any
    weight: Weight | None = None
    data: bool = False
    fact: Known | None = None


@dataclasses.dataclass(eq=False)
class _Found:
    """What was written anew: how often, and of which parameters something was held constant."""

    times: int = 0
    held: set[int] = dataclasses.field(default_factory=set)


def respelled(
    jaxpr: _jax.Jaxpr, leaves: int, data: Sequence[bool]
) -> tuple[_jax.Jaxpr, frozenset[int]] | None:
    """The jaxpr with products of parameters taken apart; None where there are none.

    Args:
      jaxpr: of the loss; its first `leaves` inputs are the parameters.
      leaves: how many they are.
      data: for each input, and maybe each constant after them, whether it is data: whether examples
        are along some axis of it.

    Returns:
      The jaxpr, and the numbers of the parameters of which something was held constant.
    """
    found = _Found()
    constants = [*data[len(jaxpr.invars) :], *[False] * len(jaxpr.consts)]

    def run(*inputs: Any) -> list[Any]:
        values = [
            _Value(x, Weight.of(x, frozenset([i]), plain=True) if i < leaves else None, data=on)
            for i, (x, on) in enumerate(zip(inputs, data, strict=False))
        ]
        return [v.array for v in _evaluate(jaxpr, values, found, {}, constants)]

    new = _jax.retrace(run, jaxpr)
    return (new, frozenset(found.held)) if found.times else None


def _evaluate(
    jaxpr: _jax.Jaxpr,
    inputs: Sequence[_Value],
    found: _Found,
    given: Mapping[Any, _Value],
    constants: Sequence[bool] = (),
) -> list[_Value]:
    """The outputs of a jaxpr; `given` are values of some of its variables."""
    env: dict[Any, _Value] = dict(zip(jaxpr.invars, inputs, strict=True))
    for i, (variable, const) in enumerate(zip(jaxpr.constvars, jaxpr.consts, strict=True)):
        fact = Known(const) if isinstance(const, np.ndarray) else None
        env[variable] = _Value(const, data=bool(constants and constants[i]), fact=fact)

    def read(atom: Any) -> _Value:
        if isinstance(atom, _jax.Literal):
            return _Value(atom.val, fact=Known(np.asarray(atom.val)))
        return env[atom]

    for equation in jaxpr.equations:
        with _jax.sourced(equation), _jax.context(equation):
            operands = [_here(read(v)) for v in equation.invars]
            outs = _equation(equation, operands, found, given)
        env.update(zip(equation.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _here(value: _Value) -> _Value:
    """A value whose weight's factors have the types of the mesh that is set (`auto_axes`)."""
    if value.weight is None or jax.sharding.get_abstract_mesh().empty:
        return value
    return dataclasses.replace(value, weight=value.weight.mapped(here))


def _equation(
    equation: _jax.Equation, operands: list[_Value], found: _Found, given: Mapping[Any, _Value]
) -> list[_Value]:
    if equation.outvars and equation.outvars[0] in given:
        return [given[equation.outvars[0]]]
    call = _jax.call_of(equation)
    parameters = any(v.weight is not None for v in operands)
    if call is not None and parameters:
        outs = _call(equation, call, operands, found, given)
        if outs is not None:
            return outs
    arrays = [v.array for v in operands]
    if any(v.data for v in operands):
        new = _met(equation, operands, found) if parameters else None
        made = _jax.unplaced(equation, arrays) if new is None else [new]
        return [_Value(x, data=True) for x in made]
    made = _jax.unplaced(equation, arrays)
    if equation.primitive.name == "stop_gradient":
        return [_Value(x) for x in made]  # a constant to what comes after, as a frozen array is
    if parameters:
        described = _described(equation, operands, made)
        return [_Value(x, w) for x, w in zip(made, described, strict=True)]
    if len(made) != 1 or call is not None or any(v.fact is None for v in operands):
        return [_Value(x) for x in made]
    fact = known(equation, [v.fact for v in operands])
    return [_Value(made[0], fact=fact if isinstance(fact, Known) else None)]


# Calls ----------------------------------------------------------------------------------------


def _call(
    equation: _jax.Equation,
    call: _jax.Call,
    operands: list[_Value],
    found: _Found,
    given: Mapping[Any, _Value],
) -> list[_Value] | None:
    """Goes into a call; None for one that is left as it is."""
    if call.kind == "jit":
        return _evaluate(call.bodies[0], operands, found, given)
    kinds = ("cond", "remat", "scan", "shard_map")
    if not any(v.data for v in operands) or call.kind not in kinds:
        return None
    before = found.times
    outs = _inside(equation, call, operands, found)
    # Where nothing was found, the call keeps its own equation.
    return None if found.times == before else [_Value(x, data=True) for x in outs]


def _inside(
    equation: _jax.Equation, call: _jax.Call, operands: list[_Value], found: _Found
) -> list[Any]:
    params, arrays = equation.params, [v.array for v in operands]
    if call.kind == "scan":
        return _scan(equation, call, operands, found)

    def run(body: _jax.Jaxpr, *xs: Any) -> list[Any]:
        pairs = zip(operands[call.skip :], xs, strict=True)
        inside = [_slice_of(v, x) for v, x in pairs]
        return [v.array for v in _evaluate(body, inside, found, {})]

    if call.kind == "shard_map":
        body, nothing = call.bodies[0], jax.sharding.PartitionSpec()
        return _jax.shard_map(equation, lambda *xs: run(body, *xs[:-1]), arrays, (), nothing)
    if call.kind == "cond":
        branches = [lambda *xs, b=body: run(b, *xs) for body in call.bodies]
        return list(jax.lax.switch(arrays[0], branches, *arrays[1:]))
    rule = jax.checkpoint(
        lambda *xs: run(call.bodies[0], *xs),
        policy=params["policy"],
        prevent_cse=params["prevent_cse"],
    )
    return list(rule(*arrays))


def _scan(
    equation: _jax.Equation, call: _jax.Call, operands: list[_Value], found: _Found
) -> list[Any]:
    params, (body,) = equation.params, call.bodies
    first, last = call.num_consts, call.num_consts + call.num_carry
    consts, scanned = operands[:first], operands[last:]
    taken = loops.taken(call, [v.fact for v in operands], params["length"])
    taken = {v: at for v, at in taken.items() if consts[at[0]].weight is not None}
    stacks = [_stack(consts[place], index) for place, index in taken.values()]
    found.times += len(taken)
    varies = _carried(call, [v.data for v in operands])

    def one(carry: list[Any], slices: Any) -> tuple[list[Any], list[Any]]:
        xs, rows = slices
        carried = [_Value(x, data=on) for x, on in zip(carry, varies, strict=True)]
        inside = [_slice_of(v, x) for v, x in zip(scanned, xs, strict=True)]
        pairs = zip(taken, stacks, rows, strict=True)
        given = {variable: _slice_of(stack, x[None]) for variable, stack, x in pairs}
        outs = _evaluate(body, [*consts, *carried, *inside], found, given)
        arrays = [v.array for v in outs]
        return arrays[: call.num_carry], arrays[call.num_carry :]

    carry, ys = jax.lax.scan(
        one,
        [v.array for v in operands[first:last]],
        ([v.array for v in scanned], [v.array for v in stacks]),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *ys]


def _carried(call: _jax.Call, data: Sequence[bool]) -> list[bool]:
    """Which carries of a scan depend on the data, from the second step on."""
    (body,), flags = call.bodies, list(data)
    places = range(call.num_consts, call.num_consts + call.num_carry)
    while True:
        known = {v for v, on in zip(body.invars, flags, strict=True) if on}
        for equation in body.equations:
            if any(v in known for v in equation.invars if not isinstance(v, _jax.Literal)):
                known.update(equation.outvars)
        before = list(flags)
        for place, out in zip(places, body.outvars, strict=False):
            flags[place] |= not isinstance(out, _jax.Literal) and out in known
        if flags == before:
            return [flags[place] for place in places]


def _stack(value: _Value, index: np.ndarray) -> _Value:
    """The slices of a stack at known indices."""
    array, step = value.array, int(index[1] - index[0]) if len(index) > 1 else 1
    if step in (1, -1) and np.array_equal(index, index[0] + step * np.arange(len(index))):
        array = jax.lax.slice_in_dim(array, int(index.min()), int(index.max()) + 1)
        array = array if step == 1 else jnp.flip(array, 0)
    else:
        array = jnp.concatenate([jax.lax.slice_in_dim(array, i, i + 1) for i in index.tolist()])
    return dataclasses.replace(value, array=array)


def _slice_of(value: _Value, x: Any) -> _Value:
    """What one step of a scan sees of what it scans over."""
    weight = value.weight
    if weight is not None:
        weight = Weight.of(x, weight.sources, plain=_is_plain(weight))
    return _Value(x, weight, value.data)


# Parameters alone -----------------------------------------------------------------------------


def _described(
    equation: _jax.Equation, operands: list[_Value], outs: list[Any]
) -> list[Weight | None]:
    """What sums of products an equation without data gives."""
    if not all(jnp.issubdtype(jnp.result_type(x), jnp.inexact) and jnp.size(x) for x in outs):
        return [None] * len(outs)
    made = _combined(equation, operands, outs[0])
    if made is not None:
        return [made]
    of_operands = [v.weight for v in operands if v.weight is not None]
    plain = equation.primitive.name in _VIEWS and all(map(_is_plain, of_operands))
    return [Weight.of(x, _sources(operands), plain=plain) for x in outs]


def _sources(operands: Sequence[_Value]) -> frozenset[int]:
    return frozenset().union(*(v.weight.sources for v in operands if v.weight is not None))


def _combined(equation: _jax.Equation, operands: list[_Value], out: Any) -> Weight | None:
    name = equation.primitive.name
    if len(operands) == 1 and (one := operands[0].weight) is not None:
        moved = _moved(equation, one, out)
        if moved is not None:
            return moved
    if len(operands) == 2 and name in ("mul", "div", "add", "add_any", "sub", "complex"):
        return _arithmetic(name, operands, out.shape)
    if len(operands) == 2 and name == "dot_general":
        (left, right), (kept_left, kept_right) = equation.params["dimension_numbers"]
        pairs = list(zip(left, right, strict=True)), list(zip(kept_left, kept_right, strict=True))
        first, second = (_weight(v, jnp.shape(v.array)) for v in operands)
        return weights.contracted(first, second, *pairs)
    if not rules.is_elementwise(equation):
        return None
    joined = _weight(operands[0], out.shape)
    for value in operands[1:]:
        both = weights.added(joined, _weight(value, out.shape))
        if both is None:
            return None
        joined = both
    return joined.whole(out, _sources(operands))


def _moved(equation: _jax.Equation, one: Weight, out: Any) -> Weight | None:
    """What an equation with one operand makes of it."""
    name, params = equation.primitive.name, equation.params
    if name in rules.PASSES:
        real = not jnp.issubdtype(out.dtype, jnp.complexfloating)
        return one.mapped(lambda x: x.astype(out.dtype)) if real else one
    if name == "neg":
        return one.times(-1.0)
    if name == "squeeze" or (name == "reshape" and params.get("dimensions") is None):
        return weights.reshaped(one, out.shape)
    if name == "transpose":
        return weights.transposed(one, params["permutation"])
    if name == "broadcast_in_dim":
        return weights.broadcast(one, out.shape, params["broadcast_dimensions"])
    if name == "tile":
        return weights.tiled(one, params["reps"])
    if name == "reduce_sum":
        return weights.summed(one, params["axes"])
    if rules.is_elementwise(equation) and one.alone is not None:
        return one.replaced(_jax.unplaced(equation, [one.alone.array])[0])
    return None


def _arithmetic(name: str, operands: list[_Value], shape: Shape) -> Weight | None:
    number = [_number(v) for v in operands]
    one, other = (_weight(v, shape) for v in operands)
    if name == "mul":
        if number[0] is not None or number[1] is not None:
            return other.times(number[0]) if number[0] is not None else one.times(number[1] or 0)
        return weights.multiplied(one, other)
    if name == "div":
        if number[1]:
            return one.times(1 / number[1])
        if other.alone is not None:
            return weights.multiplied(one, other.replaced(1 / other.alone.array))
        inverse = jnp.broadcast_to(1 / operands[1].array, shape)
        return weights.multiplied(one, other.whole(inverse, other.sources))
    if name == "sub":
        other = other.times(-1.0)
    if name == "complex":
        other = other.times(1j)
    return weights.added(one, other)


def _weight(value: _Value, shape: Shape) -> Weight:
    """An operand as a weight of this shape."""
    weight = value.weight
    if weight is None:
        weight = Weight.of(jnp.asarray(value.array), frozenset())
    return weights.broadcast(weight, shape, range(len(weight.axes)))  # numbers have none


def _number(value: _Value) -> complex | None:
    """The number that a constant is; None of anything else."""
    if value.weight is not None or value.fact is None or value.fact.value.ndim:
        return None
    return complex(value.fact.value)


def _is_plain(weight: Weight) -> bool:
    return not weight.computed and weight.terms[0].factors[0].plain


# Parameters and data --------------------------------------------------------------------------


def _met(equation: _jax.Equation, operands: list[_Value], found: _Found) -> jax.Array | None:
    """The output of data and a computed weight; None to evaluate the equation as it is."""
    name, shape = equation.primitive.name, equation.outvars[0].aval.shape
    if name == "ragged_dot_general" and operands[1].weight is not None:
        new = products.ragged(equation, [v.array for v in operands])
        found.times += new is not None
        return new
    sides = [i for i, v in enumerate(operands) if v.weight is not None and v.weight.computed]
    if len(operands) != 2 or len(sides) != 1:
        return None
    side, x = sides[0], operands[1 - sides[0]].array
    held: set[int] = set()
    weight = _held(operands[side].weight, held)
    if weight is None:
        return None
    new = None
    if name == "dot_general":
        new = products.dot(equation, x, weight, side)
    elif name == "conv_general_dilated" and side == 1:
        new = products.convolution(equation, x, weight)
    elif name == "gather" and side == 0:
        new = products.lookup(equation, weight, x)
    elif name == "mul":
        new = products.scaled(x, weights.broadcast(weight, shape, range(len(weight.axes))))
    elif name in ("add", "add_any") or (name == "sub" and side == 1):
        weight = weights.broadcast(weight, shape, range(len(weight.axes)))
        new = products.shifted(x, weight.times(-1.0) if name == "sub" else weight)
    if new is not None:
        found.times += 1
        found.held |= held
    return new


def _held(weight: Weight | None, held: set[int]) -> Weight | None:
    """The weight with all that is made of parameters that are factors anyway held constant.

    That is a norm beside what is divided by it, and a mean beside what it is taken from; `held`
    gets the numbers of these parameters. None for a weight without a parameter as it is.
    """
    assert weight is not None
    axes = {label for axis in weight.axes for label in axis}
    whole = [{f for f in t.factors if f.plain and set(f.labels) <= axes} for t in weight.terms]
    if not any(f.plain for t in weight.terms for f in t.factors):
        return None
    terms = []
    for i, term in enumerate(weight.terms):
        others = _of(f for j, other in enumerate(whole) if j != i for f in other)
        inner = [f for f in term.factors if not set(f.labels) <= axes]
        rest = [f for f in term.factors if f not in inner]
        if inner and _of(inner) <= others:
            held |= _of(inner)
            rest.append(weights.evaluated([f.constant() for f in inner], axes))
        else:
            rest = list(term.factors)
        terms.append(dataclasses.replace(term, factors=tuple(rest)))
    plain = _of(f for term in terms for f in term.factors if f.plain)
    for i, term in enumerate(terms):
        derived = {f for f in term.factors if not f.plain and f.sources and f.sources <= plain}
        held |= _of(derived)
        rest = [f.constant() if f in derived else f for f in term.factors]
        terms[i] = weights.merged(dataclasses.replace(term, factors=tuple(rest)))
    return dataclasses.replace(weight, terms=tuple(terms))


def _of(factors: Iterable[Factor]) -> frozenset[int]:
    return frozenset().union(*(f.sources for f in factors))
