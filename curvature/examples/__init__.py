"""Data for examples and benchmarks that no download is needed for."""

from curvature.examples.curves import control_points, curves, draw

__all__ = ["control_points", "curves", "draw"]
