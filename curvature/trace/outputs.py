"""The network's outputs at every tagged loss, as one differentiable function of the parameters.

The loss's jaxpr is evaluated with one change: a tagged loss also hands out its output z and its
targets, from wherever it lies (a scan stacks them, a branch of a cond that is not taken hands out
zeros). `jax.linearize` of that gives J, and its transpose J'. The weights w = dL/dl are the
gradient with respect to zeros that are added to the losses' values; there z is cut off, so that no
derivative of the network is taken for them.

Nothing is shared with the blockwise estimator, which is measured against these operators.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from curvature import _jax
from curvature.losses import TAG, OutputLoss, Targets
from curvature.meshes import bind, divided_zeros, here
from curvature.trace import liveness

PyTree = Any
Tap = tuple[jax.Array, Targets]  # z and the targets of one tagged loss


@dataclasses.dataclass(frozen=True)
class Tag:
    """A tagged loss of a jaxpr.

    Attributes:
      loss: the family.
      lead: lengths of the scans around the tag, outermost first; all its arrays are stacked so.
      units: shape and dtype of the loss's value in one iteration.
    """

    loss: OutputLoss
    lead: tuple[int, ...]
    units: Any

    def zeros(self) -> jax.Array:
        """Zeros of the shape of all its units."""
        return divided_zeros(self.units, self.lead)


@dataclasses.dataclass(frozen=True)
class Output:
    """What one tagged loss sees; shapes are `lead + units`, and `lead + units + event` for z.

    Attributes:
      tag: the loss.
      z: the network's output.
      targets: the loss's targets.
      weights: w = dL/dl of every unit.
    """

    tag: Tag
    z: jax.Array
    targets: Targets
    weights: jax.Array

    @property
    def event(self) -> tuple[int, ...]:
        """The axes of one unit's entries."""
        return tuple(range(-self.tag.loss.event_ndim, 0))


@dataclasses.dataclass(frozen=True)
class Outputs:
    """A loss function at given parameters and data.

    Attributes:
      outputs: what each tagged loss sees.
      pushforward: from a tree like the parameters to tangents J v of every output z.
      pullback: from cotangents of every z to J' g, a tree like the parameters.
      loss: the type of the loss.
    """

    outputs: tuple[Output, ...]
    pushforward: Callable[[PyTree], list[jax.Array]]
    pullback: Callable[[list[jax.Array]], PyTree]
    loss: Any


def linearise(
    loss_fn: Callable[..., Any], has_aux: bool, params: PyTree, args: tuple[PyTree, ...]
) -> Outputs:
    """The outputs of `loss_fn(params, *args)` at its tagged losses, and their linearisation.

    Raises:
      TypeError: the loss is not a scalar.
      ValueError: no loss is tagged, one is where it cannot be seen, or one depends on another.
    """
    jaxpr, out = _jax.trace(loss_fn, params, *args)
    loss = out[0] if has_aux else out
    if getattr(loss, "shape", None) != ():
        raise TypeError(
            f"loss_fn returned {loss}, expected a scalar array, or (scalar, aux) with has_aux=True."
        )
    tags = _tags(jaxpr, [False] * len(jaxpr.invars), ())
    if not tags:
        raise ValueError(
            "The loss function has no tagged loss: nothing says where the network ends. Use a loss "
            "of curvature.losses in place of its namesake in optax.losses."
        )

    def outputs(params: PyTree) -> tuple[list[jax.Array], Any]:
        def total(added: list[jax.Array]) -> tuple[jax.Array, list[Tap]]:
            outs, taps = _run(jaxpr, [*jax.tree.leaves(params), *jax.tree.leaves(args)], added)
            return outs[0], taps

        weights, taps = jax.grad(total, has_aux=True)([tag.zeros() for tag in tags])
        return [z for z, _ in taps], (weights, [targets for _, targets in taps])

    zs, push, (weights, targets) = jax.linearize(outputs, params, has_aux=True)
    transposed = jax.linear_transpose(push, params)
    found = tuple(Output(*parts) for parts in zip(tags, zs, targets, weights, strict=True))
    loss = jaxpr.outvars[0].aval
    return Outputs(found, push, lambda cotangents: transposed(cotangents)[0], loss)


def _tags(jaxpr: _jax.Jaxpr, inputs: Sequence[bool], lead: tuple[int, ...]) -> list[Tag]:
    """The tagged losses in the order of evaluation.

    Args:
      jaxpr: what to walk.
      inputs: for each input, whether it depends on a tagged loss.
      lead: lengths of the scans around it.
    """
    found = []
    after = {v for v, depends in zip(jaxpr.invars, inputs, strict=True) if depends}
    for equation in jaxpr.equations:
        operands = [not isinstance(v, _jax.Literal) and v in after for v in equation.invars]
        call = _jax.call_of(equation)
        if equation.primitive.name == TAG:
            _check_first(equation, operands[0])
            found.append(Tag(equation.params["loss"], lead, equation.outvars[0].aval))
        elif _tagged(equation) and call is not None and call.kind != "shard_map":
            scan = (equation.params["length"],) if call.kind == "scan" else ()
            inside = liveness.scan_fixpoint(call, operands[call.skip :])
            found += [t for body in call.bodies for t in _tags(body, inside, (*lead, *scan))]
        elif _tagged(equation):
            raise ValueError(
                f"A loss is tagged inside {equation.primitive.name} at {_jax.location(equation)}, "
                "which cannot be looked into: compute the loss outside of it."
            )
        outs = liveness.after_loss_equation(equation, operands)
        after |= {v for v, depends in zip(equation.outvars, outs, strict=True) if depends}
    return found


