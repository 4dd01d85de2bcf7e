"""Damped linear systems by conjugate gradients, with lineax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import lineax as lx

from curvature.operators.operator import Flat, Operator, check_like

PyTree = Any


class Preconditioner(Protocol):
    """What acts on trees by `@`, such as `BlockDiagonal.damped_inverse(damping)`."""

    def __matmul__(self, tree: PyTree) -> PyTree:
        """P v, for P close to the inverse."""
        ...


def solve(
    op: lx.AbstractLinearOperator,
    tree: PyTree,
    damping: float = 0.0,
    *,
    preconditioner: Callable[[PyTree], PyTree] | Preconditioner | None = None,
    tolerance: float = 1e-6,
    max_steps: int | None = None,
    throw: bool = True,
) -> lx.Solution:
    """Solves (A + damping I) x = v by conjugate gradients (`lineax.CG`).

    The iteration runs in Python, some milliseconds each beside the product: not to be called inside
    `jax.jit`.

    Args:
      op: a symmetric linear operator on trees; with the damping it has to be positive definite.
      tree: the right-hand side v, a tree of the operator's structure.
      damping: lambda, a number not below zero, in units of the operator.
      preconditioner: P ~ (A + damping I)^-1, symmetric and positive definite, as a function of
        trees or with `@`: `block_diagonal.damped_inverse(damping)`, or `lambda v:
        block_diagonal.solve(v, damping)`. Parameters that it excludes would be left at zero.
      tolerance: how small the residual has to be, in its largest entry, relative to v's.
      max_steps: the most iterations, one product each and another one in ten; by default as many
        as are needed, at most ten times the number of entries.
      throw: whether to raise where the tolerance is not reached.

    Returns:
      A `lineax.Solution`: x is its `value`, the number of iterations `stats["num_steps"]`. Where
      something is not finite, x is NaN, and `result` says so.

    Raises:
      ValueError: v has another structure or other shapes than the parameters, or a number is out of
        range.
      RuntimeError: the tolerance is not reached, or something is not finite.

    >>> import jax.numpy as jnp
    >>> from curvature import operators
    >>> op = operators.hessian(lambda p, x: (x * p**2).mean(), jnp.ones(2), [jnp.ones((4, 2))])
    >>> operators.solve(op, jnp.array([2.0, 4.0]), damping=1.0).value
    Array([1., 2.], dtype=float32)
    """
    check_like(tree, op.in_structure())
    if not (damping >= 0 and tolerance > 0):
        raise ValueError(
            f"Found damping={damping} and tolerance={tolerance}, expected a damping not below zero "
            "and a positive tolerance."
        )
    flat = Flat(op)  # one vector, so that an iteration costs the same for any number of leaves
    vector = flat.ravel(tree)
    system = Operator(lambda x: flat.mv(x) + damping * x, vector, semidefinite=True)
    options: dict[str, Any] = {}
    if preconditioner is not None:
        apply = preconditioner if callable(preconditioner) else preconditioner.__matmul__
        options["preconditioner"] = Operator(
            lambda x: flat.ravel(apply(flat.unravel(x))), vector, semidefinite=True
        )
    atol = tolerance * float(jnp.max(jnp.abs(vector)))
    solver = lx.CG(rtol=tolerance, atol=atol, max_steps=max_steps)
    with jax.disable_jit():  # in Python: the product loops over data
        solution = lx.linear_solve(system, vector, solver, options=options, throw=False)
        reached = bool(solution.result == lx.RESULTS.successful)
        # To conjugate gradients NaN is as good as zero: they end where they are.
        reached &= bool(jnp.isfinite(solution.value).all())
        fine = bool(jnp.isfinite(vector - system.mv(0 * vector)).all())
    if not fine:
        nothing = jnp.full_like(vector, jnp.nan)
        solution = dataclasses.replace(solution, value=nothing, result=lx.RESULTS.nonfinite_input)
    if throw and not fine:
        raise RuntimeError(
            "The right-hand side or the operator is not finite: look for NaN and infinity in the "
            "tree, the parameters and the batches."
        )
    if throw and not reached:
        raise RuntimeError(
            f"Conjugate gradients stopped after {int(solution.stats['num_steps'])} iterations "
            f"without reaching the tolerance {tolerance}. Is A + {damping} I positive definite? A "
            "Hessian may need a larger damping; otherwise allow more steps or a larger tolerance."
        )
    like = jax.tree.map(lambda x, v: x.astype(v.dtype), flat.unravel(solution.value), tree)
    return dataclasses.replace(solution, value=like)
