"""Random expressions of parameters: nothing raises, and the other spelling has the loss's value."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal

import curvature
from curvature import _jax

SHAPES = {
    "w": (3, 3),
    "u": (3, 3),
    "g": (3,),
    "r": (3, 1),
    "s": (),
    "a": (3, 2),
    "b": (2, 3),
    "t": (2, 3, 3),
}
PARAMS = {name: normal(i, *shape) for i, (name, shape) in enumerate(SHAPES.items())}
X = normal(9, 4, 3)
LEAVES = [
    *(lambda p, name=name: p[name] for name in "wugrs"),
    lambda p: p["a"] @ p["b"],
    lambda p: p["t"].sum(0),
    lambda p: p["t"][1],
    lambda p: 2.0 * p["w"].T,
    lambda p: jnp.ones((3, 3)),
]
NODES = [
    lambda f, g: f + g,
    lambda f, g: f - g,
    lambda f, g: f * g,
    lambda f, g: f / (1 + g**2),
    lambda f, g: -f,
    lambda f, g: jnp.tanh(f),
    lambda f, g: f.sum(),
    lambda f, g: f.sum(0) if f.ndim else f,
    lambda f, g: f / jnp.sqrt((f**2).sum() + 1),
    lambda f, g: f.T,
    lambda f, g: f * jnp.tril(jnp.ones((3, 3))),
    lambda f, g: f.reshape(f.shape[::-1]),
]
MEETINGS = [
    lambda x, w, p: x @ w,
    lambda x, w, p: x * w[0],
    lambda x, w, p: x + w[:, 0],
    lambda x, w, p: jnp.einsum("bi,io->bo", x, w) @ p["u"],
    lambda x, w, p: w[jnp.argsort(x, 1)[:, 0]],
]


def expression(rng, depth):
    """A function of the parameters that broadcasts to 3 x 3, most of the time."""
    if depth == 0 or rng.random() < 0.15:
        return rng.choice(LEAVES)
    node, f, g = rng.choice(NODES), expression(rng, depth - 1), expression(rng, depth - 1)
    return lambda p: node(f(p), g(p))


def value_of(jaxpr, inputs):
    env = dict(zip((*jaxpr.invars, *jaxpr.constvars), (*inputs, *jaxpr.consts), strict=True))

    def read(atom):
        return atom.val if isinstance(atom, _jax.Literal) else env[atom]

    for equation in jaxpr.equations:
        outs = _jax.bind(equation, [read(v) for v in equation.invars])
        env.update(zip(equation.outvars, outs, strict=True))
    return read(jaxpr.outvars[0])


@pytest.mark.parametrize("seed", range(3))
def test_random_weights(seed, standard_promotion):
    rng = random.Random(seed)
    tried = 0
    for _ in range(60):
        weight, meeting = expression(rng, 3), rng.choice(MEETINGS)

        def loss_fn(p, x, weight=weight, meeting=meeting):
            z = meeting(x, jnp.broadcast_to(weight(p), (3, 3)), p)
            return curvature.losses.squared_error(jnp.tanh(z)).mean()

        try:
            gradient = jax.grad(loss_fn)(PARAMS, X)
        except (TypeError, ValueError):  # shapes that do not broadcast
            continue
        if not any(np.any(g) for g in jax.tree.leaves(gradient)):
            continue
        registry = curvature.register(loss_fn, PARAMS, X)
        program = registry.analyse(PARAMS, (X,)).program
        found = value_of(program.jaxpr, [*jax.tree.leaves(PARAMS), X])
        np.testing.assert_allclose(found, loss_fn(PARAMS, X), rtol=1e-9)
        tried += 1
    assert tried > 20
