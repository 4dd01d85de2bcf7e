"""Weights that are computed from parameters, as sums of products.

A weight `W = a @ b * g + u` is never a parameter itself. It is a sum of *terms*; a term is a number
times the product of *factors*, arrays whose axes are labelled as in an einsum. An axis of the
weight is a group of such labels, row-major, so that reshapes only regroup them; a label of a factor
that no axis of the weight has is summed over; an axis whose label no factor has repeats.

So `x @ W` can be written with one parameter at a time (`respell`). Each function takes and
returns `Weight`s, and returns None where the result is no such sum.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from curvature.trace.views import Shape

_MOST_TERMS, _MOST_FACTORS = 4, 6  # of what somebody writes down


@dataclasses.dataclass(frozen=True, eq=False)
class Label:
    """An index that runs over `size` values; two labels are the same if they are one object."""

    size: int


Labels = tuple[Label, ...]
Renaming = Mapping[Label, Labels]


@dataclasses.dataclass(frozen=True, eq=False)
class Factor:
    """An array with labelled axes.

    Attributes:
      array: the array.
      labels: one for each axis, all different.
      sources: the numbers of the parameters it depends on; none for a constant.
      plain: whether its entries are a parameter's entries, moved or cast.
    """

    array: jax.Array
    labels: Labels
    sources: frozenset[int] = frozenset()
    plain: bool = False

    def constant(self) -> Factor:
        """The same without derivative."""
        return Factor(jax.lax.stop_gradient(self.array), self.labels)

    def renamed(self, names: Renaming) -> Factor:
        """With labels in the place of labels; of several, each has an axis of its own."""
        groups = [names.get(label, (label,)) for label in self.labels]
        labels = tuple(label for group in groups for label in group)
        array = self.array
        if len(labels) > len(self.labels):
            array = array.reshape([label.size for label in labels])
        return dataclasses.replace(self, array=array, labels=labels)


@dataclasses.dataclass(frozen=True, eq=False)
class Term:
    """A number times the product of factors."""

    factors: tuple[Factor, ...]
    number: complex = 1.0

    def renamed(self, names: Renaming) -> Term:
        """See `Factor.renamed`."""
        return dataclasses.replace(self, factors=tuple(f.renamed(names) for f in self.factors))

    @property
    def labels(self) -> set[Label]:
        """The labels of all factors."""
        return {label for factor in self.factors for label in factor.labels}


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A sum of terms, each an array with these axes."""

    axes: tuple[Labels, ...]
    terms: tuple[Term, ...]

    @classmethod
    def of(cls, array: jax.Array, sources: frozenset[int], *, plain: bool = False) -> Weight:
        """The weight that is an array as it is."""
        axes = tuple((Label(n),) if n != 1 else () for n in array.shape)
        labels = tuple(label for axis in axes for label in axis)
        factor = Factor(array.reshape([x.size for x in labels]), labels, sources, plain)
        return cls(axes, (Term((factor,)),))

    @property
    def shape(self) -> Shape:
        """The shape of the array."""
        return tuple(math.prod(label.size for label in axis) for axis in self.axes)

    @property
    def sources(self) -> frozenset[int]:
        """The numbers of the parameters that it depends on."""
        return frozenset().union(*(f.sources for t in self.terms for f in t.factors))

    @property
    def computed(self) -> bool:
        """Whether it is anything but one array with moved axes and a number in front."""
        if len(self.terms) != 1 or len(self.terms[0].factors) != 1:
            return True
        (factor,) = self.terms[0].factors
        return set(factor.labels) != {label for axis in self.axes for label in axis}

    def renamed(self, names: Renaming) -> Weight:
        """See `Factor.renamed`."""
        axes = tuple(_regrouped(axis, names) for axis in self.axes)
        return Weight(axes, tuple(term.renamed(names) for term in self.terms))

    def copied(self) -> Weight:
        """The same with labels of its own."""
        labels = {x for axis in self.axes for x in axis}.union(*(t.labels for t in self.terms))
        return self.renamed({label: (Label(label.size),) for label in labels})

    def mapped(self, function: Callable[[jax.Array], jax.Array]) -> Weight:
        """With a function of every factor's array, such as a cast."""
        terms = [
            dataclasses.replace(
                t, factors=tuple(dataclasses.replace(f, array=function(f.array)) for f in t.factors)
            )
            for t in self.terms
        ]
        return dataclasses.replace(self, terms=tuple(terms))

    def times(self, number: complex) -> Weight:
        """Multiplied by a number."""
        terms = [dataclasses.replace(t, number=t.number * number) for t in self.terms]
        return dataclasses.replace(self, terms=tuple(terms))

    @property
    def alone(self) -> Factor | None:
        """The only factor, where it is no more than that, repeated along axes."""
        if len(self.terms) != 1 or len(self.terms[0].factors) != 1 or self.terms[0].number != 1:
            return None
        (factor,) = self.terms[0].factors
        return factor if set(factor.labels) <= {x for axis in self.axes for x in axis} else None

    def replaced(self, array: jax.Array) -> Weight:
        """With another array in the place of the only factor, computed from it."""
        assert self.alone is not None
        factor = dataclasses.replace(self.alone, array=array, plain=False)
        return dataclasses.replace(self, terms=(Term((factor,)),))

    def whole(self, array: jax.Array, sources: frozenset[int]) -> Weight:
        """What an elementwise function makes of it, as one factor: `array`, of the same shape."""
        known = set().union(*(t.labels for t in self.terms))
        labels = [x for axis in self.axes for x in axis]
        array = array.reshape([x.size for x in labels])
        array = array[tuple(slice(None) if x in known else 0 for x in labels)]
        factor = Factor(array, tuple(x for x in labels if x in known), sources)
        return Weight(self.axes, (Term((factor,)),))


