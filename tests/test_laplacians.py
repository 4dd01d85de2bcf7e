"""Derivatives inside the loss: uses that do not see the data are once for every example.

A physics-informed net has its layers in derivatives with respect to the inputs. The tangent of an
input, a unit vector, is the same for all examples; what a layer makes of it meets the data later.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import N, normal

import curvature

PARAMS = {
    "w": normal(0, 2, 5),
    "b": normal(1, 5),
    "u": normal(2, 5, 4) / 2,
    "c": normal(3, 4),
    "v": normal(4, 4, 1),
}
X = normal(6, N, 2)


def net(p, x):
    return jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ p["u"] + p["c"]) @ p["v"]


def of_one(p):
    return lambda x: net(p, x[None])[0, 0]


def by_hessian(p, x):
    return jax.vmap(lambda x: jnp.trace(jax.hessian(of_one(p))(x)))(x)


def by_jvp_of_gradients(p, x):
    def one(x):
        slope = jax.grad(of_one(p))
        return sum(jax.jvp(slope, (x,), (e,))[1] @ e for e in jnp.eye(2))

    return jax.vmap(one)(x)


def by_jvp_twice(p, x):
    def second(e):
        t = jnp.broadcast_to(e, x.shape)
        first = lambda x: jax.jvp(lambda x: net(p, x)[:, 0], (x,), (t,))[1]  # noqa: E731
        return jax.jvp(first, (x,), (t,))[1]

    return second(jnp.eye(2)[0]) + second(jnp.eye(2)[1])


def in_a_loop(p, x):
    def one(x):
        _, along = jax.linearize(jax.grad(of_one(p)), x)
        return jax.lax.fori_loop(0, 2, lambda i, v: v + along(jnp.eye(2)[i])[i], 0.0)

    return jax.vmap(one)(x)


def learned_queries(p, x):
    """Attention of two learned queries to five rows made of each example."""
    query = jnp.stack([p["b"], p["b"] ** 2])[:, :4] @ p["u"][:4]
    rows = jnp.tanh(jnp.einsum("nd,de->ne", x, p["w"]))[:, :, None] * p["c"]
    weights = jax.nn.softmax(jnp.einsum("qe,nke->nqk", query, rows))
    return jnp.einsum("nqk,nke,eo->n", weights, rows, p["v"])


LAPLACIANS = [by_hessian, by_jvp_of_gradients, by_jvp_twice, in_a_loop]


@pytest.mark.parametrize("block", ["dense", "diagonal"])
@pytest.mark.parametrize("model", LAPLACIANS, ids=lambda f: f.__name__)
def test_layers_see_every_example(model, block):
    """Exact, without a random key; biases are in one block with their weights."""

    def losses(p, x):
        return curvature.losses.squared_error(model(p, x) - 1.0)

    registry = curvature.register(lambda p, x: losses(p, x).mean(), PARAMS, X)
    assert registry.coverage == 1
    assert not any(layer.unbatched for layer in registry.layers), str(registry)
    assert {layer.name for layer in registry.layers if layer.bias} == {"w", "u"}
    registry = registry.with_blocks(block)
    op = jax.jit(curvature.Estimator(registry, curvature.EmpiricalFisher()))(PARAMS, X)
    each = jax.vmap(jax.grad(lambda p, x: losses(p, x[None])[0]), in_axes=(None, 0))(PARAMS, X)
    for layer in registry.layers:
        leaves = jax.tree.leaves(each)
        rows = jax.vmap(lambda *leaves, layer=layer: layer.gather(leaves).ravel())(*leaves)
        expected = rows.T @ rows / N
        if block == "diagonal":
            expected = np.diag(np.diag(expected))
        found = op.blocks[layer.name].to_dense()
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11 * np.abs(expected).max())


def test_tangents_have_no_bias():
    """Kronecker factors: rows of tangents and cotangents have a zero where others have a one."""

    def loss_fn(p, x):
        return curvature.losses.squared_error(by_jvp_twice(p, x) - 1.0).mean()

    registry = curvature.register(loss_fn, PARAMS, X)
    estimator = curvature.Estimator(registry, curvature.GaussNewton())
    found = estimator.statistics(PARAMS, X)["w"]
    uses = next(layer.uses for layer in registry.layers if layer.name == "w")
    assert float(found["rows"]) == uses * N
    np.testing.assert_allclose(found["input"][-1, -1], 2 * N)  # of one use a direction


def test_what_still_does_not_see_the_data_is_said():
    """A query that meets itself before it meets the data."""

    def loss_fn(p, x):
        query = jnp.tanh(jnp.ones((1, 2)) @ p["w"])
        z = (x @ p["w"] * query) @ p["u"] @ p["v"]
        return curvature.losses.squared_error(z[:, 0]).mean()

    params = {name: PARAMS[name] for name in "wuv"}
    registry = curvature.register(loss_fn, params, X)
    assert "do not see the data, or not all examples at once" in str(registry)
    estimator = curvature.Estimator(registry, curvature.EmpiricalFisher())
    with pytest.raises(ValueError, match="'w' is used where it does not see the data"):
        estimator.statistics(params, X)


def test_learned_queries_see_every_example():
    def losses(p, x):
        return curvature.losses.squared_error(learned_queries(p, x) - 1.0)

    registry = curvature.register(lambda p, x: losses(p, x).mean(), PARAMS, X)
    assert not any(layer.unbatched for layer in registry.layers if "u" in layer.name), str(registry)
