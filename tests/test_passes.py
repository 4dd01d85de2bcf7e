"""Backward passes in groups: what does not depend on the draw is done once."""

import jax
import jax.numpy as jnp
import pytest
from cases import normal

import curvature
from curvature import _jax
from curvature.statistics.passes import AT_ONCE, sum_passes

PARAMS = {"first": normal(0, 3, 4), "second": normal(1, 4, 4), "last": normal(2, 4, 70)}
DATA = normal(3, 5, 3), jnp.arange(5)


def loss_fn(params, x, y):
    h = jnp.tanh(jnp.tanh(x @ params["first"]) @ params["second"])
    return curvature.losses.softmax_cross_entropy_with_integer_labels(h @ params["last"], y).mean()


@pytest.mark.parametrize("passes", [1, 2, AT_ONCE, AT_ONCE + 1, 2 * AT_ONCE, 2 * AT_ONCE + 6])
def test_the_sum_is_that_of_the_passes_one_by_one(passes):
    draws = normal(4, passes, 3), jax.random.split(jax.random.key(5), passes)

    def one(draw):
        x, key = draw
        return {"both": jnp.sin(PARAMS["first"].T @ x), "drawn": jax.random.normal(key), "no": 2.0}

    found = sum_passes(one, draws, passes)
    expected = [one((draws[0][i], draws[1][i])) for i in range(passes)]
    for name, value in found.items():
        total = sum(x[name] for x in expected)
        assert jnp.allclose(value, total, rtol=1e-12, atol=1e-12), name


def test_groups_repeat_neither_the_forward_pass_nor_moments_of_inputs():
    registry = curvature.register(loss_fn, PARAMS, *DATA)
    estimator = curvature.Estimator(registry, curvature.Fisher(samples=None))
    jaxpr, _ = _jax.trace(estimator.statistics, PARAMS, *DATA)
    assert [e.primitive.name for e in equations(jaxpr)].count("tanh") == 2
    (loop,) = [e for e in jaxpr.equations if e.primitive.name == "scan"]
    (body,) = _jax.nested(loop)
    grams = [e.outvars[0].aval.shape[1:] for e in equations(body) if is_gram(e)]
    assert sorted(grams) == [(4, 4), (4, 4), (70, 70)]  # of cotangents: no (3, 3), no third (4, 4)


def test_statistics_in_groups_are_those_of_the_exact_fisher():
    registry = curvature.register(loss_fn, PARAMS, *DATA).with_blocks(lambda layer: "dense")
    exact = curvature.Estimator(registry, curvature.Fisher(samples=None))(PARAMS, *DATA)

    def logits(params):
        h = jnp.tanh(jnp.tanh(DATA[0] @ params["first"]) @ params["second"])
        return h @ params["last"]

    probabilities = jax.nn.softmax(logits(PARAMS))
    jacobians = jax.jacobian(logits)(PARAMS)
    fisher = [jnp.diag(p) - jnp.outer(p, p) for p in probabilities]
    for name, j in jacobians.items():
        j = j.reshape((5, 70, -1))
        expected = sum(j[n].T @ fisher[n] @ j[n] for n in range(5)) / 5
        vector = normal(6, *PARAMS[name].shape)
        other = {k: jnp.zeros_like(x) for k, x in PARAMS.items()}
        found = (exact @ (other | {name: vector}))[name]
        assert jnp.allclose(found.ravel(), expected @ vector.ravel(), rtol=1e-10, atol=1e-12)


def is_gram(equation):
    if equation.primitive.name != "dot_general":
        return False
    left, right = (x.aval.shape for x in equation.invars)
    return left == right and len(left) > 2


def equations(jaxpr):
    """All equations of a jaxpr, and of one of every conditional's branches."""
    for equation in jaxpr.equations:
        yield equation
        bodies = _jax.nested(equation)
        for body in bodies[:1] if equation.primitive.name == "cond" else bodies:
            yield from equations(body)