def _regrouped(labels: Labels, names: Renaming) -> Labels:
    return tuple(new for label in labels for new in names.get(label, (label,)))


def reshaped(weight: Weight, shape: Shape) -> Weight | None:
    """`lax.reshape`."""
    if 0 in shape:
        return None
    queue = [label for axis in weight.axes for label in axis]
    names: dict[Label, Labels] = {}
    axes: list[Labels] = []
    for size in shape:
        group: list[Label] = []
        while (have := math.prod(x.size for x in group)) < size:
            label = queue.pop(0)
            need = size // have
            if label.size > need:
                if label.size % need or size % have:
                    return None
                parts = Label(need), Label(label.size // need)
                names[label] = parts
                queue.insert(0, parts[1])
                label = parts[0]
            group.append(label)
        if have != size:
            return None
        axes.append(tuple(group))
    names = _settled(names)
    return Weight(tuple(axes), tuple(term.renamed(names) for term in weight.terms))


def _settled(names: Renaming) -> dict[Label, Labels]:
    """Renamings applied to themselves: labels that were split once more."""

    def settle(label: Label) -> Labels:
        return tuple(x for new in names[label] for x in settle(new)) if label in names else (label,)

    return {label: settle(label) for label in names}


def transposed(weight: Weight, permutation: Sequence[int]) -> Weight:
    """`lax.transpose`."""
    return Weight(tuple(weight.axes[p] for p in permutation), weight.terms)


def broadcast(weight: Weight, shape: Shape, axes: Sequence[int]) -> Weight:
    """`lax.broadcast_in_dim`."""
    old = dict(zip(axes, zip(weight.axes, weight.shape, strict=True), strict=True))
    new: list[Labels] = []
    for a, size in enumerate(shape):
        labels, have = old.get(a, ((), 1))
        new.append(labels if have == size else (Label(size),))
    return Weight(tuple(new), weight.terms)


def tiled(weight: Weight, times: Sequence[int]) -> Weight:
    """`lax.tile`."""
    pairs = zip(times, weight.axes, strict=True)
    axes = tuple((Label(n), *axis) if n > 1 else axis for n, axis in pairs)
    return Weight(axes, weight.terms)


def summed(weight: Weight, axes: Sequence[int]) -> Weight:
    """`lax.reduce_sum` over axes."""
    gone = {label for a in axes for label in weight.axes[a]}
    kept = tuple(axis for a, axis in enumerate(weight.axes) if a not in axes)
    terms = []
    for term in weight.terms:
        times = math.prod(label.size for label in gone - term.labels)
        terms.append(dataclasses.replace(term, number=term.number * times))
    return Weight(kept, tuple(terms))


def added(one: Weight, other: Weight) -> Weight | None:
    """The sum of two weights of one shape."""
    pair = _aligned(one, other, [(a, a) for a in range(len(one.axes))])
    return None if pair is None else _few(pair[0].axes, [*pair[0].terms, *pair[1].terms])


def multiplied(one: Weight, other: Weight) -> Weight | None:
    """The product, entry by entry, of two weights of one shape."""
    pair = _aligned(one, other, [(a, a) for a in range(len(one.axes))])
    return None if pair is None else _few(pair[0].axes, _products(*pair))


def contracted(
    one: Weight,
    other: Weight,
    summed: Sequence[tuple[int, int]],
    kept: Sequence[tuple[int, int]],
) -> Weight | None:
    """`lax.dot_general`, from pairs of axes that are summed over and that are batch axes."""
    pair = _aligned(one, other, [*summed, *kept])
    if pair is None:
        return None
    one, other = pair
    gone = {label for a, _ in summed for label in one.axes[a]}
    free = [x for a, x in enumerate(one.axes) if a not in {p[0] for p in (*summed, *kept)}]
    free += [x for a, x in enumerate(other.axes) if a not in {p[1] for p in (*summed, *kept)}]
    terms = []
    for term in _products(one, other):
        times = math.prod(label.size for label in gone - term.labels)
        terms.append(dataclasses.replace(term, number=term.number * times))
    return _few((*(one.axes[a] for a, _ in kept), *free), terms)


def _few(axes: tuple[Labels, ...], terms: Sequence[Term]) -> Weight | None:
    if len(terms) > _MOST_TERMS or any(len(t.factors) > _MOST_FACTORS for t in terms):
        return None
    return Weight(axes, tuple(terms))


def _products(one: Weight, other: Weight) -> list[Term]:
    return [
        Term((*a.factors, *b.factors), a.number * b.number) for a in one.terms for b in other.terms
    ]


def _aligned(
    one: Weight, other: Weight, pairs: Sequence[tuple[int, int]]
) -> tuple[Weight, Weight] | None:
    """Two weights whose axes have the same labels in pairs, and that share no others."""
    one, other = one.copied(), other.copied()
    for a, b in pairs:
        names = common(one.axes[a], other.axes[b])
        if names is None:
            return None
        one, other = one.renamed(names), other.renamed(names)
    return one, other


def common(one: Labels, other: Labels) -> Renaming | None:
    """What to call the labels of two groups of the same size, so that the groups are the same."""
    left, right = list(one), list(other)
    names: dict[Label, Labels] = {}
    while left and right:
        a, b = left.pop(0), right.pop(0)
        small, large, rest = (a, b, right) if a.size <= b.size else (b, a, left)
        if large.size % small.size:
            return None
        if large.size > small.size:
            head, tail = Label(small.size), Label(large.size // small.size)
            names[large] = head, tail
            rest.insert(0, tail)
            large = head
        if large is not small:
            names[large] = (small,)
    return None if left or right else _settled(names)


def evaluated(factors: Sequence[Factor], axes: set[Label]) -> Factor:
    """The product of constants as one, summed over labels that are not among `axes`."""
    numbers = {label: i for i, label in enumerate({x for f in factors for x in f.labels})}
    kept = tuple(label for label in numbers if label in axes)
    operands = [x for f in factors for x in (f.array, [numbers[label] for label in f.labels])]
    return Factor(jnp.einsum(*operands, [numbers[label] for label in kept]), kept)


def merged(term: Term) -> Term:
    """The term with constants multiplied into a factor that has all of their labels.

    A mask is no product of a gain for each input and one for each output.
    """
    factors = list(term.factors)
    for constant in [f for f in term.factors if not f.sources and len(f.labels) > 1]:
        others = [f for f in factors if f is not constant and set(constant.labels) <= set(f.labels)]
        if constant in factors and others:
            whole = max(others, key=lambda f: bool(f.sources))
            factors.remove(constant)
            factors[factors.index(whole)] = _product(whole, constant)
    return dataclasses.replace(term, factors=tuple(factors))


def _product(whole: Factor, part: Factor) -> Factor:
    kept = [label for label in whole.labels if label in part.labels]
    array = part.array.transpose([part.labels.index(label) for label in kept])
    array = array.reshape([x.size if x in part.labels else 1 for x in whole.labels])
    return dataclasses.replace(whole, array=whole.array * array)
