"""Exact curvature, matrix-free over a dataset: Hessian, Gauss-Newton, Fisher, any pullback metric.

The reference that approximations are measured against, and the tool for what needs no
approximation: traces, spectra, damped solves. Needs the extra `curvature[operators]`.
"""

try:
    import lineax as _lineax  # noqa: F401
    import matfree as _matfree  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"curvature.operators needs {error.name}, which is not installed: install the extra "
        "'curvature[operators]'."
    ) from error

from curvature.operators.exact import (
    empirical_fisher,
    fisher,
    gauss_newton,
    hessian,
    pullback,
)
from curvature.operators.operator import Operator, to_dense
from curvature.operators.solvers import solve
from curvature.operators.spectra import (
    Eigenpairs,
    SpectralDensity,
    diagonal,
    spectral_density,
    top_eigenpairs,
    trace,
)

__all__ = [
    "Eigenpairs",
    "Operator",
    "SpectralDensity",
    "diagonal",
    "empirical_fisher",
    "fisher",
    "gauss_newton",
    "hessian",
    "pullback",
    "solve",
    "spectral_density",
    "to_dense",
    "top_eigenpairs",
    "trace",
]
