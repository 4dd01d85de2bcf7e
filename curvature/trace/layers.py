"""Layers: which parameters belong together, and the coordinates in which their block acts.

A layer's *block coordinates* are an array of shape

- `stack + (d_in [+ 1], d_out)` for a dense, convolutional or embedding layer; a bias is the last
  row (a homogeneous coordinate); the stack counts scanned copies, then members (experts, groups);
- the parameter's shape, without axes of size one, for scales and shifts;
- the parameter's own shape for a generic one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from curvature.blocks import BLOCKS
from curvature.precision import accumulator
from curvature.trace.layouts import Elementwise
from curvature.trace.program import Use
from curvature.trace.views import Shape, View

EXCLUDED = "excluded"


@dataclasses.dataclass(frozen=True)
class Layer:
    """Parameters that share one curvature block.

    Attributes:
      name: unique name, the path its parameters share.
      kind: `"dense"`, `"conv"`, `"embedding"`, `"scale"`, `"shift"` or `"generic"`.
      parameters: key paths of its parameters, as `jax.tree_util.keystr` prints them.
      block: one of `curvature.blocks.BLOCKS` that its kind can have, or `"excluded"`.
      reason: where the layer is in the user's code, or why it is generic.
      uses: number of equations in which it meets the data.
      views: the weight's entries that belong to the layer, and the bias's.
      stack: sizes of the axes of independent copies.
      shared: whether one copy is used several times (a recurrent or tied layer).
      batches: examples per use among its rows, of each batch that it is used on; `(1,)` where they
        cannot be told apart.
      one_hot: whether its input is one-hot, so that the input factor is diagonal.
      flipped: whether some uses are of the transposed weight (an embedding as output head).
      unbatched: whether some uses do not see the data, such as a layer of learned queries.
      meeting: where examples meet on the way from this layer to a tagged loss, as batch norm makes
        them; empty if nowhere. Rows of one example then hold something of every example's output.
      reached: whether a gradient of the loss reaches it at all: it does not reach what is unused,
        frozen, or a row of a table that is never read.
    """

    name: str
    kind: str
    parameters: tuple[str, ...]
    block: str
    reason: str
    uses: int
    views: tuple[View, ...]
    stack: Shape = ()
    shared: bool = False
    batches: tuple[int, ...] = (1,)
    one_hot: bool = False
    flipped: bool = False
    unbatched: bool = False
    meeting: str = ""
    reached: bool = True

    @property
    def leaves(self) -> tuple[View, ...]:
        """One view for each of `parameters`: of the leaf that is this parameter."""
        return one_per_leaf(self.views)

    @property
    def bias(self) -> bool:
        """Whether the last row of the block coordinates is a bias."""
        return len(self.views) == 2

    @property
    def shape(self) -> Shape:
        """The shape of the block coordinates."""
        first = self.views[0].shape
        return (*first[:-2], first[-2] + 1, first[-1]) if self.bias else first

    @property
    def structured(self) -> bool:
        """Whether the layer is known, not generic."""
        return self.kind != "generic"

    @property
    def pooled(self) -> bool:
        """Whether its block sees only cotangents of several examples, added up."""
        squares = self.block != EXCLUDED and BLOCKS[self.block].squares
        whole = not self.structured or self.unbatched or (squares and self.examples == 1)
        return self.uses > 0 and (whole or self.mixed)

    @property
    def mixed(self) -> bool:
        """Whether its rows see the outputs of other examples than their own."""
        return bool(self.meeting)

    @property
    def examples(self) -> int:
        """The examples of all batches, one after the other; 1 where they cannot be told apart."""
        return sum(self.batches)

    def placed(self, rows: jax.Array) -> jax.Array:
        """What each example of one batch has, among the examples of all; zero for the others."""
        if rows.shape[0] == self.examples:
            return rows
        start = sum(self.batches[: self.batches.index(rows.shape[0])])
        after = self.examples - start - rows.shape[0]
        return jnp.pad(rows, [(start, after), *[(0, 0)] * (rows.ndim - 1)])

    @property
    def apart(self) -> int:
        """Examples whose gradients can be told apart; 1 where the sum over all is what there is."""
        return 1 if self.mixed else self.examples

    @property
    def summed(self) -> bool:
        """Whether gradients are added up over rows, uses or devices before they are squared."""
        return self.shared or self.mixed

    @property
    def factored(self) -> bool:
        """Whether its block has Kronecker factors."""
        return self.block != EXCLUDED and BLOCKS[self.block].factored

    @property
    def outer(self) -> bool:
        """Whether its block keeps matrices over all of its coordinates."""
        return self.block != EXCLUDED and BLOCKS[self.block].outer

    @property
    def size(self) -> int:
        """Number of parameter entries in the layer."""
        return math.prod(self.shape)

    def gather(self, leaves: Sequence[jax.Array] | Mapping[int, jax.Array]) -> jax.Array:
        """The layer's block coordinates, at least float32, from the leaves of a tree."""
        dtype = accumulator(*(leaves[v.source].dtype for v in self.leaves))
        parts = [view.read(leaves, dtype) for view in self.views]
        if not self.bias:
            return parts[0]
        weight, bias = parts
        return jnp.concatenate([weight, bias[..., None, :]], axis=-2)

    def scatter(self, block: jax.Array) -> dict[int, jax.Array]:
        """Leaf-shaped arrays by leaf, from block coordinates; zero outside the layer's views."""
        if not self.bias:
            return self.views[0].write(block)
        weight, bias = self.views
        written = weight.write(block[..., :-1, :])
        for leaf, x in bias.write(block[..., -1, :]).items():  # they may be parts of one leaf
            written[leaf] = written[leaf] + x if leaf in written else x
        return written


