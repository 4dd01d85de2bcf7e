"""What a gradient reaches: `flow.reaches_output` beside `jax.grad`."""

import jax
import jax.numpy as jnp
import pytest

from curvature import _jax, losses
from curvature.trace import liveness

X, Y = jnp.ones((4, 3)), jnp.zeros((4, 3))


def plain(p):
    return losses.l2_loss(X @ p["a"], Y).mean() + (p["b"] ** 2).sum()


def stopped(p):
    return losses.l2_loss(X @ jax.lax.stop_gradient(p["a"]) @ p["b"], Y).mean()


def whole_numbers(p):
    return losses.l2_loss(X @ p["b"], Y).mean() * (p["a"] > 1).sum().astype(X.dtype)


def aux(p):
    return losses.l2_loss(X @ p["b"], Y).mean(), (p["a"] ** 2).sum()


def carried(p):
    """The first loss that is read is the last but one step's: `a` needs two rounds."""

    def step(carry, _):
        return (carry[1], carry[1] @ p["b"]), None

    (one, _), _ = jax.lax.scan(step, (X, X @ p["a"]), None, length=3)
    return losses.l2_loss(one, Y).mean()


def branch(p):
    return jax.lax.cond(
        p["a"].sum() > 0, lambda b: losses.l2_loss(X @ b, Y).mean(), lambda b: 0.0, p["b"]
    )


def through_custom_jvp(p):
    stepped = jax.custom_jvp(lambda x: jax.lax.stop_gradient(x))
    stepped.defjvps(lambda t, ans, x: t)
    return losses.l2_loss(X @ stepped(p["a"]), Y).mean()


@pytest.mark.parametrize(
    ("loss", "reached"),
    [
        (plain, "ab"),
        (stopped, "b"),
        (whole_numbers, "b"),
        (aux, "b"),
        (carried, "ab"),
        (branch, "b"),
        (through_custom_jvp, "a"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_reaches_output(loss, reached):
    p = {"a": jnp.arange(9.0).reshape(3, 3), "b": jnp.eye(3) + 0.1}
    gradient = jax.grad(loss, has_aux=loss is aux)(p)
    gradient = gradient[0] if loss is aux else gradient
    assert "".join(k for k, g in gradient.items() if jnp.any(g != 0)) == reached
    jaxpr, _ = _jax.trace(loss, p)
    assert "".join(k for k, on in zip("ab", liveness.reaches_output(jaxpr), strict=True) if on) == (
        reached
    )
