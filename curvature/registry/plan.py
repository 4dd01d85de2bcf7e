"""What the registry finds in a trace, as a tree that the estimator can execute.

A `Plan` mirrors a jaxpr, one `Step` per equation. Most steps just bind their equation. A few do
more: a *layer* step also leaves statistics behind, a *loss* step sends the cotangent of the chosen
metric back, and a step with bodies (jit, remat, scan, cond) runs the plans inside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from curvature import _jax
from curvature.losses import OutputLoss
from curvature.registry.views import Shape, View


@dataclasses.dataclass(frozen=True)
class Contraction:
    """The data side of a dense layer, `dot_general` of an input with a weight.

    Attributes:
      operand: which operand the input is (0 or 1).
      contracted: the input's axes that are summed over, in the order of the weight's rows.
      rows: the input's other axes: examples, positions.
      out_axes: the output's axes that come from the weight; the rows are its other ones, in order.
      d_in: number of contracted entries.
      d_out: number of output entries per row.
    """

    operand: int
    contracted: Shape
    rows: Shape
    out_axes: Shape
    d_in: int
    d_out: int


@dataclasses.dataclass(eq=False)
class Use:
    """One equation in which a parameter view meets the data.

    Attributes:
      view: the parameter's entries: `stack + (d_in, d_out)` for a dense use.
      contraction: how they meet the data; None where no layer is recognised.
      reason: where the use is, or why it is no layer.
      rows: number of examples x positions of the input.
      examples: the size of the leading row axis.
      loops: the scans around the use, outermost first.
      bias: the parameter added to the output, `stack + (d_out,)`.
      layer: the name of the layer the use was assigned to.
    """

    view: View
    contraction: Contraction | None
    reason: str
    rows: int = 0
    examples: int = 0
    loops: tuple[Any, ...] = ()
    bias: View | None = None
    layer: str | None = None


@dataclasses.dataclass(frozen=True)
class LossTag:
    """A tagged output loss in the model.

    Attributes:
      name: the loss function's name.
      loss: the family.
      z: shape and dtype of the network's output at the tag (in one iteration of a scan).
      lead: lengths of the scans around the tag, outermost first.
      location: the user's line.
    """

    name: str
    loss: OutputLoss
    z: Any
    lead: Shape
    location: str

    @property
    def columns(self) -> int:
        """Entries of z per example and scan step: the columns of the exact square root."""
        units = len(self.z.shape) - self.loss.event_ndim
        size = 1
        for n in self.z.shape[1:] if units else self.z.shape:
            size *= n
        return size


@dataclasses.dataclass(eq=False)
class Step:
    """One equation and what to do with it.

    Attributes:
      equation: the equation.
      cut: for each operand, whether `stop_gradient` cuts it off (see `flow`).
      call: what the equation runs, with one plan per body in `bodies`; None: bind it.
      use: the parameter use this equation is.
      loss: the index of the tagged loss this equation is.
      stacked: names of the layers whose statistics a scan stacks, one per iteration.
      losses: indices of the losses inside a scan.
    """

    equation: _jax.Equation
    cut: tuple[bool, ...]
    call: _jax.Call | None = None
    bodies: tuple[Plan, ...] = ()
    use: Use | None = None
    loss: int | None = None
    stacked: tuple[str, ...] = ()
    losses: tuple[int, ...] = ()


@dataclasses.dataclass(eq=False)
class Plan:
    """The steps of one jaxpr."""

    jaxpr: _jax.Jaxpr
    steps: list[Step]

    def walk(self) -> Iterator[Step]:
        """All steps, at any depth."""
        for step in self.steps:
            yield step
            for body in step.bodies:
                yield from body.walk()


def settle(plan: Plan) -> bool:
    """Fixes the plan once layers are named; whether anything in it differs from plain evaluation.

    A call in which nothing happens is bound whole, so that it keeps its own rules (`custom_jvp`).
    """
    active = False
    for step in plan.steps:
        if step.call is not None:
            if any([settle(body) for body in step.bodies]):
                inside = [s for body in step.bodies for s in body.walk()]
                step.losses = tuple(s.loss for s in inside if s.loss is not None)
                step.stacked = tuple(
                    sorted(
                        {
                            s.use.layer
                            for s in inside
                            if s.use and s.use.layer and id(step.equation) in s.use.view.stack
                        }
                    )
                )
                active = True
            else:
                step.call, step.bodies = None, ()
        active |= bool(step.loss is not None or any(step.cut) or (step.use and step.use.layer))
    return active
