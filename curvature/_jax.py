"""Everything this library uses that JAX does not promise to keep.

A jaxpr is only *read* (`Jaxpr`, `call_of`, `location`) and *evaluated* (`bind`), and two kinds of
primitives are defined (`tag_primitive`, `opaque`). No other module may import `jax.extend`,
`jax.interpreters` or `jax._src`: a JAX release that moves something is answered here and nowhere
else.

Two differences between the supported releases are levelled here: JAX 0.12 merged `ClosedJaxpr` into
`Jaxpr`, and `scan` describes its operands by `ft_in` where 0.10 had `num_consts` and `num_carry`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import core, source_info_util  # jax.extend imports Pallas, a tenth of `import jax`
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding

Literal = core.Literal
Equation = Any  # JaxprEqn of jax: .primitive.name, .params, .invars, .outvars


@dataclasses.dataclass(frozen=True)
class Jaxpr:
    """A jaxpr with its constants, the same in every JAX release."""

    constvars: tuple[Any, ...]
    consts: tuple[Any, ...]
    invars: tuple[Any, ...]
    outvars: tuple[Any, ...]
    equations: tuple[Equation, ...]

    @classmethod
    def wrap(cls, jaxpr: Any) -> Jaxpr:
        """Reads an open or closed jaxpr."""
        inner = getattr(jaxpr, "jaxpr", jaxpr)
        consts = tuple(getattr(jaxpr, "consts", ()))
        constvars = tuple(inner.constvars)
        return cls(constvars, consts, tuple(inner.invars), tuple(inner.outvars), tuple(inner.eqns))


def trace(function: Callable[..., Any], *args: Any) -> tuple[Jaxpr, Any]:
    """The jaxpr of `function(*args)` and the tree of shapes of its result."""
    closed, out = jax.make_jaxpr(function, return_shape=True)(*args)
    return Jaxpr.wrap(closed), out


@dataclasses.dataclass(frozen=True)
class Call:
    """An equation that runs other jaxprs.

    Every body takes `equation.invars[skip:]` and returns `equation.outvars`. In a scan the operands
    are `num_consts` constants, `num_carry` carries, and the scanned arrays.
    """

    kind: str  # "jit", "remat", "custom_jvp", "scan", "cond" or "shard_map"
    bodies: tuple[Jaxpr, ...]
    skip: int = 0
    num_consts: int = 0
    num_carry: int = 0


_INLINE_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
}
_REMAT_CALLS = ("remat2", "remat", "checkpoint")


def call_of(equation: Equation) -> Call | None:
    """The `Call` behind an equation, or None where the equation is to be taken as a whole.

    `while`, `custom_vjp_call` and whatever is unknown are taken as a whole.
    """
    name, params = equation.primitive.name, equation.params
    if name in _INLINE_CALLS:
        return Call("jit", (Jaxpr.wrap(params[_INLINE_CALLS[name]]),))
    if name in _REMAT_CALLS:
        return Call("remat", (Jaxpr.wrap(params["jaxpr"]),))
    if name == "custom_jvp_call":
        return Call("custom_jvp", (Jaxpr.wrap(params["call_jaxpr"]),))
    if name == "cond":
        return Call("cond", tuple(Jaxpr.wrap(b) for b in params["branches"]), skip=1)
    if name == "shard_map":
        return Call("shard_map", (Jaxpr.wrap(params["jaxpr"]),))
    if name == "scan":
        if "ft_in" in params:
            consts, carry, _ = params["ft_in"].elts
            num_consts, num_carry = len(consts), len(carry)
        else:
            num_consts, num_carry = params["num_consts"], params["num_carry"]
        return Call("scan", (Jaxpr.wrap(params["jaxpr"]),), 0, num_consts, num_carry)
    return None


Parts = tuple[tuple[int, tuple[str, ...], int], ...]


def sharded_operands(equation: Equation) -> list[Parts]:
    """For each operand of a `shard_map` the axes of which a device sees a part only.

    Each is the axis, the mesh axes over which it is divided, and into how many parts.
    """
    sizes = dict(equation.params["mesh"].shape)

    def one(axis: int, names: Any) -> tuple[int, tuple[str, ...], int]:
        names = (names,) if isinstance(names, str) else tuple(names)
        return axis, names, math.prod(sizes[name] for name in names)

    return [
        tuple(one(axis, names) for axis, names in enumerate(spec) if names is not None)
        for spec in equation.params["in_specs"]
    ]


def gathered_over(equation: Equation) -> tuple[tuple[str, ...], int, bool] | None:
    """The mesh axes of an `all_gather`, its axis, and whether that is one there was before."""
    if equation.primitive.name not in ("all_gather", "all_gather_invariant"):
        return None
    names, params = equation.params["axis_name"], equation.params
    names = (names,) if isinstance(names, str) else tuple(names)
    return names, params["all_gather_dimension"], params["tiled"]


def shard_map(
    equation: Equation, body: Callable[..., list[Any]], operands: list[Any], rest: Any, specs: Any
) -> list[Any]:
    """Runs `body(*operands, rest)` as a `shard_map` does its jaxpr; `specs` are those of `rest`."""
    params = equation.params
    mapped = jax.shard_map(
        lambda *xs: tuple(body(*xs)),
        mesh=params["mesh"],
        in_specs=(*params["in_specs"], specs),
        out_specs=params["out_specs"],
        axis_names=set(params["newly_manual_axes"]),
        check_vma=params["check_vma"],
    )
    return list(mapped(*operands, rest))  # type: ignore[no-untyped-call]


def devices_apart(equation: Equation) -> tuple[tuple[str, ...], bool]:
    """The mesh axes over which a `shard_map` runs, and whether it tracks what varies over them."""
    return tuple(sorted(equation.params["newly_manual_axes"])), equation.params["check_vma"]


def varying_over(x: Any) -> frozenset[str]:
    """The mesh axes over which a value, or one of a type, is known to vary in a `shard_map`."""
    aval = jax.typeof(x) if isinstance(x, jax.Array) else x  # a type, a shape, or a number
    kind = getattr(aval, "manual_axis_type", None)
    return frozenset() if kind is None else frozenset(kind.varying)


def varying(x: Any, axes: Sequence[str]) -> Any:
    """`x`, allowed to vary over mesh axes, where that is tracked."""
    tracked = [a for a in axes if a in varying_over(jax.lax.axis_index(a))]
    missing = tuple(a for a in tracked if a not in varying_over(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def resized(leaf: Any, shape: Sequence[int]) -> jax.ShapeDtypeStruct:
    """The type of an array, or of a shape, with another shape: as far as that can be.

    Raises:
      ValueError: its axes do not divide over the mesh.
    """
    return _typed(jax.typeof(leaf), shape)


def retrace(function: Callable[..., Any], jaxpr: Jaxpr) -> Jaxpr:
    """The jaxpr of a function of what another jaxpr takes."""
    return trace(function, *(_typed(v.aval, v.aval.shape) for v in jaxpr.invars))[0]


def _typed(aval: Any, shape: Sequence[int]) -> jax.ShapeDtypeStruct:
    explicit = jax.sharding.AxisType.Explicit in aval.sharding.mesh.axis_types
    return jax.ShapeDtypeStruct(
        tuple(shape),
        aval.dtype,
        weak_type=aval.weak_type,
        sharding=aval.sharding if explicit else None,
        manual_axis_type=aval.manual_axis_type if varying_over(aval) else None,
    )


def undivided(x: Any, axes: Sequence[int]) -> Any:
    """`x`, whole along axes in its type: a sum over an axis that two factors divide has no type."""
    sharding = jax.typeof(x).sharding
    spec = [*sharding.spec, *[None] * (jnp.ndim(x) - len(sharding.spec))]
    explicit = jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
    if not explicit or all(spec[a] is None for a in axes):
        return x
    kept = jax.sharding.PartitionSpec(*(None if a in axes else s for a, s in enumerate(spec)))
    return jax.reshard(x, NamedSharding(sharding.mesh, kept))


def named_axes() -> tuple[str, ...]:
    """The names of the axes of `shard_map`, `pmap` and `vmap` in scope."""
    return tuple(core.unsafe_get_axis_names())


def varying_like(x: Any, like: Any) -> Any:
    """`x`, allowed to vary over the mesh axes over which `like` does."""
    missing = tuple(sorted(varying_over(like) - varying_over(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def nested(equation: Equation) -> tuple[Jaxpr, ...]:
    """All jaxprs in an equation's parameters, whatever the primitive."""
    found = []
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(getattr(item, "jaxpr", item), "eqns"):
                found.append(Jaxpr.wrap(item))
    return tuple(found)


