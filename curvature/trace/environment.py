"""What is known of the variables of one jaxpr while it is walked."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from curvature._jax import Jaxpr, Literal
from curvature.trace.layouts import Batch, Examples
from curvature.trace.program import Use
from curvature.trace.views import Shape, View


@dataclasses.dataclass(frozen=True)
class Wide:
    """`broadcast_in_dim(view, shape, axes)`: a view repeated along new axes."""

    view: View
    shape: Shape
    axes: Shape


@dataclasses.dataclass(frozen=True)
class Product:
    """The output of a contraction with a parameter, moved but not otherwise touched."""

    use: Use
    view: View


@dataclasses.dataclass(frozen=True)
class OneHot:
    """Data with a single one along its last axis."""


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Rows of data for each of several members, zero but for the one to which each belongs."""

    NAME = "curvature_ragged"  # such rows are named so (`jax.ad_checkpoint.checkpoint_name`)


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """A value that does not depend on any input, such as an `arange`."""

    value: np.ndarray


# What a variable is: a parameter (View, Wide), or data (None) with something worth knowing.
Value = View | Wide | Product | OneHot | Ragged | Known | None


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is known of a jaxpr's inputs, one entry each.

    Attributes:
      values: what they are.
      after: whether they depend on a tagged loss.
      varies: whether they depend on the data (the loss function's arguments after the parameters).
      first: see `Environment.first`.
      closure: whether the data is in the jaxpr's constants, and not in such arguments.
      batches: how many examples there are, and how many more the jaxpr's twin has; the first are
        those of the main batch.
    """

    values: Sequence[Value]
    after: Sequence[bool]
    varies: Sequence[bool]
    first: Sequence[bool]
    closure: bool = False
    batches: tuple[Examples, ...] = (Examples(1),)


# What may change the order along an axis of its first operand.
_MOVES = ("concatenate", "dynamic_slice", "dynamic_update_slice", "gather", "pad", "rev")
_REORDERS = ("scatter", "scatter-add", "slice", "sort", "top_k", *_MOVES)


class Environment:
    """The variables of one jaxpr.

    The batch axis of a value is where its shape differs in the jaxpr's *twin*, the trace of the
    same function with more examples. Without a twin, it is an axis of the batch's size of what
    depends on the data, or else the leading one.
    """

    def __init__(
        self,
        jaxpr: Jaxpr,
        twin: Jaxpr | None,
        inputs: Inputs,
        live: Sequence[bool],
        out_live: Sequence[bool],
    ) -> None:
        """Starts an environment; `live` and `out_live` as in `liveness.reaches_loss`."""
        self._values: dict[Any, Value] = dict(zip(jaxpr.invars, inputs.values, strict=True))
        for variable, const in zip(jaxpr.constvars, jaxpr.consts, strict=True):
            if isinstance(const, np.ndarray):
                self._values[variable] = Known(const)
        self._after = _chosen(jaxpr.invars, inputs.after)
        self._varies = _chosen(jaxpr.invars, inputs.varies)
        self._first = _chosen(jaxpr.invars, inputs.first)
        self.batches, self.examples = inputs.batches, inputs.batches[0].number
        self.closure = inputs.closure
        if inputs.closure:
            self._varies |= {v for v in jaxpr.constvars if self.examples in _shape(v)}
        self._twins: dict[Any, Shape] | None = None
        if twin is not None:
            self._twins = dict(zip(jaxpr.invars, map(_shape, twin.invars), strict=True))
            for mine, other in zip(jaxpr.equations, twin.equations, strict=True):
                self._twins.update(zip(mine.outvars, map(_shape, other.outvars), strict=True))
        self._readers: collections.Counter[Any] = collections.Counter()
        for equation, keep in zip(jaxpr.equations, live, strict=True):
            if keep:
                self._readers.update(v for v in equation.invars if not isinstance(v, Literal))
        self._readers.update(_chosen(jaxpr.outvars, out_live))

    def sole(self, variable: Any) -> Value:
        """What a variable is; a product only for its sole reader, who may add a bias to it."""
        if isinstance(variable, Literal):
            return Known(np.asarray(variable.val))
        value = self._values.get(variable)
        return None if isinstance(value, Product) and self._readers[variable] > 1 else value

    def after(self, variable: Any) -> bool:
        """Whether a value depends on a tagged loss."""
        return not isinstance(variable, Literal) and variable in self._after

    def varies(self, variable: Any) -> bool:
        """Whether a value depends on the data."""
        return not isinstance(variable, Literal) and variable in self._varies

    def is_live(self, variable: Any) -> bool:
        """Whether something reads a variable that a tagged loss depends on."""
        return self._readers[variable] > 0

    def batch(self, variable: Any) -> Batch | None:
        """The batch axis of a value, None where it has none."""
        if isinstance(variable, Literal):
            return None
        shape = _shape(variable)
        if self._twins is None:
            if variable not in self._varies:
                return None
            return self._guessed(shape, first=variable in self._first)
        other = self._twins.get(variable, shape)
        for axis, (n, more) in enumerate(zip(shape, other, strict=True)):
            if n != more:
                each = next((e for b in self.batches if (e := b.along(n, more))), 0)
                if not each:  # pairs of examples, or a part of them, are no examples
                    return Batch(axis, max(abs(more - n) // self.batches[0].more, 1), first=False)
                return Batch(axis, each, each == 1 or variable in self._first)
        return None

    def _guessed(self, shape: Shape, *, first: bool) -> Batch | None:
        if self.examples in shape:
            return Batch(shape.index(self.examples))
        if shape and shape[0] > self.examples and shape[0] % self.examples == 0:
            return Batch(0, shape[0] // self.examples, first)
        return Batch(0) if shape and shape[0] > 1 else None

    @property
    def guesses(self) -> bool:
        """Whether batch axes are guessed from sizes, for want of a twin."""
        return self._twins is None

    def first(self, variable: Any) -> bool:
        """Whether a batch axis that is more than examples (flattened positions) has them first."""
        return not isinstance(variable, Literal) and variable in self._first

    def put_first(self, variables: Sequence[Any], first: Sequence[bool]) -> None:
        """Notes `first` of variables."""
        self._first |= _chosen(variables, first)

    def order(self, equation: Any) -> None:
        """Notes `first` of the outputs of an equation that is no call."""
        batches = [(v, self.batch(v)) for v in equation.invars]
        known = [(v, batch) for v, batch in batches if batch is not None]
        for out in equation.outvars:
            batch = self.batch(out)
            if batch is None or batch.each == 1:
                continue
            if equation.primitive.name == "reshape" and known:
                ((v, old),) = known
                before = math.prod(_shape(v)[: old.axis]) == math.prod(_shape(out)[: batch.axis])
                first = old.first and before
            else:
                moved = (
                    equation.primitive.name in _REORDERS and bool(known) and known[0] == batches[0]
                )
                first = not moved and all(b.each == batch.each and b.first for _, b in known)
            self.put_first([out], [first])

    def define(self, variables: Sequence[Any], values: Sequence[Value]) -> None:
        """Notes what variables are."""
        self._values.update(zip(variables, values, strict=True))

    def mark(self, variables: Sequence[Any], after: Sequence[bool], varies: Sequence[bool]) -> None:
        """Notes which variables depend on a loss, and which on the data."""
        self._after |= _chosen(variables, after)
        self._varies |= _chosen(variables, varies)


def _chosen(variables: Sequence[Any], chosen: Sequence[bool]) -> set[Any]:
    pairs = zip(variables, chosen, strict=True)
    return {v for v, keep in pairs if keep and not isinstance(v, Literal)}


def _shape(variable: Any) -> Shape:
    return tuple(getattr(variable.aval, "shape", ()))
