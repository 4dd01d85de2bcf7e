"""Nothing of the library's own relies on JAX's promotion of ranks."""

import jax
import jax.numpy as jnp
import optax
import pytest

import curvature

X, Y = jax.random.normal(jax.random.key(0), (8, 4)), jnp.arange(8) % 3
PARAMS = {
    "first": jnp.full((4, 5), 0.3),
    "stack": jnp.stack([jnp.eye(5)] * 2),
    "scale": jnp.ones(5),
    "bias": jnp.zeros(5),
    "last": jnp.full((5, 3), 0.2),
}
BLOCKS = ["kronecker", "kronecker_reduce", "kronecker_weighted", "ekfac", "foof"]
BLOCKS += ["diagonal", "dense", "identity"]
METHODS = [
    curvature.Cholesky(1e-3),
    curvature.Eigh(1e-3),
    curvature.QR(factored=False),
    curvature.NewtonSchulz(),
]
LM = curvature.LevenbergMarquardt()
OPTIONS = [
    {"learning_rate": 0.1},
    {"learning_rate": curvature.QuadraticModel(), "damping": LM, "l2": 1e-3},
    {"learning_rate": 0.1, "relative_damping": True, "graft": optax.identity()},
]


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_rank_promotion("raise"):
        yield


def loss_fn(p, x, y):
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p["first"], p["stack"])
    z = (h * p["scale"][None] + p["bias"][None]) @ p["last"]
    return curvature.losses.softmax_cross_entropy_with_integer_labels(z, y).mean()


@pytest.mark.parametrize("block", BLOCKS)
def test_steps(block):
    registry, key = curvature.register(loss_fn, PARAMS, X, Y).with_blocks(block), jax.random.key(0)
    grads = jax.grad(loss_fn)(PARAMS, X, Y)
    for method in METHODS:
        for options in OPTIONS:
            tx = curvature.kfac(registry, refresh=method, **options)
            state = tx.init(PARAMS)
            jax.eval_shape(
                lambda state, key, tx=tx: tx.update(
                    grads, state, PARAMS, loss_args=(X, Y), key=key
                ),
                state,
                key,
            )


@pytest.mark.parametrize("block", BLOCKS)
def test_operators(block):
    registry = curvature.register(loss_fn, PARAMS, X, Y).with_blocks(block)

    @jax.eval_shape
    def _():
        op = curvature.Estimator(registry, curvature.GaussNewton(probes=1))(
            PARAMS, X, Y, key=jax.random.key(0)
        )
        products = op @ PARAMS, op.solve(PARAMS, 0.1), op.power(PARAMS, -0.5, 0.1)
        dense = [block.to_dense() for block in op.blocks.values()]
        figures = op.trace(), op.logdet(0.1), op.eigenvalues(), op.diagonal()
        return products, dense, figures, op.damped_inverse(0.1) @ PARAMS
