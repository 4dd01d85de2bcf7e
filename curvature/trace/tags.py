"""Marking a layer by hand, where no analysis of the trace can see it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from curvature import _jax


def _first(y: jax.Array, *others: jax.Array) -> jax.Array:
    del others
    return y


LAYER_TAG = "curvature_layer"
_primitive = _jax.tag_primitive(LAYER_TAG, _first, fixed=lambda position: position >= 2)


def tag_layer(
    y: ArrayLike, x: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None
) -> jax.Array:
    """Says that `y` is `x @ weight + bias`, however it was computed; returns `y`.

    For what the registry cannot see into: a Pallas kernel, a layer inside a `custom_vjp` function.
    The layer becomes a dense one; other uses of the same parameters are not looked at. Gradients
    are those of the computation of `y`.

    Args:
      y: the layer's output, `[..., d_out]`.
      x: the layer's input, `[..., d_in]`, with the same leading axes.
      weight: a parameter (or a reshaped, transposed, cast, sliced one), `(d_in, d_out)`.
      bias: a parameter, `(d_out,)`.

    Returns:
      `y`. It is the result that has to be used: a tag whose result goes nowhere is dead code.

    Raises:
      ValueError: by `register`, which knows the parameters' names: the shapes do not fit, or the
        weight is no parameter.

    >>> import jax, jax.numpy as jnp, curvature
    >>> @jax.custom_vjp
    ... def kernel(w, x):
    ...     return x @ w
    >>> kernel.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (r[1].T @ g, g @ r[0].T))
    >>> def loss_fn(params, x, t):
    ...     y = curvature.tag_layer(kernel(params["w"], x), x, params["w"])
    ...     return curvature.losses.l2_loss(y, t).mean()
    >>> params, x, t = {"w": jnp.ones((3, 2))}, jnp.ones((5, 3)), jnp.ones((5, 2))
    >>> [layer.kind for layer in curvature.register(loss_fn, params, x, t).layers]
    ['dense']
    """
    parameters = [weight] if bias is None else [weight, bias]
    operands = [jnp.asarray(operand) for operand in (y, x, *parameters)]
    tagged: jax.Array = _primitive.bind(*operands)
    return tagged