def _check_first(equation: _jax.Equation, after: bool) -> None:
    if after:
        raise ValueError(
            f"The predictions of the tagged loss {equation.params['loss'].name} at "
            f"{_jax.location(equation)} depend on the value of another tagged loss, so its weight "
            "is no gradient of the total loss. Use an untagged loss there."
        )


def _tagged(equation: _jax.Equation) -> bool:
    """Whether a tagged loss lies inside an equation's jaxprs."""
    return any(liveness.has_tag(jaxpr) for jaxpr in _jax.nested(equation))


def _count(jaxpr: _jax.Jaxpr) -> int:
    inner = sum(_count(j) for e in jaxpr.equations for j in _jax.nested(e))
    return inner + sum(e.primitive.name == TAG for e in jaxpr.equations)


def _run(
    jaxpr: _jax.Jaxpr, inputs: Sequence[Any], added: Sequence[jax.Array]
) -> tuple[list[Any], list[Tap]]:
    """Evaluates a jaxpr, with `added` to its tagged losses; its outputs, and those losses' taps."""
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, jaxpr.consts, strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, _jax.Literal) else env[atom]

    taps: list[Tap] = []
    for equation in jaxpr.equations:
        with _jax.context(equation):
            outs, found = _step(equation, [read(v) for v in equation.invars], added[len(taps) :])
        env.update(zip(equation.outvars, outs, strict=True))
        taps += here(found)  # out of a part in a mode of its own
    return [read(v) for v in jaxpr.outvars], taps


def _step(
    equation: _jax.Equation, values: list[Any], added: Sequence[jax.Array]
) -> tuple[list[Any], list[Tap]]:
    if equation.primitive.name == TAG:
        z, *targets = values
        value = equation.params["loss"].value(z, tuple(targets))
        return [value + here(added[0])], [(z, tuple(targets))]
    if not _tagged(equation):
        return bind(equation, values), []
    call = _jax.call_of(equation)
    assert call is not None  # `_tags` refuses what cannot be looked into
    inside: list[jax.Array] = here(list(added[: sum(_count(body) for body in call.bodies)]))
    if call.kind == "scan":
        return _scan(equation, call, values, inside)
    if call.kind == "cond":
        return _cond(call, values, inside)
    (body,) = call.bodies
    if call.kind == "remat":
        run = jax.checkpoint(
            lambda xs, added: _run(body, xs, added),
            policy=equation.params["policy"],
            prevent_cse=equation.params["prevent_cse"],
        )
        return run(values, inside)
    return _run(body, values, inside)


def _scan(
    equation: _jax.Equation, call: _jax.Call, values: list[Any], added: list[jax.Array]
) -> tuple[list[Any], list[Tap]]:
    first, end = call.num_consts, call.num_consts + call.num_carry

    def one(carry: list[Any], slices: Any) -> Any:
        xs, added = slices
        outs, taps = _run(call.bodies[0], [*values[:first], *carry, *xs], added)
        return outs[: call.num_carry], (outs[call.num_carry :], taps)

    options = {name: equation.params[name] for name in ("length", "reverse", "unroll")}
    carry, (ys, taps) = jax.lax.scan(one, values[first:end], (values[end:], added), **options)
    return [*carry, *ys], taps


def _cond(
    call: _jax.Call, values: list[Any], added: list[jax.Array]
) -> tuple[list[Any], list[Tap]]:
    """Each branch also hands out zeros for the losses of the others, whose weights are zero."""
    index, *operands = values
    ends = [sum(_count(b) for b in call.bodies[: i + 1]) for i in range(len(call.bodies))]
    starts = [0, *ends[:-1]]

    def branch(i: int) -> Callable[[list[Any], list[jax.Array]], Any]:
        return lambda xs, added: _run(call.bodies[i], xs, added[starts[i] : ends[i]])

    branches = range(len(call.bodies))
    shapes = [jax.eval_shape(branch(i), operands, added)[1] for i in branches]

    def padded(i: int) -> Callable[[list[Any], list[jax.Array]], Any]:
        def run(xs: list[Any], added: list[jax.Array]) -> Any:
            outs, taps = branch(i)(xs, added)
            zeros = jax.tree.map(divided_zeros, shapes)
            return outs, [t for j in branches for t in (taps if j == i else zeros[j])]

        return run

    outs, taps = jax.lax.switch(index, [padded(i) for i in branches], operands, added)
    return outs, taps
