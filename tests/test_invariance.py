"""The natural-gradient path does not see how a net is written; gradient descent's does (fact I).

Affine re-parametrisations as in Martens and Grosse 2015, theorem 1: inputs x Omega + gamma, and in
every layer an activation squash(s Phi + tau) Omega + gamma in the place of squash(s). Exact dense
natural gradient in float64; K-FAC has the same test in test_facts.py (fact D).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from curvature import proximal

WIDTHS = (2, 3, 3, 2)
STEPS = 20


def identity_maps():
    """What nothing has been done to: the map of the inputs, then of each layer (in, out)."""
    inner = [((jnp.eye(d), jnp.zeros(d)), (jnp.eye(d), jnp.zeros(d))) for d in WIDTHS[1:]]
    return (jnp.eye(WIDTHS[0]), jnp.zeros(WIDTHS[0])), inner


def random_map(key, d):
    one, two = jax.random.split(key)
    matrix = jnp.diag(jnp.linspace(0.3, 2.0, d)) + 0.2 * jax.random.normal(one, (d, d))
    return matrix, 0.5 * jax.random.normal(two, (d,))


def maps_of(where):
    """Affine maps at the inputs, in the hidden layers, at the outputs, or in all these places."""
    keys = jax.random.split(jax.random.key(5), 8)
    inputs, layers = identity_maps()
    if where in ("inputs", "all"):
        inputs = random_map(keys[0], WIDTHS[0])
    if where in ("hidden", "all"):
        for i, d in enumerate(WIDTHS[1:-1]):
            layers[i] = (random_map(keys[2 * i + 1], d), random_map(keys[2 * i + 2], d))
    if where in ("outputs", "all"):
        layers[-1] = (random_map(keys[7], WIDTHS[-1]), layers[-1][1])
    return inputs, layers


def outputs(params, maps, x):
    (omega, gamma), layers = maps
    a = x @ omega + gamma
    for i, ((w, b), ((phi, tau), (omega, gamma))) in enumerate(zip(params, layers, strict=True)):
        s = (a @ w + b) @ phi + tau
        a = (jnp.tanh(s) if i < len(params) - 1 else s) @ omega + gamma
    return a


def rewritten(params, maps):
    """The parameters with which the net under `maps` is the function it was without them."""
    (omega, gamma), layers = maps
    new = []
    for (w, b), ((phi, tau), after) in zip(params, layers, strict=True):
        weight = jnp.linalg.solve(omega, w) @ jnp.linalg.inv(phi)
        bias = (b - tau) @ jnp.linalg.inv(phi) - gamma @ weight
        new.append((weight, bias))
        omega, gamma = after
    return new


def problem():
    keys = jax.random.split(jax.random.key(2), 8)
    params = [
        (jax.random.normal(k, (i, o)), 0.5 * jax.random.normal(jax.random.fold_in(k, 1), (o,)))
        for k, i, o in zip(keys, WIDTHS[:-1], WIDTHS[1:], strict=False)
    ]
    x = jax.random.normal(keys[6], (100, WIDTHS[0]))
    # Close enough for undamped steps: without damping nothing keeps a far one from leaping.
    teacher = outputs(jax.tree.map(lambda p: p + 0.2 * jnp.cos(9 * p), params), identity_maps(), x)
    return params, x, teacher + 0.05 * jax.random.normal(keys[7], teacher.shape)


def squared(z, y):
    return 0.5 * ((z - y) ** 2).sum(-1).mean()


def bernoulli(z, y):
    return optax.losses.sigmoid_binary_cross_entropy(z, jax.nn.sigmoid(y)).sum(-1).mean()


def bernoulli_kl(z, z0):
    return bernoulli(z, z0) - bernoulli(z0, z0)


FAMILIES = {"gaussian": (squared, squared), "bernoulli": (bernoulli, bernoulli_kl)}


@functools.cache
def stepper(family, natural):
    """One jitted step for all parametrisations; returns parameters and outputs."""
    _, x, y = problem()
    loss, rho = FAMILIES[family]

    @jax.jit
    def step(params, maps):
        f = lambda params: outputs(params, maps, x)  # noqa: E731
        if natural:
            v = proximal.natural_gradient_step(
                f, lambda z: loss(z, y), rho, params, 10.0, solver="dense"
            )
        else:
            v = jax.tree.map(lambda g: -0.1 * g, jax.grad(lambda p: loss(f(p), y))(params))
        params = optax.apply_updates(params, v)
        return params, f(params)

    return step


def path(params, maps, family, natural):
    found = []
    for _ in range(STEPS):
        params, z = stepper(family, natural)(params, maps)
        found.append(z)
    return jnp.stack(found)


@functools.cache
def plain_path(family, natural):
    return path(problem()[0], identity_maps(), family, natural)


PLACES = ["inputs", "hidden", "outputs", "all"]


@pytest.mark.parametrize("where", PLACES)
def test_the_function_is_the_same_to_begin_with(where):
    params, x, _ = problem()
    maps = maps_of(where)
    before = outputs(params, identity_maps(), x)
    np.testing.assert_allclose(outputs(rewritten(params, maps), maps, x), before, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", PLACES)
def test_i_the_natural_gradient_path_is_unchanged(family, where):
    maps = maps_of(where)
    there = path(rewritten(problem()[0], maps), maps, family, natural=True)
    here = plain_path(family, natural=True)
    assert here.shape[0] == STEPS
    assert float(jnp.abs(here[-1] - here[0]).max()) > 0.3  # it moved
    np.testing.assert_allclose(there, here, rtol=0, atol=1e-10)


@pytest.mark.parametrize("where", PLACES)
def test_i_control_the_path_of_gradient_descent_changes(where):
    maps = maps_of(where)
    there = path(rewritten(problem()[0], maps), maps, "gaussian", natural=False)
    here = plain_path("gaussian", natural=False)
    assert float(jnp.abs(there[0] - here[0]).max()) > 1e-2  # at the first step
    assert float(jnp.abs(there[-1] - here[-1]).max()) > 1e-2


def test_i_the_gradient_is_the_same_covector():
    """The slope along a change of the function is the same: what differs is gradients as steps."""
    params, x, y = problem()
    maps = maps_of("all")
    direction = jax.tree.map(lambda p: jnp.cos(7.0 * p), params)
    there, moved = jax.jvp(lambda p: rewritten(p, maps), (params,), (direction,))

    @jax.jit
    def slope(params, maps, direction):
        return jax.jvp(lambda p: squared(outputs(p, maps, x), y), (params,), (direction,))[1]

    here = slope(params, identity_maps(), direction)
    assert abs(float(here)) > 0.1
    np.testing.assert_allclose(slope(there, maps, moved), here, rtol=1e-12)


def test_i_under_a_smooth_change_of_parameters_natural_gradient_agrees_to_first_order():
    params, x, y = problem()
    w, unravel = ravel_pytree(params)

    def first_step(curve, inverse, natural, rate):
        f = lambda u: outputs(unravel(curve(u)), identity_maps(), x)  # noqa: E731
        u = inverse(w)
        if natural:
            v = proximal.natural_gradient_step(
                f, lambda z: squared(z, y), squared, u, 1 / rate, solver="dense"
            )
        else:
            v = -rate * jax.grad(lambda u: squared(f(u), y))(u)
        return f(u + v)

    @functools.partial(jax.jit, static_argnames="natural")
    def apart(natural, rate):
        one = first_step(lambda u: u, lambda w: w, natural, rate)
        two = first_step(lambda u: 0.5 * jnp.sinh(u), lambda w: jnp.arcsinh(2 * w), natural, rate)
        return jnp.linalg.norm(one - two)

    for natural, order in ((True, 2), (False, 1)):  # halving the rate
        ratio = float(apart(natural=natural, rate=1e-4) / apart(natural=natural, rate=5e-5))
        assert ratio == pytest.approx(2**order, rel=0.02)
