"""The registry: what is in a model, found in the trace of its loss function."""

from curvature.registry.layers import Layer
from curvature.registry.plan import LossTag
from curvature.registry.registry import Registry, check_registry, register

__all__ = ["Layer", "LossTag", "Registry", "check_registry", "register"]
