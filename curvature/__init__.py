"""Curvature for JAX: K-FAC and its relatives for any model, in any framework."""

from curvature import losses, metrics, proximal
from curvature.adaptive import LevenbergMarquardt, QuadraticModel
from curvature.blocks import (
    Block,
    BlockDiagonal,
    Dense,
    Diagonal,
    EigenKronecker,
    Identity,
    Kronecker,
)
from curvature.checkpoint import averages, factors, with_factors
from curvature.comparison import Comparison, compare
from curvature.eigen_adam import eigen_adam
from curvature.eigenbasis import EigenbasisState, EigenbasisStats, in_eigenbasis
from curvature.estimator import EmpiricalFisher, Estimator, Fisher, GaussNewton
from curvature.kfac import KFACState, KFACStats, ekfac, foof, kfac
from curvature.placement import state_memory, state_shardings
from curvature.preconditioner import CurvatureState, CurvatureStats, scale_by_curvature
from curvature.progress import check_progress
from curvature.refresh import QR, Cholesky, Eigh, NewtonSchulz
from curvature.registry import Layer, LossTag, Registry, register
from curvature.shampoo import Shampoo
from curvature.tags import tag_layer

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