def with_own_rule(jaxpr: Jaxpr) -> str:
    """Where the user's function has a rule of differentiation of its own; empty for nowhere."""
    for equation in jaxpr.equations:
        if equation.primitive.name in ("custom_jvp_call", "custom_vjp_call"):
            return location(equation) or "a line that is not known"
        where = next(filter(None, map(with_own_rule, nested(equation))), "")
        if where:
            return where
    return ""


def side_effect(equation: Equation) -> str | None:
    """What an equation does besides giving its outputs; None for nothing, or printing to debug.

    Printing in a fixed order is one: no such function can be vectorised.
    """
    effects = {type(e).__name__ for e in equation.effects} - {"NamedAxisEffect", "DebugEffect"}
    if not effects:
        return None
    how = " (ordered)" if "OrderedDebugEffect" in effects else ""
    return equation.primitive.name + how


def alike(one: Jaxpr, other: Jaxpr, *, lengths: bool = False) -> bool:
    """Whether two jaxprs list the same primitives on arrays of the same ranks.

    With `lengths`, scans must be equally long, too.
    """

    def signature(equation: Equation) -> Any:
        ranks = [getattr(v.aval, "ndim", None) for v in equation.outvars]
        return equation.primitive.name, ranks, lengths and equation.params.get("length")

    pairs = zip(one.equations, other.equations, strict=False)
    return len(one.equations) == len(other.equations) and all(
        signature(a) == signature(b) for a, b in pairs
    )


