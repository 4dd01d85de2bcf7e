"""The estimator: kinds of curvature, and their statistics in every block."""

from curvature.statistics.estimator import Estimator
from curvature.statistics.kinds import EmpiricalFisher, Fisher, GaussNewton, Kind

__all__ = ["EmpiricalFisher", "Estimator", "Fisher", "GaussNewton", "Kind"]
