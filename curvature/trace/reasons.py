"""Why a parameter is generic, in words: what was done to it, and what is structured instead."""

from __future__ import annotations

# What no gradient passes in reverse.
NO_GRADIENT = ("while", "pure_callback", "io_callback")
_REPEATED = ("repeated", "repeat the layer's output instead of the weight")
_SUMMED = ("summed over an axis", "a sum that divides the weight itself, as a norm does, is")
_SLICED = ("sliced where a value says", "let a scan go over the weight, or slice at constants")
_COMPLEX = ("made complex", "compute with the real and imaginary parts of the data instead")

# For each primitive what it does to a parameter, and what to write instead.
_WORDS: dict[str, tuple[str, str]] = {
    "add": ("added", "add the layers' outputs, x @ w + x @ u, not the weights"),
    "broadcast_in_dim": _REPEATED,
    "complex": _COMPLEX,
    "convert_element_type": _COMPLEX,
    "custom_vjp_call": (
        "passed through a custom_vjp",
        "a straight-through gradient is w + stop_gradient(f(w) - w), and curvature.tag_layer marks "
        "a layer inside",
    ),
    "div": (
        "divided",
        "(x @ w) / g where it is one number for each output, (x / g) @ w for each input",
    ),
    "dot_general": ("multiplied as a matrix", "apply the factors in turn, (x @ a) @ b"),
    "dynamic_slice": _SLICED,
    "gather": ("gathered, not by whole rows", "index whole rows of one axis by data"),
    "mul": (
        "multiplied",
        "(x @ w) * g where it is one number for each output, (x * g) @ w for each input",
    ),
    "ragged_dot_general": (
        "used in a ragged product",
        "einsum('ni,eio,ne->no', x, w, one_hot(expert)), or a scan over the experts",
    ),
    "reduce_sum": _SUMMED,
    "reshape": _REPEATED,  # what is not repeated is followed through a reshape
    "sub": ("subtracted", "subtract the layers' outputs, not the weights"),
    "tile": _REPEATED,
    "while": ("used in a while loop", "loop by scan, or by fori_loop with constant bounds"),
}


def reason(
    name: str, where: str, *, others: int, before: tuple[str, str] | None, unbatched: bool
) -> str:
    """Why a parameter that an equation makes something else of is generic.

    Args:
      name: the equation's primitive.
      where: the user's line.
      others: how many other parameters are among its operands.
      before: the primitive that made an elementwise function of the parameter before, and its line;
        None for nothing.
      unbatched: whether the equation is elementwise, and no batch axis was found.
    """
    said = _done(name)
    if others:
        said += " with another parameter" if others == 1 else f" with {others} other parameters"
    if name in NO_GRADIENT:
        said = f"{name}, which no gradient passes,"
    elif unbatched and not others:
        said += ", where no batch axis was found,"
    said += f" at {where}"
    if before is not None:  # what was done first is what keeps the weight from being a layer's
        name = before[0]
        said = f"{_done(name)} at {before[1]}, then {said}"
    if name in _WORDS:
        return f"{said}; structured: {_WORDS[name][1]}"
    return said if before is None else f"{said}; structured: what only moves or scales a weight"


def _done(name: str) -> str:
    """What a primitive does to a parameter: `multiplied (mul)`."""
    return f"{_WORDS[name][0]} ({name})" if name in _WORDS else name
