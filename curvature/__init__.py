"""Curvature for JAX: K-FAC and its relatives for any model, in any framework."""

from curvature import losses
from curvature.blocks import Block, BlockDiagonal, Diagonal, Kronecker
from curvature.estimator import EmpiricalFisher, Estimator, Fisher, GaussNewton
from curvature.kfac import CurvatureState, CurvatureStats, KFACState, kfac, scale_by_curvature
from curvature.registry import Layer, LossTag, Registry, register

__all__ = [
    "Block",
    "BlockDiagonal",
    "CurvatureState",
    "CurvatureStats",
    "Diagonal",
    "EmpiricalFisher",
    "Estimator",
    "Fisher",
    "GaussNewton",
    "KFACState",
    "Kronecker",
    "Layer",
    "LossTag",
    "Registry",
    "kfac",
    "losses",
    "register",
    "scale_by_curvature",
]
