"""The eigenbases of an EKFAC block, and its corrections in them (George et al. 2018).

The factors A and B of a layer have eigenvectors Q_A and Q_B. The corrections are the second moments
of an example's gradient P_n in this basis, `values` = sum_n (Q_A' P_n Q_B)^2, of shape
`stack + (d_in, d_out)`. Where an example is one row, P_n = a g', they are (a Q_A)^2' (g Q_B)^2 and
no example's gradient is made; where it has several, its rows are turned and summed first.

A diagonal factor has the coordinates themselves as its eigenbasis: ones in place of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from curvature.blocks.eigen_kronecker import from_basis, into_basis
from curvature.linalg import without_rounding
from curvature.precision import HIGHEST, Precision, product
from curvature.sides import in_blocks, is_diagonal, joined, side_eigh, unit
from curvature.statistics.factors import Statistics
from curvature.statistics.rows import Rows

INPUT, OUTPUT = BASES = ("input_basis", "output_basis")
Sizes = Sequence[int]
"""Of the input and the output side."""


def identity(factors: Statistics, stack_ndim: int) -> Statistics:
    """The coordinates themselves as bases of both sides."""
    return {basis: unit(factors[side], stack_ndim) for side, basis in _pairs()}


def of_factors(factors: Statistics, sizes: Sizes, stack_ndim: int) -> Statistics:
    """The eigenvectors of `input` and `output`, as columns."""
    return {basis: vectors for basis, (_, vectors) in _eigh(factors, sizes, stack_ndim).items()}


def rebased(
    statistics: Statistics, stack_ndim: int, restart: ArrayLike, precision: Precision
) -> Statistics:
    """Statistics with the eigenbases of their factors, and the corrections taken over to them."""
    found = _eigh(statistics, statistics["values"].shape[-2:], stack_ndim)
    new = {basis: vectors for basis, (_, vectors) in found.items()}
    values = tuple(values for values, _ in found.values())
    return statistics | carried_over(statistics, new, values, stack_ndim, restart, precision)


def carried_over(
    statistics: Statistics,
    new: Statistics,
    eigenvalues: tuple[jax.Array, ...],
    stack_ndim: int,
    restart: ArrayLike,
    precision: Precision,
) -> Statistics:
    """New bases, and the corrections in them.

    The corrections become the diagonal, in the new basis, of the operator that they were in the
    old: of all operators that are diagonal in the new basis the closest one in Frobenius norm, and
    of the same trace. With `restart` they become the products of the factors' eigenvalues, K-FAC
    scaled to that trace.

    Args:
      statistics: the factors, the old bases, and the corrections in these.
      new: the new bases.
      eigenvalues: of both factors, along them.
      stack_ndim: number of leading stack axes.
      restart: whether the corrections start anew.
      precision: of the changes of basis.
    """
    overlaps = [overlap(statistics[basis], new[basis], stack_ndim, precision) for basis in BASES]
    kfac = products(*eigenvalues)
    moved = moved_diagonal(overlaps, statistics["values"], stack_ndim, precision)
    exact, found = (jnp.sum(x, axis=(-2, -1), keepdims=True) for x in (moved, kfac))
    kfac = kfac * (exact / jnp.where(found > 0, found, 1))
    changed = new | {"values": jnp.where(restart, kfac, moved)}
    return changed | {"values": without_noise(statistics | changed, stack_ndim)["values"]}


def overlap(old: jax.Array, new: jax.Array, stack_ndim: int, precision: Precision) -> jax.Array:
    """Inner products (new_i, old_k) of two bases; ones where both are the identity."""
    if is_diagonal(old, stack_ndim):
        return old
    return product("...ji,...jk->...ik", new, old, precision)


def moved_diagonal(
    overlaps: Sequence[jax.Array], values: jax.Array, stack_ndim: int, precision: Precision
) -> jax.Array:
    """The diagonal, in new bases, of the operator that is `values` on the diagonal in the old."""
    return from_basis([x**2 for x in overlaps], values, stack_ndim, precision)


def products(a: jax.Array, b: jax.Array) -> jax.Array:
    """The eigenvalues of A (x) B from those of A and B, zero where they are rounding errors."""
    return without_rounding(a)[..., :, None] * without_rounding(b)[..., None, :]


def without_noise(statistics: Statistics, stack_ndim: int) -> Statistics:
    """Statistics whose corrections are zero where a factor's eigenvalue is a rounding error.

    An eigenvector of an eigenvalue zero is known to about eps, so the second moments along it are
    not zero, and their inverse would be anything.
    """
    first, second = (
        _is_known(statistics[side], statistics[basis], size, stack_ndim)
        for (side, basis), size in zip(_pairs(), statistics["values"].shape[-2:], strict=True)
    )
    known = first[..., :, None] & second[..., None, :]
    return statistics | {"values": jnp.where(known, statistics["values"], 0)}


def _is_known(factor: jax.Array, basis: jax.Array, size: int, stack_ndim: int) -> jax.Array:
    """Whether the factor's eigenvalue along each vector of its eigenbasis is no rounding error."""
    values = factor
    if not is_diagonal(factor, stack_ndim):
        values = jnp.sum(jnp.matmul(factor, basis, precision=HIGHEST) * basis, axis=-2)
    if in_blocks(factor, stack_ndim):
        values = joined(values, size)
    return without_rounding(values) > 0


def turned_rows(rows: Rows, turn: Statistics) -> Rows:
    """Rows a Q_A and g Q_B; as they are where there are no bases."""
    return rows.turned(turn[INPUT], turn[OUTPUT]) if turn else rows


def turned_gradients(
    gradients: jax.Array, turn: Statistics, stack_ndim: int, precision: Precision
) -> jax.Array:
    """Q_A' P Q_B for gradients `(examples,) + stack + (d_in, d_out)`."""
    return into_basis((turn[INPUT], turn[OUTPUT]), gradients, stack_ndim, precision)


def _pairs() -> tuple[tuple[str, str], ...]:
    return (("input", INPUT), ("output", OUTPUT))


def _eigh(
    factors: Statistics, sizes: Sizes, stack_ndim: int
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Eigenvalues and eigenbasis of both sides, by the name of the basis."""
    return {
        basis: side_eigh(factors[side], size, stack_ndim)
        for (side, basis), size in zip(_pairs(), sizes, strict=True)
    }
