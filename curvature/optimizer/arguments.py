"""Arguments of the transformations: numbers or schedules, and what `update` must be given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from curvature.trace import Registry
from curvature.trees import difference, different_dtype, different_shape

PyTree = Any
ScalarOrSchedule = ArrayLike | Callable[[ArrayLike], ArrayLike]
Period = int | Callable[[ArrayLike], ArrayLike]
Gather = Literal["inverses", "updates"]


def at(value: Any, count: jax.Array, like: jax.Array) -> jax.Array:
    """A number, or a schedule at a step."""
    return jnp.asarray(value(count) if callable(value) else value).astype(like.dtype)


def damping_of(damping: Any, relative: bool | None, *, absolute: bool = False) -> tuple[Any, bool]:
    """What `damping="auto"` and `relative_damping=None` stand for.

    Args:
      damping: as given.
      relative: whether it is a multiple of each block's mean eigenvalue; None: if it is not given.
      absolute: whether one damping is for all blocks by default: where a quadratic model chooses
        the steps, and where a function carries curvature alone, whose scale is its own.
    """
    auto = isinstance(damping, str) and damping == "auto"
    if relative is None:
        relative = auto and not absolute
    if auto:
        damping = 3.0 if relative else 1e-3
    return damping, relative


def check_update(params: PyTree | None, loss_args: Any) -> tuple[PyTree, ...]:
    """The arguments of the loss; raises where `update` was called without them or `params`."""
    if params is None:
        raise ValueError(
            "update was called without params: call update(grads, state, params, ...)."
        )
    if loss_args is None:
        raise ValueError(
            "update was called without loss_args: pass loss_args=(batch,), the arguments that "
            "loss_fn takes after params. If they were passed, something in between kept them: "
            "flax's TrainState does, curvature_flax.linen.TrainState does not."
        )
    if not isinstance(loss_args, (tuple, list)):
        raise TypeError(
            f"loss_args is {type(loss_args).__name__}, expected a tuple of the arguments that "
            "loss_fn takes after params: loss_args=(batch,)."
        )
    return tuple(loss_args)


def check_value(value: Any) -> None:
    """Raises for what is no value of a loss; None is none."""
    if value is not None and jnp.shape(value):
        raise ValueError(
            f"value has shape {jnp.shape(value)}, expected a scalar: the loss of the batch at "
            "params, as jax.value_and_grad returns it."
        )


def check_state(state: PyTree, kind: type) -> None:
    """Raises for the state of another transformation."""
    if not isinstance(state, kind):
        raise TypeError(
            f"The optimizer's state is {type(state).__name__}, expected {kind.__name__}: it is "
            "another optimizer's. Start from tx.init(params); curvature.with_factors takes the "
            "statistics over."
        )


def check_configuration(state: Any, expected: Any) -> None:
    """Raises for a state of other blocks, another method of refresh, another dtype of parameters.

    The dtypes of what other transformations keep are theirs: some change in the first update.
    """
    differs = difference(state, expected) or different_shape(state, expected)
    if differs is not None:
        raise ValueError(
            f"The optimizer's state is another configuration's: {differs}. Give the "
            "transformation the options (blocks, refresh, accumulate, graft, fallback, ...) that "
            "the state was made with, or start from tx.init(params); curvature.with_factors takes "
            "statistics over."
        )
    differs = different_dtype(state.statistics, expected.statistics)
    if differs is not None:
        raise ValueError(
            f"The optimizer's state is of parameters of another dtype: statistics{differs}. Cast "
            "all of its floating-point arrays, or start from tx.init(params)."
        )


def own(state: PyTree) -> PyTree:
    """The state with a buffer of its own for each leaf: a shared one cannot be donated."""
    return jax.tree.map(jnp.copy, state)


def check_params(params: PyTree, registry: Registry) -> None:
    """Raises for parameters that are not the registered ones, or were masked.

    A tree without leaves is what `optax.tree_utils.tree_map_params` asks a state of.
    """
    masked = _masked(params)
    if masked and not _masked(registry.params):
        raise ValueError(
            f"params{masked[0]} is masked (optax.masked, optax.partition), but the registered loss "
            "needs it. Wrap no mask around the preconditioner: leave parameters out of the "
            "curvature by registry.override(pattern, exclude=True), with fallback= for their "
            "gradients, or register the loss as a function of the masked parameters, with all "
            "parameters as another argument."
        )
    if jax.tree.leaves(params):
        registry.check_params(_unboxed(params, registry.params))


def _unboxed(params: PyTree, like: PyTree) -> PyTree:
    """Parameters without a box around each: `nnx.Optimizer` makes its state of variables."""
    found, expected = map(jax.tree_util.tree_leaves_with_path, (params, like))
    boxed = [path[: len(name)] for (path, _), (name, _) in zip(found, expected, strict=False)]
    if len(found) != len(expected) or boxed != [name for name, _ in expected]:
        return params
    return jax.tree.unflatten(jax.tree.structure(like), [leaf for _, leaf in found])


def _masked(params: PyTree) -> list[str]:
    """The paths of masked parameters."""

    def is_masked(x: Any) -> bool:
        return isinstance(x, optax.MaskedNode)

    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_masked)
    return [jax.tree_util.keystr(path) for path, leaf in leaves if is_masked(leaf)]


def check_range(name: str, value: Any, low: float, high: float) -> None:
    """Raises for a number outside [low, high); arrays under a trace are not looked at."""
    check_instance(name, value)
    if callable(value) or isinstance(value, jax.core.Tracer):
        return
    try:
        if isinstance(value, str):
            raise TypeError(value)
        number = float(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} is {value!r}, expected a number or a schedule.") from error
    if not low <= number < high:
        raise ValueError(f"{name} is {value}, expected a number in [{low:g}, {high:g}).")


def check_positive(name: str, value: Any) -> None:
    """Raises for a number that is not positive."""
    check_range(name, value, float(np.finfo(np.float64).tiny), float("inf"))


def check_instance(name: str, value: Any) -> None:
    """Raises for a class where an instance of it is meant."""
    if isinstance(value, type):
        raise TypeError(
            f"{name} is the class {value.__name__}, expected an instance: {value.__name__}()."
        )


def check_transformation(name: str, value: Any) -> None:
    """Raises for what is no optax transformation; None is none."""
    if value is not None and not (hasattr(value, "init") and hasattr(value, "update")):
        called = getattr(value, "__name__", None)
        hint = f" Call it: {name}={called}(...)." if callable(value) and called else ""
        raise TypeError(f"{name} is {value!r}, expected an optax transformation.{hint}")


def is_time(period: Period, count: jax.Array, turn: int = 0) -> jax.Array:
    """Whether a step is one of every so many; a schedule is rounded, and at least 1."""
    if not callable(period):
        return count % period == turn
    rounded = jnp.round(jnp.asarray(period(count)).astype(float))
    return count % jnp.maximum(rounded, 1).astype(count.dtype) == turn


def check_over(over: Any, gather: Any) -> None:
    """Raises for what is no sharding of the leading axis over a mesh, or not to be gathered."""
    if gather not in get_args(Gather):
        raise ValueError(f"gather is {gather!r}, expected 'inverses' or 'updates'.")
    if over is None and gather == "updates":
        raise ValueError(
            "gather is 'updates', but nothing is dealt to devices: say over which, by refresh_over="
            "NamedSharding(mesh, PartitionSpec(axis))."
        )
    if over is None:
        return
    if not isinstance(over, NamedSharding) or not over.spec or over.spec[0] is None:
        raise ValueError(
            f"refresh_over is {over!r}, expected NamedSharding(mesh, PartitionSpec(axis)) with the "
            "mesh's axis, or axes, over whose devices inverses are dealt."
        )


def check_storage(dtype: Any) -> None:
    """Raises for what is no dtype with float32's range: inverses may be very large."""
    try:
        fine = dtype is None or jnp.dtype(dtype) in (jnp.bfloat16, jnp.float32, jnp.float64)
    except TypeError:
        fine = False
    if not fine:
        raise ValueError(
            f"storage_dtype is {dtype!r}, expected None, jnp.bfloat16, jnp.float32 or jnp.float64."
        )


def turns_of(refresh_every: Period, *, spread: bool) -> int:
    """In how many turns everything is renewed once.

    Raises:
      ValueError: a schedule is to be spread.
    """
    if not spread:
        return 1
    if callable(refresh_every):
        raise ValueError(
            "refresh_every is a schedule, and work can be spread over a fixed number of steps "
            "only: give spread=False, so that one step in so many renews everything."
        )
    return refresh_every


def check_period(name: str, value: Any, smallest: int = 1, *, schedules: bool = False) -> None:
    """Raises for what is no integer, or too small; schedules may be allowed."""
    check_instance(name, value)
    if schedules and callable(value):
        return
    if not isinstance(value, (int, np.integer)) or value < smallest:
        what = "a positive integer" if smallest else "an integer that is not negative"
        hint = (
            " Under optax.inject_hyperparams, whole numbers belong in static_args: burn_in, "
            "accumulate, statistics_every, refresh_every, warmup_steps and max_factor_dim."
        )
        hint = hint if isinstance(value, jax.Array) else ""
        raise ValueError(f"{name} is {value!r}, expected {what}.{hint}")
