"""The estimator: kinds of curvature, and their statistics in every block."""

from curvature.estimator.estimator import Estimator
from curvature.estimator.kinds import EmpiricalFisher, Fisher, GaussNewton, Kind

__all__ = ["EmpiricalFisher", "Estimator", "Fisher", "GaussNewton", "Kind"]
