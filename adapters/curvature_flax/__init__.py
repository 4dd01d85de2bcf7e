"""Curvature for Flax: `curvature_flax.linen` and `curvature_flax.nnx`.

The backend needs no adapter to find Flax layers; these modules fit its optimizers into the training
loops that Flax users write.
"""
