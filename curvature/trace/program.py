"""What the registry finds in a trace, as a tree that the estimator can execute.

A `Plan` mirrors a jaxpr, one `Step` per equation. Most steps just bind their equation. A few do
more: a *layer* step also leaves statistics behind, a *loss* step sends the cotangent of the chosen
metric back, and a step with bodies (jit, remat, scan, cond) runs the programs inside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from curvature import _jax
from curvature.losses import OutputLoss
from curvature.trace.layouts import Batch, Layout
from curvature.trace.views import Shape, View


@dataclasses.dataclass(eq=False)
class Use:
    """One equation in which a parameter view meets the data.

    Attributes:
      view: the parameter's entries, in block coordinates but for a bias.
      layout: how they meet the data; None where no layer is recognised.
      kind: `"dense"`, `"conv"`, `"embedding"`, `"scale"`, `"shift"` or `"generic"`.
      reason: where the use is, or why it is no layer.
      loops: the numbers of the scans around the use, outermost first.
      joins: the dense or convolutional use whose output the parameter is added to, as its bias.
      bias: that bias's entries, `stack + members + (d_out,)`, on the use it joins.
      flipped: whether the layer's block coordinates are this view transposed.
      manual: whether the user tagged it by hand: then other uses of the parameter do not matter.
      layer: the name of the layer the use was assigned to.
      lead: lengths of the scans around the use, outermost first.
      local: whether it is inside a `shard_map` where other devices may have other examples.
      parts: whether devices around have other parts of the same examples, such as positions.
      unbatched: whether its output has no batch axis: it sees cotangents summed over examples.
      meeting: where its examples meet on the way to a tagged loss (see `mixing`); empty if nowhere.
      index: its place among all uses.
      slope: where what meets the data is an elementwise function of the parameter, whose derivative
        the evaluator brings along: that derivative, of the operand's shape, in block coordinates.
    """

    view: View
    layout: Layout | None
    kind: str
    reason: str
    loops: Shape = ()
    joins: Use | None = None
    bias: View | None = None
    flipped: bool = False
    manual: bool = False
    layer: str | None = None
    lead: Shape = ()
    local: bool = False
    parts: bool = False
    unbatched: bool = False
    meeting: str = ""
    index: int = -1
    slope: View | None = None


@dataclasses.dataclass(frozen=True)
class LossTag:
    """A tagged output loss in the model.

    Attributes:
      name: the loss function's name.
      loss: the family.
      z: shape and dtype of the network's output at the tag (in one iteration of a scan).
      lead: lengths of the scans around the tag, outermost first.
      location: the user's line.
      batch: the batch axis of z, where it has one.
    """

    name: str
    loss: OutputLoss
    z: Any
    lead: Shape
    location: str
    batch: Batch | None = None

    @property
    def examples(self) -> int:
        """Examples in z that can be told apart, in one scan step."""
        return self.batch.examples(self.z.shape[self.batch.axis]) if self.batch else 1

    @property
    def columns(self) -> int:
        """Entries of z per example and scan step: the columns of the exact square root."""
        return int(self.z.size) // max(self.examples, 1)

    def by_example(self, x: jax.Array) -> jax.Array:
        """z, or what has axes like it, as `(examples, entries of the batch axis each, ...)`."""
        if self.batch is None:
            return x[None]
        x = jnp.moveaxis(x, self.batch.axis, 0)
        return x.reshape((self.examples, -1, *x.shape[1:]))

    def back(self, x: jax.Array) -> jax.Array:
        """The inverse of `by_example`."""
        if self.batch is None:
            return x[0]
        return jnp.moveaxis(x.reshape((-1, *x.shape[2:])), 0, self.batch.axis)


@dataclasses.dataclass(eq=False)
class Step:
    """One equation and what to do with it.

    Attributes:
      equation: the equation.
      cut: for each operand, whether `stop_gradient` cuts it off (see `liveness`).
      cut_outs: the same for the outputs of each branch of a cond.
      call: what the equation runs, with one program per body in `bodies`; None: bind it.
      use: the contraction with a parameter that this equation is.
      broadcasts: operands that are parameters broadcast against the data, with their uses.
      derive: the operand whose elementwise derivative is brought along.
      loss: the index of the tagged loss this equation is, and that loss.
      scan: the number of the scan that this equation is, in the order of the walk.
      stacked: names of the layers whose statistics a scan stacks, one per iteration.
      shards: of a `shard_map`, the numbers that stand for the mesh axes over which weights are
        divided in it; views have them as stacks.
      divided: names of the layers that are, with the mesh axes of their leading stacked axes.
      losses: indices of the losses inside a scan.
      gate: see `meet.gate`; None after a loss.
      contractions: indices of the uses inside a scan that are contractions.
    """

    equation: _jax.Equation
    cut: tuple[bool, ...]
    call: _jax.Call | None = None
    bodies: tuple[Program, ...] = ()
    use: Use | None = None
    broadcasts: list[tuple[int, Use]] = dataclasses.field(default_factory=list)
    derive: int | None = None
    loss: tuple[int, LossTag] | None = None
    scan: int = -1
    stacked: tuple[str, ...] = ()
    shards: Mapping[int, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    divided: Mapping[str, tuple[tuple[str, ...], ...]] = dataclasses.field(default_factory=dict)
    losses: tuple[int, ...] = ()
    gate: int | None = None
    contractions: tuple[int, ...] = ()
    cut_outs: tuple[tuple[bool, ...], ...] = ()

    def uses(self) -> Iterator[Use]:
        """The uses that belong to a layer."""
        found = [use for _, use in self.broadcasts]
        yield from (u for u in [*found, self.use] if u is not None and u.layer is not None)


@dataclasses.dataclass(eq=False)
class Program:
    """The steps of one jaxpr."""

    jaxpr: _jax.Jaxpr
    steps: list[Step]

    def walk(self) -> Iterator[Step]:
        """All steps, at any depth."""
        for step in self.steps:
            yield step
            for body in step.bodies:
                yield from body.walk()


def settle(program: Program) -> bool:
    """Fixes the program once layers are named; whether it differs from plain evaluation at all.

    A call in which nothing happens is bound whole, so that it keeps its own rules (`custom_jvp`).
    """
    active = False
    for step in program.steps:
        step.broadcasts = [(i, use) for i, use in step.broadcasts if use.layer is not None]
        if step.call is not None:
            if any([settle(body) for body in step.bodies]) or any(map(any, step.cut_outs)):
                inside = [s for body in step.bodies for s in body.walk()]
                step.losses = tuple(s.loss[0] for s in inside if s.loss is not None)
                uses = [s.use for s in inside if s.use is not None]
                step.contractions = tuple(use.index for use in uses if use.layer is not None)
                names = {u.layer for s in inside for u in s.uses() if step.scan in u.view.stack}
                step.stacked = tuple(sorted(name for name in names if name is not None))
                step.divided = {
                    str(u.layer): tuple(step.shards[s] for s in u.view.stack if s in step.shards)
                    for inner in inside
                    for u in inner.uses()
                    if not step.shards.keys().isdisjoint(u.view.stack)
                }
                active = True
            else:
                step.call, step.bodies = None, ()
        active |= any(step.cut) or any(True for _ in step.uses())
        active |= step.loss is not None or step.derive is not None
    return active
