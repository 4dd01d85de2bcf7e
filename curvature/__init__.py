"""Curvature for JAX: K-FAC and its relatives for any model, in any framework."""

import importlib
from typing import TYPE_CHECKING, Any

from curvature import losses, metrics
from curvature.block_diagonal import BlockDiagonal
from curvature.blocks import (
    Block,
    Dense,
    Diagonal,
    EigenKronecker,
    Identity,
    Kronecker,
)
from curvature.optimizer import (
    QR,
    Cholesky,
    CurvatureState,
    CurvatureStats,
    EigenbasisState,
    EigenbasisStats,
    Eigh,
    KFACState,
    KFACStats,
    LevenbergMarquardt,
    NewtonSchulz,
    QuadraticModel,
    Shampoo,
    averages,
    check_progress,
    eigen_adam,
    ekfac,
    factors,
    foof,
    in_eigenbasis,
    kfac,
    scale_by_curvature,
    state_memory,
    state_shardings,
    with_factors,
)
from curvature.statistics import EmpiricalFisher, Estimator, Fisher, GaussNewton
from curvature.trace import Layer, LossTag, Registry, register
from curvature.trace.tags import tag_layer

if TYPE_CHECKING:
    from curvature import proximal
    from curvature.comparison.compare import compare
    from curvature.comparison.result import Comparison
else:  # or a type checker would take any name for one of this module
    # What a training run does without is imported at its first use: it costs time.
    _LATE = {
        "Comparison": "curvature.comparison",
        "compare": "curvature.comparison",
        "comparison": "curvature",
        "proximal": "curvature",
    }

    def __getattr__(name: str) -> Any:
        if name not in _LATE:
            raise AttributeError(f"module 'curvature' has no attribute {name!r}")
        if _LATE[name] == "curvature":
            return importlib.import_module(f"curvature.{name}")
        globals()[name] = found = getattr(importlib.import_module(_LATE[name]), name)
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *_LATE})


__version__ = "0.2.0"  # the one place: pyproject.toml reads it

__all__ = [
    "QR",
    "Block",
    "BlockDiagonal",
    "Cholesky",
    "Comparison",
    "CurvatureState",
    "CurvatureStats",
    "Dense",
    "Diagonal",
    "EigenKronecker",
    "EigenbasisState",
    "EigenbasisStats",
    "Eigh",
    "EmpiricalFisher",
    "Estimator",
    "Fisher",
    "GaussNewton",
    "Identity",
    "KFACState",
    "KFACStats",
    "Kronecker",
    "Layer",
    "LevenbergMarquardt",
    "LossTag",
    "NewtonSchulz",
    "QuadraticModel",
    "Registry",
    "Shampoo",
    "averages",
    "check_progress",
    "compare",
    "eigen_adam",
    "ekfac",
    "factors",
    "foof",
    "in_eigenbasis",
    "kfac",
    "losses",
    "metrics",
    "proximal",
    "register",
    "scale_by_curvature",
    "state_memory",
    "state_shardings",
    "tag_layer",
    "with_factors",
]
