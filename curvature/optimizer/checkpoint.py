"""Factors-only checkpoints: the statistics of a run, from which the inverses are made anew.

The whole state is a pytree of arrays, which any checkpointing library keeps; a run goes on from it
as if never stopped. The statistics alone are about half of that, and serve another optimizer too:
one with another damping or method of refresh, whose state has another layout.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from curvature.optimizer.eigenbasis import EigenbasisState
from curvature.optimizer.preconditioner import CurvatureState
from curvature.optimizer.uncovered import set_apart
from curvature.statistics import Estimator
from curvature.statistics.factors import Statistics
from curvature.statistics.stacks import Stacks, unweighted
from curvature.trace import Registry

PyTree = Any


def factors(state: PyTree) -> dict[str, Any]:
    """What is averaged, from the state of a transformation of ours, or one made of it.

    Args:
      state: the state of `kfac`, `eigen_adam`, or of a chain that holds one, ...

    Returns:
      `step`, `weight` and `statistics` as in `CurvatureState`.

    Raises:
      ValueError: there is not one such state in it, but none or several.
    """
    parts = jax.tree.leaves(state, is_leaf=_is_state)
    found = [part for part in parts if _is_state(part)]
    if len(found) != 1:
        raise ValueError(f"Found {len(found)} states with averaged statistics, expected one.")
    (one,) = found
    return {"step": one.step, "weight": one.weight, "statistics": one.statistics}


def averages(registry: Registry, state: PyTree) -> dict[str, Statistics]:
    """The averaged statistics by layer, as `Estimator.statistics` has them of one batch.

    `Estimator(registry).operator` makes the running curvature of them. A state keeps layers of one
    shape together, see `curvature.statistics.stacks`.

    Args:
      registry: that of the transformation.
      state: as `factors` takes it.

    Returns:
      The averages of every layer that has some.

    Raises:
      ValueError: as `factors`, or the state is of another registry.

    >>> import jax, jax.numpy as jnp, curvature
    >>> def loss_fn(params, x):
    ...     return curvature.losses.l2_loss(x @ params["a"] @ params["b"]).mean()
    >>> params, x = {"a": jnp.eye(2), "b": jnp.eye(2)}, jnp.ones((4, 2))
    >>> registry = curvature.register(loss_fn, params, x)
    >>> tx = curvature.kfac(registry, 0.1, kind=curvature.GaussNewton())
    >>> _, state = tx.update(jax.grad(loss_fn)(params, x), tx.init(params), params, loss_args=(x,))
    >>> averages = curvature.averages(registry, state)
    >>> [averages[name]["input"].shape for name in ("a", "b")]
    [(2, 2), (2, 2)]
    """
    saved = factors(state)
    whole = Stacks(Estimator(set_apart(registry)[0]))
    known = {name: arrays.keys() for name, arrays in whole.zeros().items()}
    for name, arrays in saved["statistics"].items():
        if not arrays.keys() <= known.get(name, set()):
            raise ValueError(
                f"The state has {sorted(arrays)} of {name!r}, expected some of "
                f"{sorted(known.get(name, ()))}, of {sorted(known)}: it is another registry's, or "
                "its layers have other blocks."
            )
    weight = jnp.where(saved["weight"] > 0, saved["weight"], 1)
    return whole.apart({k: unweighted(x, weight) for k, x in saved["statistics"].items()})


def with_factors(state: PyTree, saved: dict[str, Any]) -> PyTree:
    """The state with other statistics; the next step makes all inverses anew.

    Args:
      state: as `init` makes it, or later.
      saved: what `factors` returned.

    Returns:
      The state.

    Raises:
      ValueError: the statistics are not those of this model and these blocks.

    >>> import jax, jax.numpy as jnp, curvature
    >>> def loss_fn(params, x):
    ...     return curvature.losses.l2_loss(x @ params["w"]).mean()
    >>> params, x = {"w": jnp.ones((2, 3))}, jnp.ones((4, 2))
    >>> tx = curvature.kfac(curvature.register(loss_fn, params, x), 0.1)
    >>> grads, key = jax.grad(loss_fn)(params, x), jax.random.key(0)
    >>> _, state = tx.update(grads, tx.init(params), params, loss_args=(x,), key=key)
    >>> again = curvature.with_factors(tx.init(params), curvature.factors(state))
    >>> int(again.curvature.step)
    1
    """
    shapes = jax.tree.map(jnp.shape, factors(state))
    found = jax.tree.map(jnp.shape, saved)
    if shapes != found:
        raise ValueError(
            f"The factors have the shapes {found}, expected {shapes}: they are another model's, "
            "its layers had other blocks, or they are filled up for another number of devices "
            "(gather='updates'; orbax's StandardRestore(factors(state), strict=False) fits them)."
        )
    # Copies: a restored state may be donated, and the saved one used again.
    saved = jax.tree.map(jnp.copy, saved)

    def replaced(part: Any) -> Any:
        return part._replace(**saved, refreshed=jnp.zeros((), bool)) if _is_state(part) else part

    return jax.tree.map(replaced, state, is_leaf=_is_state)


def _is_state(part: Any) -> bool:
    return isinstance(part, CurvatureState | EigenbasisState)
