"""In which precision curvature is kept and multiplied.

Statistics, inverses and what they are applied to are in float32 (float64 where the model is),
whatever the activations are. The default of JAX for products of float32 on GPU and TPU rounds to
TF32 or bfloat16, which turns the small eigenvalues of a factor negative; so every product says what
it is. Factorisations, residuals and the operators that users see are at `HIGHEST`, which on a GPU
leaves the tensor cores idle. What an optimizer does in every step need not be: it is `product`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

HIGHEST = jax.lax.Precision.HIGHEST
Precision = jax.lax.Precision | jax.lax.DotAlgorithm | jax.lax.DotAlgorithmPreset | str
"""What JAX takes as the `precision` of a product."""

FAST: Precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3
"""Three products of bfloat16 halves, added up in float32: 16 bits. By peak figures five times as
fast as float32 on an H100, and twice as fast as `HIGHEST` on a TPU. On a CPU this stands for
`HIGHEST`, where there is nothing to gain. GPUs older than NVIDIA's Ampere have none and refuse:
give `"highest"` there."""


def accumulator(*dtypes: Any) -> Any:
    """The dtype for curvature of arrays of `dtypes`: float64 if one of them is, else float32."""
    wide = any(jnp.dtype(dtype) == jnp.float64 for dtype in dtypes)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def product(subscripts: str, x: jax.Array, y: jax.Array, precision: Precision = FAST) -> jax.Array:
    """The einsum of two arrays, added up in (at least) float32.

    Products of two numbers of 16 bits are exact in float32, so those arrays are multiplied as they
    are; those of 64 bits are at `HIGHEST`.

    Args:
      subscripts: as `jnp.einsum` takes them.
      x: an array.
      y: another, of the same dtype unless one of them is wider.
      precision: of products of float32.
    """
    dtype = jnp.result_type(x, y)
    if narrow(dtype):
        return jnp.einsum(subscripts, x, y, preferred_element_type=accumulator(dtype))
    if dtype.itemsize == 8:
        precision = HIGHEST
    if precision is FAST:
        return _by_platform(subscripts, x, y)
    return jnp.einsum(subscripts, x, y, precision=precision)


@functools.partial(jax.jit, static_argnums=0)
def _by_platform(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """A `jit`, so that all products of a shape are traced and lowered once, with both branches."""
    full = functools.partial(jnp.einsum, subscripts, precision=HIGHEST)
    fast = functools.partial(jnp.einsum, subscripts, precision=FAST)
    found: jax.Array = jax.lax.platform_dependent(x, y, cpu=full, default=fast)
    return found


def check_precision(precision: Any) -> None:
    """Raises unless JAX takes this as a precision."""
    one = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    try:
        jax.eval_shape(lambda x: jnp.matmul(x, x, precision=precision), one)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"precision is {precision!r}, expected one of jax.lax.Precision or "
            "jax.lax.DotAlgorithmPreset, or its name."
        ) from error


def narrow(dtype: Any) -> bool:
    """Whether these are floating-point numbers of 16 bits."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize == 2


def kept_by(dtype: Any, *numbers: float) -> bool:
    """Whether a floating dtype has exactly these numbers."""
    return all(float(np.asarray(x).astype(dtype)) == x for x in numbers)
