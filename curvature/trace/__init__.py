"""The registry: what is in a model, found in the trace of its loss function."""

from curvature.trace.layers import Layer
from curvature.trace.program import LossTag
from curvature.trace.registry import Registry, check_registry, register

__all__ = ["Layer", "LossTag", "Registry", "check_registry", "register"]
