"""True Fisher, empirical Fisher and Gauss-Newton of a model side by side."""

from curvature.comparison.compare import compare
from curvature.comparison.history import History
from curvature.comparison.result import (
    Block,
    Comparison,
    Directions,
    Figure,
    ModelState,
    Pair,
    Spectrum,
    Structured,
)

__all__ = [
    "Block",
    "Comparison",
    "Directions",
    "Figure",
    "History",
    "ModelState",
    "Pair",
    "Spectrum",
    "Structured",
    "compare",
]
