"""Finding layers: follow every parameter forwards through a jaxpr until it meets the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from curvature import _jax
from curvature._jax import Jaxpr
from curvature.losses import TAG
from curvature.trace import liveness, rules
from curvature.trace.constants import known
from curvature.trace.environment import Environment, Inputs, Product, Value, Wide
from curvature.trace.layouts import Dense, Examples, split_rows
from curvature.trace.program import LossTag, Program, Step, Use
from curvature.trace.reasons import NO_GRADIENT, reason
from curvature.trace.tags import LAYER_TAG
from curvature.trace.views import View

_PARAMETER = (View, Wide)
_FOREIGN_TAGS = ("layer_tag", "loss_tag")  # kfac-jax's: they give their first operands


class Finder:
    """Walks a jaxpr once and collects uses, losses and the program."""

    def __init__(self, names: Sequence[str]) -> None:
        """Starts a walk; `names` are the key paths of the leaves, for errors."""
        self._names = names
        self.uses: list[Use] = []
        self.losses: list[LossTag] = []
        self.blocked: list[str] = []  # what no gradient can pass, with the parameters before it
        self.masked = False  # whether the weight of some unit of a loss may be zero
        self.stopped: set[Any] = set()  # sources of views that met stop_gradient
        self.computed = False  # whether a parameter was computed with before it met the data
        self._changed: dict[Any, tuple[str, str]] = {}  # what was done first to sources, and where
        self._loops: list[tuple[int, int]] = []  # (scan, length) around the current equation
        self._scans = 0  # number of scans met: each is known by its number in the walk
        self._branches = 0  # number of conds around the current equation
        self._meshes: dict[int, tuple[str, ...]] = {}  # the mesh axes of stacks of parts
        # Of the shard_maps around the current equation the mesh axes over which they divide
        # examples, and whether devices may have different ones.
        self._devices: list[tuple[frozenset[str], bool]] = []
        self._callers: list[str] = []  # locations of the calls around the current equation

    def walk(
        self, jaxpr: Jaxpr, twin: Jaxpr | None, inputs: Inputs, out_live: Sequence[bool]
    ) -> tuple[Program, list[Value], list[bool]]:
        """The program of a jaxpr, what its outputs are, and `Environment.first` of them.

        Args:
          jaxpr: what to walk.
          twin: the same with one more example, None where it could not be traced.
          inputs: what is known of its inputs.
          out_live: for each output, whether a tagged loss depends on it.
        """
        live, _ = liveness.reaches_loss(jaxpr, out_live)
        twin = twin if twin is not None and _jax.alike(jaxpr, twin) else None
        env = Environment(jaxpr, twin, inputs, live, out_live)
        steps = [
            self._step(e, twin.equations[i] if twin else None, env, live[i])
            for i, e in enumerate(jaxpr.equations)
        ]
        outs = jaxpr.outvars
        return Program(jaxpr, steps), [env.sole(v) for v in outs], [env.first(v) for v in outs]

    def _step(
        self, equation: _jax.Equation, twin: _jax.Equation | None, env: Environment, live: bool
    ) -> Step:
        after = [env.after(v) for v in equation.invars]
        varies = any(env.varies(v) for v in equation.invars)
        out_after = liveness.after_loss_equation(equation, after)
        env.mark(equation.outvars, out_after, [varies] * len(equation.outvars))
        if equation.primitive.name == TAG:
            return self._loss(equation, after, env)
        values = [env.sole(v) for v in equation.invars]
        if equation.primitive.name in _FOREIGN_TAGS:
            count = len(equation.outvars)
            env.define(equation.outvars, values[:count])
            env.put_first(equation.outvars, [env.first(v) for v in equation.invars[:count]])
            return Step(equation, (*[False] * count, *[True] * (len(values) - count)))
        call = _jax.call_of(equation)
        if call is not None and self._enters(equation, call, values, after, env):
            return self._call(equation, twin, call, env, values, after)
        self.masked |= any(after) and liveness.may_mask(equation, after, looped=bool(self._loops))
        if live and equation.primitive.name in NO_GRADIENT:
            self._block(equation, values)
        env.order(equation)
        step = Step(equation, tuple(any(after) and not a for a in after))
        step.gate = None if any(after) else rules.gate(equation)
        if any(isinstance(v, (*_PARAMETER, Product)) for v in values):
            if live:
                env.define(equation.outvars, self._meet(step, values, env))
            elif equation.primitive.name == "stop_gradient" and isinstance(values[0], View):
                self.stopped.add(values[0].source)
        elif len(equation.outvars) == 1:
            env.define(equation.outvars, [known(equation, values)])
        return step

    def _where(self, equation: _jax.Equation) -> str:
        """The user's line; of the innermost call that has one, where a cached trace has none."""
        return _jax.location(equation) or next((c for c in reversed(self._callers) if c), "?")

    def _block(self, equation: _jax.Equation, values: Sequence[Value]) -> None:
        """Notes an equation that no gradient can pass, and the parameters in and before it."""
        views = [use.view for use in self.uses]
        views += [v.view if isinstance(v, Wide) else v for v in values if isinstance(v, _PARAMETER)]
        leaves = sorted({part.source for view in views for part in view.leaves()})
        if leaves:
            names = ", ".join(self._names[leaf] for leaf in leaves)
            self.blocked.append(f"{equation.primitive.name} at {self._where(equation)} ({names})")

    # Calls ------------------------------------------------------------------------------------

    def _enters(
        self,
        equation: _jax.Equation,
        call: _jax.Call,
        values: list[Value],
        after: list[bool],
        env: Environment,
    ) -> bool:
        """Whether a call is looked into, or taken as one equation."""
        if any(after) or any(map(liveness.has_tag, call.bodies)):
            return True
        batches = [env.batch(v) for v in (*equation.invars, *equation.outvars)]
        if call.kind == "jit" and any(b is not None and b.each > 1 for b in batches):
            return True  # it may change the order of examples
        parameters = [v for v in values if isinstance(v, _PARAMETER)]
        if any(isinstance(v, Product) for v in values):
            return True
        if parameters:
            # An elementwise function of parameters alone keeps its own rule of differentiation.
            batched = any(env.batch(v) is not None for v in equation.outvars)
            return batched or not rules.is_elementwise(equation)
        small = call.kind == "jit" and len(call.bodies[0].equations) < 20
        return small  # it may be `one_hot`, or arithmetic on constant indices

    def _call(
        self,
        equation: _jax.Equation,
        twin: _jax.Equation | None,
        call: _jax.Call,
        env: Environment,
        values: list[Value],
        after: list[bool],
    ) -> Step:
        operands_live, out_live = liveness.live_call(
            call, [env.is_live(v) for v in equation.outvars]
        )
        inside_after = liveness.scan_fixpoint(call, after[call.skip :])
        # A carry that starts before the loss but accumulates it: its start is cut off.
        cut = [b and not a for a, b in zip(after[call.skip :], inside_after, strict=True)]
        step = Step(equation, (*[False] * call.skip, *cut), call)
        if call.kind == "cond":
            step.cut_outs = tuple(tuple(cut) for cut in liveness.cut_outputs(call, inside_after))
        step.gate = None if any(after) else rules.gate(equation)  # where nothing is found inside
        if call.kind == "scan":
            step.scan = self._scans
            self._scans += 1
        inside = self._enter(step, call, values, operands_live, env)
        varies = [env.varies(v) for v in equation.invars[call.skip :]]
        if call.kind == "scan":
            carried = range(call.num_consts, call.num_consts + call.num_carry)
            # A carry may vary from the second step on.
            varies = [v or (i in carried and any(varies)) for i, v in enumerate(varies)]
            self._loops.append((step.scan, equation.params["length"]))
        if call.kind == "shard_map":
            self._devices.append(_dividing(equation, env))
        self._branches += call.kind == "cond"
        self._callers.append(self._where(equation))
        twins = _jax.call_of(twin) if twin is not None else None
        bodies = twins.bodies if twins is not None else [None] * len(call.bodies)
        batches = _batches(call, env, equation, twins)
        first = [env.first(v) for v in equation.invars[call.skip :]]
        if call.kind == "scan" and {"reshape", "transpose"} <= rules.primitives(equation):
            # A carry may come out of the body in another order than it went in.
            first = [f and i not in carried for i, f in enumerate(first)]
        inputs = Inputs(inside, inside_after, varies, first, env.closure, batches)
        walked = [
            self.walk(b, t, inputs, out_live) for b, t in zip(call.bodies, bodies, strict=True)
        ]
        self._callers.pop()
        if call.kind == "shard_map":
            self._devices.pop()
        self._branches -= call.kind == "cond"
        step.bodies = tuple(program for program, _, _ in walked)
        env.put_first(
            equation.outvars, [all(c) for c in zip(*(f for _, _, f in walked), strict=True)]
        )
        if call.kind == "scan":
            self._loops.pop()
        if call.kind in ("scan", "cond", "shard_map"):
            where = f"returned by a {call.kind} at {self._where(equation)}"
            for outs in (outs for _, outs, _ in walked):
                self._generic([o for o, keep in zip(outs, out_live, strict=True) if keep], where)
        else:
            env.define(equation.outvars, walked[0][1])
        return step

    def _enter(
        self, step: Step, call: _jax.Call, values: list[Value], live: list[bool], env: Environment
    ) -> list[Value]:
        """What the operands of a call are inside its bodies."""
        if call.kind == "shard_map":
            return self._divide(step, values, live)
        if call.kind != "scan":
            return values[call.skip :]
        inside: list[Value] = []
        for i, value in enumerate(values):
            scanned = i >= call.num_consts + call.num_carry
            if i < call.num_consts:
                inside.append(None if isinstance(value, Product) else value)
            elif scanned and isinstance(value, View) and not value.curved:
                inside.append(value.pushed(step.scan))
            else:
                if live[i] and isinstance(value, _PARAMETER) and not self._tap(step, i, value, env):
                    how = "scanned" if scanned else "carried"
                    self._generic([value], f"{how} by a scan at {self._where(step.equation)}")
                inside.append(None)
        return inside

    def _divide(self, step: Step, values: list[Value], live: list[bool]) -> list[Value]:
        """What the operands of a `shard_map` are on one device: a part of a weight is a copy."""
        shards: dict[tuple[str, ...], int] = {}
        inside: list[Value] = []
        pairs = zip(values, _jax.sharded_operands(step.equation), live, strict=True)
        for value, parts, on in pairs:
            if parts and isinstance(value, View) and not value.curved:
                for axis, names, count in parts:
                    if names not in shards:
                        shards[names] = self._scans
                        self._scans += 1
                    value = value.divided(axis, count, shards[names])
            elif parts:
                if on:
                    where = f"sharded by a shard_map at {self._where(step.equation)}"
                    self._generic([value], where)
                value = None
            inside.append(value)
        step.shards = {number: names for names, number in shards.items()}
        self._meshes.update(step.shards)
        return inside

    def _gathered(self, view: View, names: tuple[str, ...], axis: int, tiled: bool) -> View | None:
        """What an `all_gather` makes of a part of a weight: the whole."""
        stacks = [s for s in view.stack if self._meshes.get(s) == names]
        return view.gathered(stacks[-1], axis, tiled=tiled) if stacks else None

    # Losses -----------------------------------------------------------------------------------

    def _loss(self, equation: _jax.Equation, after: list[bool], env: Environment) -> Step:
        loss, where = equation.params["loss"], self._where(equation)
        if after[0]:
            raise ValueError(
                f"The predictions of the tagged loss {loss.name} at {where} depend on the value of "
                "another tagged loss, so its weight is no gradient of the total loss. Pass "
                "jax.lax.stop_gradient of that value, or use an untagged loss there."
            )
        lead = tuple(length for _, length in self._loops)
        self.masked |= self._branches > 0
        z = equation.invars[0]
        if not z.aval.size:
            raise ValueError(
                f"The tagged loss {loss.name} at {where} has no predictions: they are "
                f"{z.aval.dtype}{list(z.aval.shape)}. Leave empty batches out."
            )
        batch = env.batch(z)
        if batch is not None and batch.axis >= z.aval.ndim - loss.event_ndim:
            batch = None
        tag = LossTag(loss.name, loss, z.aval, lead, where, batch)
        self.losses.append(tag)
        return Step(equation, (False,) * len(after), loss=(len(self.losses) - 1, tag))

    # Parameters -------------------------------------------------------------------------------

    def _meet(self, step: Step, values: list[Value], env: Environment) -> list[Value]:
        """What a live equation with a parameter among its operands makes of it."""
        equation = step.equation
        nothing: list[Value] = [None] * len(equation.outvars)
        if equation.primitive.name in rules.IDENTITIES and not any(map(_curved, values)):
            return values
        gathered = _jax.gathered_over(equation)
        if gathered is not None and isinstance(values[0], View) and not values[0].curved:
            whole = self._gathered(values[0], *gathered)
            if whole is not None:
                return [whole]
        if len(values) == 1:
            batched = any(env.batch(v) is not None for v in equation.outvars)
            outs = rules.moved(equation, values[0], batched)
            if outs is not None:
                step.derive = 0 if _curved(values[0]) else None
                return outs
        if equation.primitive.name == LAYER_TAG:
            self._manual(step, values, env)
            return nothing
        added = rules.bias(equation, values)
        if added is not None:
            self._join(step, values, env, *added)
            return nothing
        for i, value in enumerate(values):
            if not isinstance(value, Wide) or env.batch(equation.invars[i]) is None:
                continue
            if self._tap(step, i, value, env):
                values[i] = None
        if not any(isinstance(v, _PARAMETER) for v in values):
            return nothing
        view = (
            rules.scaled(equation, values)
            or rules.translated(equation, values, env)
            or rules.picked(equation, values)
            or rules.joined(equation, values)
        )
        if view is not None and view.curved:
            step.derive = 0
        if view is not None:
            return [view]
        found = rules.contraction(equation, values, env)
        if found is not None:
            step.use, product = found
            self.computed |= step.use.unbatched
            self._add(step.use, equation)
            return nothing if step.use.slope is not None else [product]
        carried = rules.carried_along(equation, values, env)
        if carried is not None:
            step.derive, view = carried
            self._changed.setdefault(view.source, (equation.primitive.name, self._where(equation)))
            return [view]
        left = [
            v
            for i, v in enumerate(values)
            if isinstance(v, _PARAMETER) and not self._tap(step, i, v, env)
        ]
        unbatched = rules.is_elementwise(equation) and env.batch(equation.outvars[0]) is None
        unbatched &= equation.primitive.name not in rules.PASSES
        self.computed |= bool(left)
        for value in left:
            source = (value.view if isinstance(value, Wide) else value).source
            before = self._changed.get(source) if _curved(value) else None
            why = reason(
                equation.primitive.name,
                self._where(equation),
                others=len(left) - 1,
                before=before,
                unbatched=unbatched,
            )
            self._generic([value], why)
        return nothing

    def _manual(self, step: Step, values: list[Value], env: Environment) -> None:
        """A layer tagged by hand."""
        where = self._where(step.equation)
        parameters = values[2:]
        views = [v for v in parameters if isinstance(v, View) and not v.curved]
        if len(views) < len(parameters) or len({v.stack for v in views}) > 1:
            raise ValueError(
                f"tag_layer at {where}: the weight or bias is not a parameter that was only "
                "reshaped, transposed, sliced, cast or scaled; tag the parameter itself."
            )
        y, x = (tuple(v.aval.shape) for v in step.equation.invars[:2])
        expected = ((*x[-1:], *y[-1:]), y[-1:])
        for view, shape in zip(views, expected, strict=False):
            if view.inner != shape or x[:-1] != y[:-1]:
                names = ", ".join(self._names[part.source] for part in view.leaves())
                raise ValueError(
                    f"tag_layer at {where}: the parameter {names} is met in shape {view.inner}, "
                    f"expected {shape} for the input {x} and the output {y}: weight (d_in, d_out), "
                    "bias (d_out,), input [..., d_in] and output [..., d_out] with equal leading "
                    "axes."
                )
        weight, *bias = views
        rows = list(range(len(x) - 1))
        batch = env.batch(step.equation.invars[1])
        rows, examples = split_rows(rows, batch, x[batch.axis] if batch else 1)
        order, last = (*rows, len(x) - 1), len(x) - 1
        layout = Dense(0, order, order, (last,), (), examples, x[-1], y[-1], weight.scale)
        step.use = Use(weight, layout, "dense", "tag_layer", manual=True)
        self._add(step.use, step.equation)
        if bias:
            shift = Use(bias[0], None, "generic", "tag_layer", manual=True)
            shift.joins, step.use.bias = step.use, bias[0]
            self._add(shift, step.equation)

    def _join(
        self, step: Step, values: list[Value], env: Environment, use: Use, entries: View
    ) -> None:
        """A bias: part of the layer whose output it is added to, or else a shift."""
        i = 0 if isinstance(values[0], _PARAMETER) else 1
        value = values[i]
        assert isinstance(value, (View, Wide))
        shift = rules.broadcast(step.equation, i, value, env)
        if shift is None:
            view = value if isinstance(value, View) else value.view
            shift = Use(view, None, "generic", step.equation.primitive.name)
        self._add(shift, step.equation)
        step.broadcasts.append((i, shift))
        shift.joins, use.bias = use, entries

    def _tap(self, step: Step, position: int, value: View | Wide, env: Environment) -> bool:
        """Taps an operand that is a parameter broadcast against the batch, if it is."""
        use = rules.broadcast(step.equation, position, value, env)
        if use is None:
            return False
        self.computed |= use.unbatched
        self._add(use, step.equation)
        step.broadcasts.append((position, use))
        return True

    def _add(self, use: Use, equation: _jax.Equation) -> None:
        use.reason = f"{use.reason} at {self._where(equation)}"
        use.loops = tuple(scan for scan, _ in self._loops)
        use.lead = tuple(length for _, length in self._loops)
        use.local = any(differ for _, differ in self._devices)
        apart = frozenset().union(*(axes for axes, _ in self._devices))
        own = [name for copies in use.view.stack for name in self._meshes.get(copies, ())]
        use.parts = bool(_jax.varying_over(equation.outvars[0].aval) - apart - set(own))
        use.index = len(self.uses)
        self.uses.append(use)

    def _generic(self, values: Sequence[Value], reason: str) -> None:
        for value in values:
            view = value.view if isinstance(value, Wide) else value
            if isinstance(view, View):
                self.uses.append(Use(view, None, "generic", reason))


