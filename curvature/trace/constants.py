"""Small constants in a trace: enough to see through `arange` indices, `one_hot` and numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from curvature import _jax
from curvature.trace.environment import Known, OneHot, Ragged, Value

_LARGEST = 1 << 20


def _iota(params: dict[str, Any]) -> np.ndarray:
    shape, axis = params["shape"], params["dimension"]
    aligned = [n if a == axis else 1 for a, n in enumerate(shape)]
    return np.broadcast_to(np.arange(shape[axis]).reshape(aligned), shape)


def _broadcast(x: np.ndarray, params: dict[str, Any]) -> np.ndarray:
    aligned = [1] * len(params["shape"])
    for axis, size in zip(params["broadcast_dimensions"], x.shape, strict=True):
        aligned[axis] = size
    return np.broadcast_to(x.reshape(aligned), params["shape"])


RULES: dict[str, Callable[..., np.ndarray]] = {
    "add": lambda p, a, b: a + b,
    "sub": lambda p, a, b: a - b,
    "mul": lambda p, a, b: a * b,
    "div": lambda p, a, b: a / b,
    "sqrt": lambda p, a: np.sqrt(a),
    "rsqrt": lambda p, a: 1 / np.sqrt(a),
    "lt": lambda p, a, b: a < b,
    "ge": lambda p, a, b: a >= b,
    "max": lambda p, a, b: np.maximum(a, b),
    "min": lambda p, a, b: np.minimum(a, b),
    "select_n": lambda p, which, *cases: np.choose(np.asarray(which, int), cases),
    "convert_element_type": lambda p, a: a,
    "broadcast_in_dim": lambda p, a: _broadcast(a, p),
    "rev": lambda p, a: np.flip(a, p["dimensions"]),
    "iota": lambda p: _iota(p),
}


def known(equation: _jax.Equation, values: Sequence[Value]) -> Value:
    """What an equation of integers, or of single numbers, makes from known operands."""
    aval = equation.outvars[0].aval
    name = equation.primitive.name
    if name == "name" and equation.params["name"] == Ragged.NAME:
        return Ragged()
    if name == "eq" and _is_one_hot(equation, values):
        return OneHot()
    if name == "convert_element_type" and isinstance(values[0], OneHot):
        return values[0]
    kind = getattr(getattr(aval, "dtype", None), "kind", "?")
    if not ((kind in "iub" and aval.size <= _LARGEST) or (kind == "f" and aval.size == 1)):
        return None
    arrays = [v.value for v in values if isinstance(v, Known)]
    if len(arrays) < len(values):
        return None
    if name in ("reshape", "squeeze"):
        return Known(arrays[0].reshape(aval.shape))
    if name == "div" and kind != "f":
        return None
    rule = RULES.get(name)
    return Known(rule(equation.params, *arrays)) if rule else None


def _is_one_hot(equation: _jax.Equation, values: Sequence[Value]) -> bool:
    """`index[..., None] == arange(n)`."""
    size = equation.outvars[0].aval.shape[-1:]
    for index, classes in ((0, 1), (1, 0)):
        counted, other = values[classes], equation.invars[index]
        if isinstance(counted, Known) and values[index] is None and size and size[0] > 1:
            flat = counted.value.ravel()
            if other.aval.shape[-1:] == (1,) and np.array_equal(flat, np.arange(size[0])):
                return True
    return False
