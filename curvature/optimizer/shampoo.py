"""The factors of Shampoo (Gupta et al. 2018): outer products of the mini-batch gradient itself.

Of a layer's gradient G in block coordinates, `input` is G G' and `output` is G' G. They take no
statistics pass, and know of the loss what its mean gradient knows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from curvature.meshes import automatic, divided
from curvature.optimizer.averaging import Averaging, Gathered, mixed
from curvature.optimizer.refresh.cond import finite, when
from curvature.precision import accumulator
from curvature.statistics.rows import moment
from curvature.statistics.stacks import Arrays, Stacks

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Shampoo:
    """Averages the outer products of the gradients that `update` is given.

    For `in_eigenbasis`, whose basis is then that of SOAP (Vyas et al. 2024).
    """


@dataclasses.dataclass(frozen=True, eq=False)
class GradientAveraging(Averaging):
    """Running averages of the outer products of a step's gradient.

    The estimator says which sides are too wide; its kind is not asked.
    """

    def gathered(
        self,
        gradient: PyTree,
        state: Any,
        params: PyTree,
        args: tuple[PyTree, ...],
        key: jax.Array | None,
    ) -> Gathered:
        """Gathers gradients; averages the factors of their mean when there is a step to take.

        And those of every gradient of the burn-in.
        """
        early, past, due = state.step < 0, self._past(state), self._due(state)
        gathered = self._summed(gradient, state, finite(gradient))
        seen = gathered.gradient
        if self.options.burn_in:
            seen = jax.tree.map(functools.partial(jnp.where, early), gradient, seen)
        state, sound, leaves = gathered.state, gathered.sound, jax.tree.leaves(seen)

        def sample(carry: Any) -> Any:
            old, weight, sound = carry
            make = functools.partial(_factors, self.stacks, old)
            fresh = automatic(make, leaves, like=old)
            return mixed((old, weight), fresh, sound, past, 1 - past)

        due &= early | jnp.asarray(gathered.due)
        averages, weight, _ = when(due, sample, (state.statistics, state.weight, sound))
        return gathered._replace(state=state._replace(statistics=averages, weight=weight))

    def zeros(self, params: PyTree) -> dict[str, Any]:
        """The entries of a state before the first step."""
        leaves, limit = jax.tree.leaves(params), self.stacks.estimator.limit
        statistics: Arrays = {}
        for layer in self.stacks.layers:
            dtype = accumulator(*(leaves[v.source].dtype for v in layer.leaves))
            forms = [limit.form(size) for size in layer.shape[-2:]]
            zeros = [jnp.zeros((*layer.stack, *form), dtype) for form in forms]
            zeros = divided(zeros, layer.over)
            statistics[layer.name] = dict(zip(("input", "output"), zeros, strict=True))
        return super().zeros(params) | {"statistics": statistics}


def _factors(stacks: Stacks, like: Arrays, leaves: Sequence[jax.Array]) -> Arrays:
    """G G' and G' G of every copy, in the forms that `like` has."""
    found, precision = {}, stacks.estimator.precision
    for layer in stacks.layers:
        gradient = layer.gather(leaves)
        rows = {"input": gradient.mT, "output": gradient}
        found[layer.name] = {
            side: moment(x[..., None, :, :], like[layer.name][side].shape[1:], precision)
            for side, x in rows.items()
        }
    return found