def constraints(jaxpr: Jaxpr) -> list[NamedSharding | None]:
    """How the results are divided that the program divides by itself; None of others."""
    made = {id(v): equation for equation in jaxpr.equations for v in equation.outvars}

    def one(v: Any) -> NamedSharding | None:
        if id(v) not in made:
            return None
        equation = made[id(v)]
        name: str = equation.primitive.name
        if name in ("copy", "copy_p"):
            return one(equation.invars[0])
        key = {"sharding_constraint": "sharding", "reshard": "dst_sharding"}.get(name)
        return None if key is None else equation.params[key]

    return [one(v) for v in jaxpr.outvars]


def bind(equation: Equation, operands: Sequence[Any]) -> list[Any]:
    """Evaluates one equation on new operands, as `jax.core.eval_jaxpr` would."""
    with equation.ctx.manager:
        return unplaced(equation, operands)


def unplaced(equation: Equation, operands: Sequence[Any]) -> list[Any]:
    """Evaluates one equation here, whatever it was traced in."""
    params = equation.primitive.get_bind_params(equation.params)
    out = equation.primitive.bind(*operands, **params)
    return list(out) if equation.primitive.multiple_results else [out]


def context(equation: Equation) -> contextlib.AbstractContextManager[Any]:
    """What an equation was traced in, such as a mesh whose axes are explicit or not."""
    return equation.ctx.manager


def backward_rule(equation: Equation, position: int) -> Jaxpr:
    """What an operand's cotangent is made of: the jaxpr of a pullback, of its output's."""
    avals = [v.aval for v in (*equation.invars, equation.outvars[0])]

    def pulled(*values: Any) -> Any:
        *operands, g = values

        def one(x: Any) -> Any:
            return bind(equation, [*operands[:position], x, *operands[position + 1 :]])[0]

        return jax.vjp(one, operands[position])[1](g)[0]

    return trace(pulled, *(_typed(aval, aval.shape) for aval in avals))[0]


def sourced(equation: Equation) -> contextlib.AbstractContextManager[Any]:
    """Gives what is traced now the place of an equation in the user's code, if it has one.

    What is inside of a call of JAX's own functions has none, and is at the place of the call.
    """
    info = equation.source_info
    if not location(equation):
        return contextlib.nullcontext()
    return source_info_util.user_context(info.traceback, name_stack=info.name_stack)


def under_jit() -> bool:
    """Whether what is called now is traced for compilation."""
    return bool(core.unsafe_am_i_under_a_jit())


_PACKAGE = str(pathlib.Path(__file__).parent)


def location(equation: Equation) -> str:
    """`file.py:12`, the innermost line outside JAX and this library; empty where none is known."""
    frames = source_info_util.summarize(equation.source_info, num_frames=8).split("\n")
    for frame in reversed(frames):  # innermost last
        path, _, rest = frame.partition(":")
        if rest and not path.startswith(_PACKAGE):
            return f"{pathlib.Path(path).name}:{rest.split(':')[0].split(' ')[0]}"
    return ""


def tag_primitive(
    name: str, value: Callable[..., jax.Array], fixed: Callable[[int], bool] = lambda _: False
) -> Any:
    """A primitive whose result is `value(*operands, **params)`, an ordinary function to JAX.

    It exists to be seen in a jaxpr. It differentiates and lowers as `value` does. Under `vmap` the
    mapped axis becomes the leading axis of every operand, so it stays one equation; operands for
    which `fixed(position)` holds must not be mapped.
    """
    primitive = core.Primitive(name)
    primitive.def_impl(value)

    def abstract(*avals: Any, **params: Any) -> Any:
        (out,) = jax.make_jaxpr(lambda *xs: value(*xs, **params))(*avals).out_avals
        return out

    def jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
        full = [ad.instantiate_zeros(t) for t in tangents]
        return jax.jvp(lambda *xs: value(*xs, **params), tuple(primals), tuple(full))

    def batch(operands: Sequence[Any], axes: Sequence[Any], **params: Any) -> tuple[Any, int]:
        size = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)
        moved = []
        for i, (x, axis) in enumerate(zip(operands, axes, strict=True)):
            if fixed(i):
                if axis is not None:
                    raise ValueError(f"{name}: operand {i} is a parameter and must not be mapped.")
                moved.append(x)
            elif axis is None:
                moved.append(jnp.broadcast_to(x, (size, *x.shape)))
            else:
                moved.append(jnp.moveaxis(x, axis, 0))
        return primitive.bind(*moved, **params), 0

    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(value, multiple_results=False))
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch
    return primitive


_opaque = core.Primitive("curvature_opaque")
_opaque.def_impl(lambda x, function: function(x))
_opaque.def_abstract_eval(lambda x, function: x)


def opaque(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """`function`, from arrays to arrays of the same shape, as one equation to whoever traces it.

    So a function that loops over data in Python can be handed to code that traces it first and
    evaluates the trace eagerly afterwards. It can be neither compiled nor differentiated.
    """
    return lambda x: _opaque.bind(x, function=function)
