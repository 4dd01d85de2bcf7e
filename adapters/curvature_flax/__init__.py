"""Curvature for Flax: `curvature_flax.linen` and `curvature_flax.nnx`.

The backend needs no adapter to find Flax layers; these modules fit its optimizers into the training
loops that Flax users write.
"""

try:
    import flax as _flax  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"curvature_flax needs {error.name}, which is not installed: install the extra "
        "'curvature[flax]'."
    ) from error