def build(
    group: Sequence[Use], paths: Sequence[Any], suffix: str, numbers: frozenset[int]
) -> Layer:
    """The layer of uses of the same entries; `numbers` of examples are those of the batches."""
    use = group[0]
    assert use.layout is not None
    bias = next((u.bias for u in group if u.bias is not None), None)
    views = (use.view,) if bias is None else (use.view, bias)
    elementwise = isinstance(use.layout, Elementwise)
    kinds = [u.kind for u in group]
    order = ("embedding", "conv", "dense", "scale", "shift")
    outer = [s for u in group for s in u.loops if s not in u.view.stack]
    # Gradients of what does not see the data, and parts of those of one example, are on devices.
    divided = any(u.parts or (u.unbatched and u.local) for u in group)
    shared = len(group) > 1 or bool(outer) or divided
    batches = sorted({u.layout.examples for u in group if u.layout is not None}, reverse=True)
    # The gradients of a shared layer are summed over uses and then over devices, which have other
    # examples: there they cannot be told apart.
    apart = len(batches) == 1 or numbers.issuperset(batches)
    apart = apart and not (shared and any(u.local for u in group))
    return Layer(
        name=_name([paths[v.source] for v in one_per_leaf(views[:1])]) + suffix,
        kind=min(kinds, key=order.index),
        parameters=tuple(jax.tree_util.keystr(paths[v.source]) for v in one_per_leaf(views)),
        block="diagonal" if elementwise else "kronecker",
        reason=use.reason,
        uses=len(group),
        views=views,
        stack=use.view.stacked if elementwise else use.view.shape[:-2],
        shared=shared,
        batches=tuple(batches) if apart else (1,),
        one_hot=not elementwise and any(getattr(u.layout, "one_hot", False) for u in group),
        flipped=any(u.flipped for u in group),
        unbatched=any(u.unbatched for u in group),
        meeting=next((u.meeting for u in group if u.meeting), ""),
    )


def generic(
    path: Any, view: View, reason: str, uses: int, suffix: str = "", *, reached: bool = True
) -> Layer:
    """The layer of a parameter, or of some of its entries, without structure."""
    name, text = slashed(path) + suffix, jax.tree_util.keystr(path)
    return Layer(name, "generic", (text,), "diagonal", reason, uses, (view,), reached=reached)


def one_per_leaf(views: Sequence[View]) -> tuple[View, ...]:
    """The first view of every leaf that the views are made of."""
    first: dict[Any, View] = {}
    for view in views:
        for part in view.leaves():
            first.setdefault(part.source, part)
    return tuple(first.values())


def _name(paths: Sequence[Any]) -> str:
    """The path of a parameter; `cell/{hi,hf}/kernel` of joined ones."""
    names = [slashed(path).split("/") for path in paths]
    if len(names) == 1:
        return "/".join(names[0])
    head, tail = _common(names), _common([name[::-1] for name in names])
    tail = min(tail, min(map(len, names)) - head)
    middle = ["/".join(name[head : len(name) - tail]) for name in names]
    return "/".join(
        [*names[0][:head], f"{{{','.join(middle)}}}", *names[0][len(names[0]) - tail :]]
    )


def _common(names: Sequence[Sequence[str]]) -> int:
    """How many first entries all sequences share."""
    pairs = zip(*names, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, pairs))


def slashed(path: Any) -> str:
    """A key path with slashes; `parameters` for a tree that is a single array."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "parameters"
