"""What a step minimises: the loss on its batch, a penalty, and the quadratic model of both."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvature.optimizer import quadratic
from curvature.optimizer.arguments import ScalarOrSchedule, at
from curvature.optimizer.uncovered import reached
from curvature.statistics import Kind
from curvature.statistics.devices import Axes, mean
from curvature.trace import Registry

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is trained on: the loss, and 1/2 l2 |params|^2 of the parameters that it trains."""

    registry: Registry
    kind: Kind
    l2: ScalarOrSchedule
    axes: Axes = None

    def at(
        self, params: PyTree, args: tuple[PyTree, ...], gradient: PyTree, lam: Any, count: jax.Array
    ) -> Problem:
        """The problem of one step, from the loss's gradient."""
        l2 = at(self.l2, count, lam)
        if not is_zero(self.l2):
            penalised = reached(self.registry, params)
            gradient = combined((jnp.ones_like(l2), l2), (gradient, penalised))
        return Problem(self.registry, self.kind, params, args, gradient, lam, l2, self.axes)


class Problem(NamedTuple):
    """The objective at the parameters and the batch of one step; `gradient` is the objective's."""

    registry: Registry
    kind: Kind
    params: PyTree
    args: tuple[PyTree, ...]
    gradient: PyTree
    lam: jax.Array
    l2: jax.Array
    axes: Axes

    @property
    def damping(self) -> jax.Array:
        """What is added to the loss's curvature."""
        return self.lam + self.l2

    def model(self, steps: Sequence[PyTree]) -> quadratic.Quadratic:
        """The damped quadratic model along some directions."""
        loss_fn, has_aux = self.registry.loss_fn, self.registry.has_aux
        return quadratic.along(
            loss_fn,
            has_aux,
            self.params,
            self.args,
            self.gradient,
            steps,
            self.damping,
            self.kind,
            self.axes,
        )

    def ratio(
        self, step: PyTree, predicted: jax.Array, value: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """What a step changes the objective by, relative to what was predicted.

        With it, whether the loss says nothing of the step: whether it changed by nothing at all
        though more was predicted than its rounding, or is finite neither before nor after it.

        Both count with an allowance for the rounding of the loss, so that the model is trusted
        where they are within it (Conn, Gould and Toint 2000, section 17.4.2). -inf where the loss
        overflows.

        Args:
          step: a tree like the parameters.
          predicted: the expected change.
          value: the loss without the step, if known.
        """
        before = self._loss(self.params) if value is None else mean(value, self.axes)
        limits = jnp.finfo(before.dtype)  # type: ignore[no-untyped-call]  # of bfloat16, too
        dtype, eps, least = self.l2.dtype, float(limits.eps), float(limits.tiny) ** 0.5
        before = before.astype(dtype)
        after = self._loss(optax.apply_updates(self.params, step)).astype(dtype)
        # 1/2 |w + v|^2 - 1/2 |w|^2 without the difference of large numbers.
        penalised = reached(self.registry, self.params)
        doubled = jax.tree.map(lambda w, v: 2 * w + v, penalised, step)
        penalty = self.l2 * quadratic.dot(doubled, step, dtype) / 2
        change = after - before + penalty
        noise = jnp.where(predicted < 0, -10, 10) * eps * jnp.abs(before)
        ratio = (change + noise) / (predicted + noise)
        neither = ~(jnp.isfinite(before) | jnp.isfinite(after))
        nothing = (change == 0) & (jnp.abs(predicted) > jnp.maximum(jnp.abs(noise), least))
        ratio = jnp.where(jnp.isnan(change), jnp.where(neither, 0, -jnp.inf), ratio)
        return ratio, nothing | neither

    def _loss(self, params: PyTree) -> jax.Array:
        out = self.registry.traced_once(params, *self.args)
        return mean(out[0] if self.registry.has_aux else out, self.axes)


def combined(coefficients: Sequence[jax.Array], trees: Sequence[PyTree]) -> PyTree:
    """The sum of coefficient times tree, in the trees' dtypes."""

    def one(*leaves: jax.Array) -> jax.Array:
        terms = [c.astype(x.dtype) * x for c, x in zip(coefficients, leaves, strict=True)]
        return functools.reduce(jnp.add, terms)

    return jax.tree.map(one, *trees)


def is_zero(value: Any) -> bool:
    """Whether a hyperparameter is known to be zero: a number, and no traced one."""
    return not (callable(value) or isinstance(value, jax.core.Tracer) or value)