def _batches(
    call: _jax.Call, env: Environment, equation: _jax.Equation, twin: _jax.Call | None
) -> tuple[Examples, ...]:
    """The batches of a call's bodies: in a shard_map, what one device has of them."""
    if call.kind != "shard_map" or twin is None:
        return env.batches
    local = {}
    pairs = zip(equation.invars, call.bodies[0].invars, twin.bodies[0].invars, strict=True)
    for outer, mine, other in pairs:
        batch = env.batch(outer)
        if batch is not None:
            n, more = (v.aval.shape[batch.axis] // batch.each for v in (mine, other))
            local[outer.aval.shape[batch.axis] // batch.each] = Examples(n, max(more - n, 1))
    return tuple(local.get(b.number, b) for b in env.batches)


def _dividing(equation: _jax.Equation, env: Environment) -> tuple[frozenset[str], bool]:
    """The mesh axes over which a `shard_map` divides examples, and whether devices' may differ."""
    found: set[str] = set()
    batches = [env.batch(v) for v in equation.invars]
    for batch, divided in zip(batches, _jax.sharded_operands(equation), strict=True):
        if batch is not None:
            found.update(name for axis, names, _ in divided if axis == batch.axis for name in names)
    known = not env.guesses and any(b is not None for b in batches)
    return frozenset(found), bool(found) or not known


def _curved(value: Value) -> bool:
    view = value.view if isinstance(value, Wide) else value
    return isinstance(view, View) and view.curved
