"""Data times a weight that is computed from parameters, one parameter at a time.

Each function gives what an equation between data and a computed weight gives, or None where the
weight's factors do not meet the data in turn.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from curvature import _jax
from curvature.trace.environment import Ragged
from curvature.trace.weights import Factor, Label, Labels, Term, Weight, merged


def dot(equation: _jax.Equation, x: jax.Array, weight: Weight, side: int) -> jax.Array | None:
    """`lax.dot_general` of data with a computed weight, term by term and factor by factor."""
    contracted, kept = equation.params["dimension_numbers"]
    mine, others = contracted[1 - side], contracted[side]
    kept_mine, kept_others = kept[1 - side], kept[side]
    groups: list[Labels] = [(Label(n),) if n != 1 else () for n in x.shape]
    for a, b in zip((*mine, *kept_mine), (*others, *kept_others), strict=True):
        groups[a] = weight.axes[b]
    free = [g for a, g in enumerate(groups) if a not in (*mine, *kept_mine)]
    of_weight = [g for a, g in enumerate(weight.axes) if a not in (*others, *kept_others)]
    out = [weight.axes[b] for b in kept_others]
    out += [*free, *of_weight] if side == 1 else [*of_weight, *free]
    flat = [label for group in out for label in group]
    labels = tuple(label for group in groups for label in group)
    start = _Labelled(x.reshape([label.size for label in labels]), labels)
    shape, dtype = equation.outvars[0].aval.shape, equation.outvars[0].aval.dtype
    precision = equation.params["precision"]
    total = None
    for term in [t for one in weight.terms for t in _by_product_rule(start, one, flat)]:
        y = _chain(start, term, flat, precision)
        if y is None:
            return None
        array = _times(y.ordered(flat), term.number).reshape(shape).astype(dtype)
        total = array if total is None else total + array
    return total


def _by_product_rule(x: _Labelled, term: Term, out: Sequence[Label]) -> list[Term]:
    """A term in terms with one parameter each, where its parameters meet entry by entry.

    w u is w [u] + [w] u - [w u], what is in brackets held constant: the same value and derivatives.
    """
    trained = [f for f in term.factors if f.sources]
    if len(trained) < 2 or _order(x.labels, term, out) is not None:
        return [term]
    return _by_turns(term, trained)


def _one_kernel(term: Term, outputs: set[Label]) -> list[Term]:
    """A term in terms with one trained kernel each."""
    trained = [f for f in term.factors if f.sources and not set(f.labels) <= outputs]
    return [merged(term)] if len(trained) < 2 else _by_turns(term, trained)


def _by_turns(term: Term, trained: Sequence[Factor]) -> list[Term]:
    """A term as a sum of terms in which one of some factors is not held constant, and one more."""

    def fixed(kept: Factor | None) -> Term:
        factors = (f.constant() if f in trained and f is not kept else f for f in term.factors)
        return merged(dataclasses.replace(term, factors=tuple(factors)))

    rest = fixed(None)
    number = -rest.number * (len(trained) - 1)
    return [*(fixed(f) for f in trained), dataclasses.replace(rest, number=number)]


@dataclasses.dataclass(frozen=True, eq=False)
class _Labelled:
    """Data with labelled axes."""

    array: jax.Array
    labels: Labels

    def ordered(self, labels: Sequence[Label]) -> jax.Array:
        """With its axes in this order, repeated along labels that it does not have."""
        present = [x for x in labels if x in self.labels]
        array = self.array.transpose([self.labels.index(x) for x in present])
        axes = tuple(i for i, x in enumerate(labels) if x in self.labels)
        return jax.lax.broadcast_in_dim(array, [x.size for x in labels], axes)

    def summed(self, keep: set[Label]) -> _Labelled:
        """Summed over all labels but some."""
        axes = tuple(i for i, x in enumerate(self.labels) if x not in keep)
        if not axes:
            return self
        return _Labelled(self.array.sum(axes), tuple(x for x in self.labels if x in keep))


def _order(data: Sequence[Label], term: Term, out: Sequence[Label]) -> list[Factor] | None:
    """In which order data meets the factors; None where two of them meet entry by entry.

    First comes what has no label that the data has not, and is no sum: a gain of inputs. Then what
    is summed over some label; last what has nothing in common with the data.
    """
    left, order, labels = list(term.factors), [], set(data)
    while left:
        ranks = {}
        for factor in left:
            others = {*out, *(label for f in left if f is not factor for label in f.labels)}
            summed, new = set(factor.labels) - others, (set(factor.labels) & others) - labels
            apart = not labels & set(factor.labels)
            ranks[factor] = 0 if not (summed or new) else 1 if summed else 2 if apart else 3
        factor = min(left, key=ranks.__getitem__)
        if ranks[factor] > 1 and 3 in ranks.values():
            return None
        left.remove(factor)
        order.append(factor)
        kept = {*out, *(label for f in left for label in f.labels)}
        labels = (labels | set(factor.labels)) & kept
    return order


def _chain(x: _Labelled, term: Term, out: Sequence[Label], precision: Any) -> _Labelled | None:
    """Data times one factor after the other; None where two of them meet entry by entry."""
    order = _order(x.labels, term, out)
    if order is None:
        return None
    for i, factor in enumerate(order):
        others = {*out, *(label for f in order[i + 1 :] for label in f.labels)}
        x = x.summed({*others, *factor.labels})
        summed = [label for label in factor.labels if label not in others]
        if summed:
            x = _product(x, factor, summed, precision)
        else:
            x = _gain(_repeated(x, factor.labels), factor)
    return x.summed(set(out))


def _repeated(x: _Labelled, labels: Sequence[Label]) -> _Labelled:
    """Data repeated along labels that it does not have."""
    wide = (*x.labels, *(label for label in labels if label not in x.labels))
    return _Labelled(x.ordered(wide), wide)


def _gain(x: _Labelled, factor: Factor) -> _Labelled:
    """Data times a factor all of whose labels it has, and keeps."""
    y = _Labelled(factor.array, factor.labels)
    present = [label for label in x.labels if label in factor.labels]
    shape = [label.size if label in factor.labels else 1 for label in x.labels]
    gain = y.ordered(present).reshape(shape)
    return _Labelled(_both(x.array, gain, lambda x, g: x * g), x.labels)


def _product(x: _Labelled, factor: Factor, summed: Sequence[Label], precision: Any) -> _Labelled:
    """Data times a factor, summed over labels: repeated along those that it does not have."""
    x = _repeated(x, summed)
    kept = [label for label in x.labels if label in factor.labels and label not in summed]
    mine = [[x.labels.index(label) for label in labels] for labels in (summed, kept)]
    others = [[factor.labels.index(label) for label in labels] for labels in (summed, kept)]

    def dot(x: jax.Array, w: jax.Array) -> jax.Array:
        shift = x.ndim - len(labels)  # parts of a complex number are in front
        first, second = ([a + shift for a in axes] for axes in mine)
        pairs = (first, others[0]), (second, others[1])
        y = jax.lax.dot_general(x, w, pairs, precision=precision)
        return jnp.moveaxis(y, len(kept), 0) if shift else y

    whole = _jax.undivided(factor.array, others[0])
    labels = x.labels
    free = [label for label in x.labels if label not in (*summed, *kept)]
    free += [label for label in factor.labels if label not in (*summed, *kept)]
    return _Labelled(_both(x.array, whole, dot), (*kept, *free))


def _both(x: jax.Array, w: jax.Array, function: Callable[..., jax.Array]) -> jax.Array:
    """A bilinear function of data and a factor; of the parts of complex data and a real factor."""
    if jnp.iscomplexobj(w):
        return function(x.astype(w.dtype), w)
    if not jnp.iscomplexobj(x):
        return function(x, w.astype(x.dtype))
    parts = jnp.stack([x.real, x.imag])
    y = function(parts, w.astype(parts.dtype))
    return jax.lax.complex(y[0], y[1])


def _times(x: jax.Array, number: complex) -> jax.Array:
    if number == 1:
        return x
    if number.imag == 0:
        return x * jnp.asarray(number.real, x.dtype)
    dtype = jnp.result_type(x.dtype, jnp.complex64) if not jnp.iscomplexobj(x) else x.dtype
    return x.astype(dtype) * jnp.asarray(number, dtype)


def convolution(equation: _jax.Equation, x: jax.Array, weight: Weight) -> jax.Array | None:
    """A convolution whose kernel has gains for outputs, or is a sum of kernels.

    Kernels that meet entry by entry (a gain for each position) do so by the product rule.
    """
    numbers = equation.params["dimension_numbers"]
    outputs = set(weight.axes[numbers.rhs_spec[0]])
    flat = tuple(label for axis in weight.axes for label in axis)
    if not all(term.labels <= set(flat) for term in weight.terms):
        return None
    total = None
    for term in [t for one in weight.terms for t in _one_kernel(one, outputs)]:
        kernels = [f for f in term.factors if not set(f.labels) <= outputs]
        gains = [f for f in term.factors if f not in kernels]
        kernel = math.prod((_wide(f, flat) for f in kernels), start=jnp.ones((), x.dtype))
        array = jnp.broadcast_to(kernel, [x.size for x in flat]).reshape(weight.shape)
        (y,) = _jax.unplaced(equation, [x, array.astype(x.dtype)])
        axis, labels = numbers.out_spec[1], weight.axes[numbers.rhs_spec[0]]
        for gain in gains:
            whole = _Labelled(gain.array, gain.labels).ordered(labels).reshape(-1)
            shape = [-1 if a == axis else 1 for a in range(y.ndim)]
            y = y * whole.astype(y.dtype).reshape(shape)
        y = _times(y, term.number)
        total = y if total is None else total + y
    return total


def lookup(equation: _jax.Equation, weight: Weight, indices: jax.Array) -> jax.Array | None:
    """Rows of a computed table: of each factor that has rows, then times those that have none."""
    numbers, params = equation.params["dimension_numbers"], equation.params
    batch, rest = indices.shape[:-1], weight.axes[1:]
    trailing = tuple(range(len(batch), len(batch) + len(rest)))
    whole = (1, *weight.shape[1:]) == tuple(params["slice_sizes"])
    first = (numbers.collapsed_slice_dims, numbers.start_index_map) == ((0,), (0,))
    if not (whole and first and numbers.offset_dims == trailing):
        return None
    rows, leading = weight.axes[0], tuple(Label(n) for n in batch)
    flat = [*leading, *(label for axis in rest for label in axis)]

    def taken(factor: Factor) -> _Labelled:
        others = [label for label in factor.labels if label not in rows]
        table = _Labelled(factor.array, factor.labels).ordered([*rows, *others])
        table = table.reshape([-1, *(label.size for label in others)])
        found = table.at[indices[..., 0]].get(mode=params["mode"])
        return _Labelled(found, (*leading, *others))

    total = None
    for term in weight.terms:
        with_rows = [f for f in term.factors if set(f.labels) & set(rows)]
        trained = [f for f in with_rows if f.sources]
        if len(trained) != 1 or not rows:
            return None
        x = taken(trained[0])
        for factor in with_rows:
            if factor is not trained[0]:  # a norm of each row
                part = taken(factor)
                if not set(part.labels) <= set(x.labels):
                    return None
                x = _gain(x, Factor(part.array, part.labels))
        left = tuple(f for f in term.factors if f not in with_rows)
        y = _chain(x, dataclasses.replace(term, factors=left), flat, None)
        if y is None:
            return None
        array = _times(y.ordered(flat), term.number)
        total = array if total is None else total + array
    shape, dtype = equation.outvars[0].aval.shape, equation.outvars[0].aval.dtype
    return None if total is None else total.reshape(shape).astype(dtype)


def scaled(x: jax.Array, weight: Weight) -> jax.Array | None:
    """Data times sums of products of parameters, entry by entry."""
    flat = tuple(label for axis in weight.axes for label in axis)
    start = _flattened(x, weight)
    total = None
    for term in weight.terms:
        y = start
        for part in _parts(term, flat):
            rows = _repeating(part, flat)
            if rows is None:
                return None
            y = _gain(y, rows)
        array = _times(y.array, term.number)
        total = array if total is None else total + array
    return None if total is None else total.reshape(weight.shape)


def shifted(x: jax.Array, weight: Weight) -> jax.Array | None:
    """Data plus sums of products of parameters, entry by entry."""
    flat = tuple(label for axis in weight.axes for label in axis)
    total = _flattened(x, weight)
    for term in weight.terms:
        rows = None
        for part in _parts(term, flat):
            made = _repeating(part, flat)
            if made is None or (rows is not None and len(part) == 1 and part[0].sources):
                return None  # a product of parameters alone, which no data meets in turn
            rows = _wide(made, flat) if rows is None else rows * _wide(made, flat)
        if rows is None:
            return None
        total = dataclasses.replace(
            total, array=total.array + _times(rows.astype(total.array.dtype), term.number)
        )
    return total.array.reshape(weight.shape)


def _flattened(x: jax.Array, weight: Weight) -> _Labelled:
    """Data with an axis for each label of a weight of its shape."""
    flat = tuple(label for axis in weight.axes for label in axis)
    x = jnp.broadcast_to(x, weight.shape)
    return _Labelled(x.reshape([label.size for label in flat]), flat)


def _wide(factor: Factor, flat: Labels) -> jax.Array:
    """A factor with an axis for every label, of size one where it has none."""
    present = [label for label in flat if label in factor.labels]
    shape = [label.size if label in factor.labels else 1 for label in flat]
    return _Labelled(factor.array, factor.labels).ordered(present).reshape(shape)


def _parts(term: Term, flat: Labels) -> list[list[Factor]]:
    """The factors in groups that no label which is summed over connects."""
    groups: list[tuple[set[Label], list[Factor]]] = []
    for factor in term.factors:
        summed, members = set(factor.labels) - set(flat), [factor]
        for group in [g for g in groups if g[0] & summed]:
            groups.remove(group)
            summed, members = summed | group[0], [*group[1], *members]
        groups.append((summed, members))
    return [members for _, members in groups]


def _repeating(factors: list[Factor], flat: Labels) -> Factor | None:
    """A product that does not see the data, once for every example: a layer with equal rows.

    So are derivatives in directions that are the same for all (`e_i @ w`), and learned queries.
    """
    if len(factors) == 1:
        return factors[0] if set(factors[0].labels) <= set(flat) else None
    known = {label for factor in factors for label in factor.labels}
    beside = [label for label in flat if label not in known]
    for first in sorted(factors, key=lambda f: len(f.sources)):  # a constant, if there is one
        rest = Term(tuple(f for f in factors if f is not first))
        x = _repeated(_Labelled(first.array, first.labels), beside)
        y = _chain(x, rest, flat, None)
        if y is not None:
            return Factor(y.array, y.labels)
    return None


def ragged(equation: _jax.Equation, values: list[Any]) -> jax.Array | None:
    """`lax.ragged_dot`: rows in a row for each group, as a product with all groups and a mask."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    x, w, sizes = values
    standard = (numbers.dot_dimension_numbers, tuple(numbers.lhs_ragged_dimensions))
    if standard != ((((1,), (1,)), ((), ())), (0,)) or tuple(numbers.rhs_group_dimensions) != (0,):
        return None
    ends = jnp.cumsum(sizes)
    group = jnp.searchsorted(ends, jnp.arange(x.shape[0], dtype=ends.dtype), side="right")
    mask = jax.nn.one_hot(group, w.shape[0], dtype=x.dtype, axis=0)[..., None]
    pairs = (((2,), (1,)), ((0,), (0,)))
    rows = checkpoint_name(mask * x[None], Ragged.NAME)
    y = jax.lax.dot_general(rows, w, pairs, precision=equation.params["precision"])
    return (mask * y).sum(0).astype(equation.outvars[0].aval.dtype)
