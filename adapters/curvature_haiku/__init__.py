"""Curvature for Haiku: register a transformed loss.

The backend finds Haiku layers without help. Where the loss function is itself a transformed Haiku
function, as in most Haiku programs, its `apply` has the random key and the state in places of its
own; these two functions put them where `curvature.register` and `jax.value_and_grad` want them.

Of several functions with common modules, one is the loss:

    functions = hk.multi_transform(...)
    loss = hk.Transformed(functions.init, functions.apply["loss"])

and `hk.TransformedWithState` likewise for `hk.multi_transform_with_state`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

try:
    import haiku as hk
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"curvature_haiku needs {error.name}, which is not installed: install the extra "
        "'curvature[haiku]'."
    ) from error

import curvature

Transformed: TypeAlias = hk.Transformed | hk.TransformedWithState


def loss_function(transformed: Transformed, *, has_aux: bool = False) -> Callable[..., Any]:
    """`transformed.apply` as a function `(params, *args) -> (loss, aux)`.

    Args:
      transformed: result of `hk.transform` or `hk.transform_with_state` of a loss function.
      has_aux: whether the loss function returns `(loss, aux)`.

    Returns:
      A function with the arguments of `transformed.apply`. Its `aux` is the new state
      (`hk.transform_with_state`), the loss function's aux (`has_aux`), both as `(state, aux)`, or
      None; use it with `jax.value_and_grad(..., has_aux=True)`.

    Raises:
      TypeError: `transformed` is something else, such as the loss function itself.
    """
    with_state = isinstance(transformed, hk.TransformedWithState)
    if not isinstance(transformed, hk.Transformed | hk.TransformedWithState):
        raise TypeError(
            f"transformed is {transformed!r}, expected what hk.transform or "
            "hk.transform_with_state returns: give them the loss function first."
        )

    def loss_fn(params: hk.Params, *args: Any) -> tuple[Any, Any]:
        out = transformed.apply(params, *args)
        out, state = out if with_state else (out, None)
        loss, aux = out if has_aux else (out, None)
        if with_state:
            return loss, (state, aux) if has_aux else state
        return loss, aux

    return loss_fn


def register(
    transformed: Transformed,
    params: hk.Params,
    *args: Any,
    has_aux: bool = False,
    objective: bool = True,
) -> curvature.Registry:
    """Finds the layers of a transformed Haiku loss; see `curvature.register`.

    Args:
      transformed: result of `hk.transform` or `hk.transform_with_state` of a loss function.
      params: its parameters, from `transformed.init`.
      *args: the arguments of `transformed.apply` after `params`: (state,) random key, batch, ...
      has_aux: whether the loss function returns `(loss, aux)`.
      objective: whether its value is what is minimised, see `curvature.register`.

    Returns:
      The registry. An optimizer made from it wants `loss_args=args`.

    >>> import haiku as hk, jax, jax.numpy as jnp, optax, curvature, curvature_haiku
    >>> def loss_fn(x, y):
    ...     logits = hk.Linear(3)(x)
    ...     return curvature.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    >>> loss = hk.transform(loss_fn)
    >>> x, y, rng = jnp.ones((4, 2)), jnp.zeros((4,), int), jax.random.key(0)
    >>> params = loss.init(rng, x, y)
    >>> registry = curvature_haiku.register(loss, params, rng, x, y)
    >>> tx = curvature.kfac(registry, learning_rate=0.1)
    >>> grads = jax.grad(loss.apply)(params, rng, x, y)
    >>> updates, _ = tx.update(grads, tx.init(params), params, loss_args=(rng, x, y), key=rng)
    >>> params = optax.apply_updates(params, updates)
    """
    loss = loss_function(transformed, has_aux=has_aux)
    return curvature.register(loss, params, *args, has_aux=True, objective=objective)
