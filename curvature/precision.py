"""In which precision curvature is kept.

Statistics, inverses and products are in float32 (float64 where the model is), whatever the
activations are, and at full matmul precision: the default on GPU and TPU rounds to TF32 or
bfloat16, which turns the small eigenvalues of a factor negative.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def accumulator(*dtypes: Any) -> Any:
    """The dtype for curvature of arrays of `dtypes`: float64 if one of them is, else float32."""
    wide = any(jnp.dtype(dtype) == jnp.float64 for dtype in dtypes)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)
