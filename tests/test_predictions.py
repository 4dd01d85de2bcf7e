"""The weight of a loss's predictions, and steps that are bounded by what one of them changes."""

import jax
import numpy as np
import optax
import pytest
from test_share import LOSSES, MANY, PARAMS, each

import curvature

EXAMPLES, POSITIONS, MASKED = 20, 2, 16
MEAN = float(each(PARAMS, *MANY[:2]).mean())
WEIGHTS = {
    "mean": POSITIONS,
    "sum": EXAMPLES * POSITIONS,
    "masked mean": POSITIONS,
    "masked sum": MASKED * POSITIONS,
    "not linear": POSITIONS * np.exp(MEAN / 10) / 10,
    "a mean and a sum": POSITIONS + EXAMPLES * POSITIONS * 3,
    "scanned": EXAMPLES * POSITIONS,
}


@pytest.mark.parametrize("share", [None, 0.25])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_weight_is_the_sum_of_the_loss_s_derivatives(loss, share):
    registry = curvature.register(LOSSES[loss], PARAMS, *MANY)
    estimator = curvature.Estimator(registry, curvature.EmpiricalFisher())
    found, weight = estimator.weighed_statistics(PARAMS, *MANY, share=share)
    np.testing.assert_allclose(weight, WEIGHTS[loss], rtol=1e-12)
    jax.tree.map(
        np.testing.assert_array_equal, found, estimator.statistics(PARAMS, *MANY, share=share)
    )


RECIPES = {
    "kfac": (lambda r, c: curvature.kfac(r, 1.0, damping=0.1 * c), 1.0),
    "relative": (lambda r, c: curvature.kfac(r, 1.0, damping=0.1, relative_damping=True), 1.0),
    "model": (
        lambda r, c: curvature.kfac(r, curvature.QuadraticModel(), damping=c, kl_clip=1e-4),
        1.0,
    ),
    "scale": (lambda r, c: curvature.scale_by_curvature(r, damping=0.1 * c, kl_clip=1e-3), -1.0),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_steps_do_not_depend_on_the_scale_of_the_loss(recipe):
    """A sum over pixels or examples is trained as a mean is, with the damping scaled alike."""
    make, sign = RECIPES[recipe]

    def trained(scale):
        def loss(params, *args):
            return scale * LOSSES["mean"](params, *args)

        registry = curvature.register(loss, PARAMS, *MANY)
        tx = make(registry, scale)
        params, state = PARAMS, tx.init(PARAMS)

        @jax.jit
        def step(params, state, key):
            grads = jax.grad(loss)(params, *MANY)
            updates, state = tx.update(grads, state, params, loss_args=tuple(MANY), key=key)
            return jax.tree.map(lambda p, u: p + sign * u, params, updates), state, updates

        lengths = []
        for i in range(4):
            params, state, updates = step(params, state, jax.random.key(i))
            lengths.append(float(optax.tree.norm(updates)))
        return params, lengths

    expected, lengths = trained(1.0)
    for scale in (1e-3, 784.0):
        found, others = trained(scale)
        np.testing.assert_allclose(others, lengths, rtol=1e-6)
        for name, x in found.items():
            np.testing.assert_allclose(x, expected[name], rtol=1e-6, atol=1e-9, err_msg=name)
