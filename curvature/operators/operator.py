"""Symmetric linear operators on parameter trees, summed over a dataset one batch at a time.

An `Operator` is a lineax operator whose product is any Python function: here a loop over batches
around one compiled product per shape of batch. Solvers and Lanczos iterations therefore run in
Python as well (under `jax.disable_jit`), and only the products are compiled. This needs memory for
one batch only, compiles nothing anew for another batch or vector, and works for any iterable; its
price is some milliseconds of Python an iteration, and that the algorithms cannot be called inside
`jax.jit`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree

from curvature import _jax
from curvature.dataset import first_batch, shares
from curvature.meshes import automatic, divided_like, on_mesh, shape_of
from curvature.precision import accumulator
from curvature.trees import check_real, difference

PyTree = Any


class Operator(lx.AbstractLinearOperator):
    """A symmetric linear operator on trees of the parameters' structure.

    A lineax operator, for its solvers, with products by trees, `op @ v`. Sums and multiples of
    operators on the same trees are operators like these.

    Attributes:
      product: the function v -> A v.
      structure: shapes and dtypes of the parameters, as leaves and tree structure.
      semidefinite: whether A is known to be positive semi-definite.
    """

    product: Callable[[PyTree], PyTree] = dataclasses.field(metadata={"static": True})
    structure: Any = dataclasses.field(metadata={"static": True})
    semidefinite: bool = dataclasses.field(metadata={"static": True})

    def __init__(
        self, product: Callable[[PyTree], PyTree], like: PyTree, *, semidefinite: bool
    ) -> None:
        """Wraps `product` as an operator on trees of the shapes and dtypes of `like`."""
        shapes = jax.tree.map(shape_of, like)
        leaves, treedef = jax.tree.flatten(shapes)
        self.product = product
        self.structure = (tuple(leaves), treedef)
        self.semidefinite = semidefinite

    def mv(self, vector: PyTree) -> PyTree:
        """A v, for a tree v like the parameters; the result has the dtypes of v.

        Raises:
          ValueError: v has another structure or other shapes than the parameters.
          TypeError: v is complex, or of whole numbers.
        """
        check_like(vector, self.in_structure())
        return self.product(vector)

    def mm(self, vectors: PyTree) -> PyTree:
        """A v for each of k vectors, stacked along a leading axis of every leaf.

        What does not depend on v, such as the network's own forward pass, is computed once. Memory
        grows with k.
        """
        sizes = {x.shape[:1] for x in jax.tree.leaves(vectors)}
        if len(sizes) != 1 or () in sizes:
            raise ValueError(
                "mm takes vectors stacked along the leading axis of every leaf; found leading axes "
                f"{sorted(sizes)}. Use mv for a single vector."
            )
        return jax.vmap(self.mv)(vectors)

    def __matmul__(self, other: Any) -> Any:
        """A v for a tree, or the product of two operators."""
        if isinstance(other, lx.AbstractLinearOperator):
            return super().__matmul__(other)
        return self.mv(other)

    def __add__(self, other: Any) -> Any:
        """A + B."""
        if not isinstance(other, Operator) or other.structure != self.structure:
            return super().__add__(other)
        definite = self.semidefinite and other.semidefinite
        return self._with(lambda v: jax.tree.map(jnp.add, self.mv(v), other.mv(v)), definite)

    def __sub__(self, other: Any) -> Any:
        """A - B."""
        return self + -1.0 * other

    def __mul__(self, scalar: Any) -> Any:
        """Multiplies by a number: c A."""
        if not isinstance(scalar, (int, float)):
            return super().__mul__(scalar)
        definite = self.semidefinite and scalar >= 0
        return self._with(lambda v: jax.tree.map(lambda x: scalar * x, self.mv(v)), definite)

    def __truediv__(self, scalar: Any) -> Any:
        """Divides by a number: A / c."""
        return self * (1 / scalar)

    def __neg__(self) -> Any:
        """-A."""
        return self * -1.0

    def _with(self, product: Callable[[PyTree], PyTree], semidefinite: bool) -> Operator:
        return Operator(product, self.in_structure(), semidefinite=semidefinite)

    def as_matrix(self) -> jax.Array:
        """The dense matrix; see `to_dense`."""
        return to_dense(self)

    def transpose(self) -> Operator:
        """The operator itself: it is symmetric."""
        return self

    def in_structure(self) -> PyTree:
        """Shapes and dtypes of the parameters."""
        leaves, treedef = self.structure
        return jax.tree.unflatten(treedef, leaves)

    def out_structure(self) -> PyTree:
        """Shapes and dtypes of the parameters."""
        return self.in_structure()


def _no(operator: Operator) -> bool:
    del operator
    return False


def _itself(operator: Operator) -> Operator:
    return operator


lx.is_symmetric.register(Operator)(lambda operator: True)
lx.is_positive_semidefinite.register(Operator)(lambda operator: operator.semidefinite)
for _property in (
    lx.is_negative_semidefinite,
    lx.is_diagonal,
    lx.is_tridiagonal,
    lx.has_unit_diagonal,
    lx.is_lower_triangular,
    lx.is_upper_triangular,
):
    _property.register(Operator)(_no)
for _view in (lx.linearise, lx.conj):
    _view.register(Operator)(_itself)


def check_like(found: PyTree, expected: PyTree) -> None:
    """Raises where a tree has another structure or other shapes than the parameters."""
    differs = difference(found, expected)
    if differs is not None:
        raise ValueError(f"The operator acts on trees of the parameters' structure: {differs}.")
    check_real(found, "The tree")
    pairs = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, leaf), shape in pairs:
        if jnp.shape(leaf) != shape.shape:
            raise ValueError(
                f"The tree's {jax.tree_util.keystr(path)} has shape {list(jnp.shape(leaf))}, "
                f"expected that of the parameter, {list(shape.shape)}."
            )


# Products summed over a dataset ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Product(abc.ABC):
    """A matrix-vector product on one batch, `apply(params, args, key, v)`.

    Two products that do the same with the same functions are equal, so they share what has been
    compiled: an operator at other parameters or on other data costs no compilation.

    Attributes:
      function: the user's function of `params, *args`.
      has_aux: whether it returns `(loss, aux)`.
      metric: what happens in the space of its outputs.
      samples: number of draws, where the metric is sampled.
    """

    function: Callable[..., Any]
    has_aux: bool = False
    metric: Any = None
    samples: int = 0

    @abc.abstractmethod
    def __call__(
        self, params: PyTree, args: tuple[PyTree, ...], key: jax.Array | None, vector: PyTree
    ) -> PyTree:
        """The product, in the dtypes of the parameters."""

    def _identity(self) -> tuple[Any, ...]:
        functions = [_hashable(f) for f in (self.function, self.metric)]
        return (type(self), *functions, self.has_aux, self.samples)

    def __hash__(self) -> int:
        return hash(self._identity())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Product) and self._identity() == other._identity()


def _hashable(function: Any) -> Any:
    """`function`, or its identity where it cannot be hashed (a module that holds arrays)."""
    try:
        hash(function)
    except TypeError:
        return id(function)
    return function


def over_dataset(
    product: Product,
    params: PyTree,
    batches: Iterable[Any],
    weights: Sequence[float] | None,
    *,
    semidefinite: bool,
    averaged: bool = True,
    key: jax.Array | None = None,
) -> Operator:
    """The operator sum_b c_b A_b over batches b, A_b being `product` on one of them.

    The coefficients c_b are `weights` if given; otherwise 1 or, where `averaged`, each batch's
    share of all examples.
    """
    first = first_batch(batches)
    check_real(params, "params")
    params = jax.tree.map(jnp.asarray, params)

    def zeros() -> PyTree:
        return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=accumulator(p.dtype)), params)

    def total(vector: PyTree) -> PyTree:
        result = zeros()
        inner = jax.tree.map(lambda v, p: jnp.asarray(v).astype(p.dtype), vector, params)
        mass = 0.0
        with jax.disable_jit(False):
            for i, args, share in shares(batches, weights, averaged):
                folded = None if key is None else jax.random.fold_in(key, i)
                result = _add(product, result, share, params, args, folded, inner)
                mass += share
        scale = mass if weights is None and averaged else 1.0
        return jax.tree.map(lambda r, v: (r / scale).astype(jnp.result_type(v)), result, vector)

    # Complains now rather than at the first product, and traces for it.
    _add.eval_shape(product, jax.eval_shape(zeros), 1.0, params, first, key, params)
    return Operator(total, params, semidefinite=semidefinite)


@jax.jit(static_argnums=0)
def _add(
    product: Product,
    total: PyTree,
    share: float,
    params: PyTree,
    args: tuple[PyTree, ...],
    key: jax.Array | None,
    vector: PyTree,
) -> PyTree:
    """The sum so far, plus the share of A v on one batch."""
    with on_mesh(params, args):
        vector = jax.tree.map(divided_like, vector, params)
        terms = product(params, args, key, vector)
    return jax.tree.map(
        lambda t, x: t + jnp.asarray(share, t.dtype) * x.astype(t.dtype), total, terms
    )


# Dense and flat views ----------------------------------------------------------------------------


def to_dense(op: lx.AbstractLinearOperator, at_once: int = 64) -> jax.Array:
    """The dense matrix of an operator, for small problems.

    Args:
      op: a linear operator on trees with n entries.
      at_once: number of columns made together.

    Returns:
      The matrix, shape `(n, n)`, rows and columns in the order of
      `jax.flatten_util.ravel_pytree`.
    """
    flat = Flat(op)
    columns = []
    for start in range(0, flat.size, at_once):
        width = min(at_once, flat.size - start)
        unit = jnp.eye(width, flat.size, start, dtype=flat.dtype)
        columns.append(jax.vmap(flat.mv)(unit))
    return jnp.concatenate(columns).T if columns else jnp.zeros((0, 0), flat.dtype)


@jax.jit
def _raveled(tree: PyTree) -> jax.Array:
    with on_mesh(tree):
        return automatic(lambda tree: ravel_pytree(tree)[0], tree)


class Flat:
    """An operator on flat vectors, in float32 or float64.

    Attributes:
      size: number of entries n.
      dtype: of the vectors.
    """

    def __init__(self, op: lx.AbstractLinearOperator) -> None:
        self._op = op
        leaves = jax.tree.leaves(op.in_structure())
        self.dtype = accumulator(*(leaf.dtype for leaf in leaves))
        self.zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, self.dtype), op.in_structure())
        flat, self.unravel = ravel_pytree(self.zeros)
        self.size = flat.size

    def ravel(self, tree: PyTree) -> jax.Array:
        """A tree like the parameters as a vector, shape `(n,)`."""
        return _raveled(jax.tree.map(lambda x: x.astype(self.dtype), tree))

    def mv(self, vector: jax.Array) -> jax.Array:
        """A v, shape `(n,)`."""
        return self.ravel(self._op.mv(self.unravel(vector)))

    def eager(self) -> Callable[[jax.Array], jax.Array]:
        """`mv` for code that traces it first and evaluates the trace without compiling it."""
        return _jax.opaque(self.mv)
