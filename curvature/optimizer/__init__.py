"""Optimizers: running averages of curvature, their inverses and eigenbases, and steps by them."""

from curvature.optimizer.adaptive import LevenbergMarquardt, QuadraticModel
from curvature.optimizer.checkpoint import averages, factors, with_factors
from curvature.optimizer.descent import KFACState, KFACStats
from curvature.optimizer.eigen_adam import eigen_adam
from curvature.optimizer.eigenbasis import EigenbasisState, EigenbasisStats, in_eigenbasis
from curvature.optimizer.kfac import ekfac, foof, kfac
from curvature.optimizer.placement import state_memory, state_shardings
from curvature.optimizer.preconditioner import CurvatureState, CurvatureStats
from curvature.optimizer.progress import check_progress
from curvature.optimizer.refresh import QR, Cholesky, Eigh, NewtonSchulz
from curvature.optimizer.scale_by_curvature import scale_by_curvature
from curvature.optimizer.shampoo import Shampoo

__all__ = [
    "QR",
    "Cholesky",
    "CurvatureState",
    "CurvatureStats",
    "EigenbasisState",
    "EigenbasisStats",
    "Eigh",
    "KFACState",
    "KFACStats",
    "LevenbergMarquardt",
    "NewtonSchulz",
    "QuadraticModel",
    "Shampoo",
    "averages",
    "check_progress",
    "eigen_adam",
    "ekfac",
    "factors",
    "foof",
    "in_eigenbasis",
    "kfac",
    "scale_by_curvature",
    "state_memory",
    "state_shardings",
    "with_factors",
]
