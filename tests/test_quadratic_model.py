"""The quadratic model of a step's batch: whose curvature, and how far it is trusted."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal

import curvature
from curvature import operators
from curvature.optimizer import quadratic

L = curvature.losses
LM, MODEL = curvature.LevenbergMarquardt(), curvature.QuadraticModel()
EXACT = curvature.Fisher(samples=None)
KEY = jax.random.key(0)
X = normal(0, 32, 5)
PARAMS = {"w": 0.3 * normal(1, 5, 8), "c": 0.3 * normal(2, 8, 3)}
cross_entropy = L.softmax_cross_entropy_with_integer_labels


def first_step(tx, grads, params, args):
    return jax.jit(tx.update)(grads, tx.init(params), params, loss_args=args, key=KEY)


def dot(a, b):
    return sum(float(jnp.vdot(x, y)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


# Whose curvature ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        EXACT,
        curvature.GaussNewton(),
        curvature.GaussNewton(metric=curvature.metrics.Euclidean(2.0)),
        curvature.EmpiricalFisher(),
    ],
    ids=["fisher", "gauss-newton", "metric", "empirical"],
)
def test_the_quadratic_model_is_that_of_the_kind(kind):
    """One linear layer, an exponential likelihood: F_z is 1, H_z the target over the rate."""

    def nll(p, x, y):
        return L.exponential_nll((x @ p["w"])[:, 0], y).mean()

    params, x = {"w": jnp.full((3, 1), 0.2)}, X[:, :3]
    y = jnp.full(32, 50.0)
    registry = curvature.register(nll, params, x, y)
    grads = jax.grad(nll)(params, x, y)
    tx = curvature.kfac(registry, MODEL, 0.0, damping=0.1, kind=kind, kl_clip=None)
    _, state = first_step(tx, grads, params, (x, y))
    z = (x @ params["w"])[:, 0]
    empirical = isinstance(kind, curvature.EmpiricalFisher)
    exact = {"Fisher": jnp.ones(32), "GaussNewton": y * jnp.exp(z)}
    values = exact["Fisher" if empirical else type(kind).__name__]
    if getattr(kind, "metric", None) is not None:
        values = jnp.full(32, 2.0)
    matrix = np.einsum("n,ni,nj->ij", values / 32, x, x) + 0.1 * np.eye(3)
    direction = first_step(curvature.scale_by_curvature(registry, kind, damping=0.1), grads,
                           params, (x, y))[0]["w"][:, 0]  # fmt: skip
    g = np.asarray(grads["w"][:, 0])
    rate = g @ direction / (direction @ matrix @ direction)
    np.testing.assert_allclose(state.stats.learning_rate, rate, rtol=1e-8)


# How far it is trusted ---------------------------------------------------------------------------


def test_the_models_scale_is_the_mean_squared_error_of_a_prediction():
    """Of several losses with weights, one of them in a scan; other losses have no such scale."""

    def several(p, x, y):
        def one(total, t):
            return total - 0.2 * L.l2_loss(t @ p).mean(), None

        total, _ = jax.lax.scan(one, 0.3 * L.l2_loss(x @ p, y).sum() / 7, x[None])
        return total + 2 * cross_entropy(x @ p, jnp.zeros(4, int)).mean()

    x, y, p = normal(0, 4, 3), normal(1, 4, 2), normal(2, 3, 2)
    step = normal(3, 3, 2)
    found = quadratic.along(several, False, p, (x, y), step, [step], jnp.asarray(0.1))
    squares = np.square(np.stack([x @ p - y, x @ p])) / 2
    weights = np.array([0.3 / 7, 0.2 / 8])
    mean = np.einsum("i,ijk->", weights, squares) / (weights.sum() * y.size + 2)
    np.testing.assert_allclose(found.excess, mean, rtol=1e-12)


def test_what_is_masked_does_not_count_for_the_models_scale():
    """A target of NaN is left out, and the step is taken."""

    def masked(p, x, y):
        return jnp.where(jnp.isnan(y), 0, L.l2_loss(x @ p, y)).sum()

    x, y, p = normal(0, 4, 3), jnp.array([[0.0], [jnp.nan], [2.0], [1.0]]), normal(2, 3, 1)
    found = quadratic.along(masked, False, p, (x, y), p, [p], jnp.asarray(0.1))
    np.testing.assert_allclose(found.excess, masked(p, x, y) / 3, rtol=1e-12)


def test_labels_that_are_left_out_stop_no_step(standard_promotion):
    def loss_fn(p, x, y):
        losses = cross_entropy(x @ p, y)
        return jnp.where(y >= 0, losses, 0.0).sum() / 3

    p, args = normal(2, 3, 3), (normal(0, 4, 3), jnp.array([0, -100, 2, 1]))
    registry = curvature.register(loss_fn, p, *args)
    for damping in (1e-3, LM):
        tx = curvature.kfac(registry, MODEL, damping=damping)
        key, grads = jax.random.key(0), jax.grad(loss_fn)(p, *args)
        updates, state = jax.jit(tx.update)(grads, tx.init(p), p, loss_args=args, key=key)
        assert state.stats.skipped == 0
        assert loss_fn(optax.apply_updates(p, updates), *args) < loss_fn(p, *args)


@pytest.mark.parametrize("scale", [0.1, 100.0])
@pytest.mark.parametrize(("damping", "bound"), [(1e-3, 3e-2), (LM, 0.3)], ids=["number", "LM"])
def test_a_step_by_the_model_is_bounded_by_default(damping, bound, scale, standard_promotion):
    """Where the loss is looked at, by a multiple of large squared errors."""

    def loss_fn(p, x, t):
        return 3 * L.l2_loss(jnp.tanh(x @ p["w"]) @ p["c"], t).mean()

    targets = scale * X[:, :3]
    registry = curvature.register(loss_fn, PARAMS, X, targets)
    grads = jax.tree.map(lambda g: 9 * g, jax.grad(loss_fn)(PARAMS, X, targets))  # too far
    tx = curvature.kfac(registry, MODEL, damping=damping, kind=EXACT)
    step, state = first_step(tx, grads, PARAMS, (X, targets))
    assert state.stats.clipped < 1
    lam = state.stats.damping
    op = operators.gauss_newton(registry, PARAMS, [(X, targets)])
    length = dot(step, op @ step) + lam * dot(step, step)
    of_prediction = float(loss_fn(PARAMS, X, targets)) / 3
    assert (of_prediction > 1) == (scale > 1)
    bound *= max(of_prediction, 1) if damping is LM else 1
    np.testing.assert_allclose(length / 2 / 3, bound, rtol=1e-6)


@pytest.mark.parametrize(
    ("activation", "noise", "options"),
    [
        (jax.nn.relu, 0.0, {}),  # 2e16 after 20 steps without a bound
        (jax.nn.relu, 0.0, {"damping": 1e-2, "momentum": 0.0}),
        (jnp.tanh, 0.3, {"damping": LM}),  # 30 without
    ],
    ids=["model", "own damping", "LevenbergMarquardt"],
)
def test_a_quadratic_model_of_eight_examples_does_not_lose_the_run(activation, noise, options):
    """Its own batch is all it knows: steps that are far too long for all others are bounded."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(512, 10)).astype(np.float32)
    y = np.argmax(x @ draw.normal(size=(10, 5)), 1)
    y = jnp.asarray(np.where(draw.random(512) < noise, draw.integers(0, 5, 512), y), jnp.int32)
    x, sizes = jnp.asarray(x), (10, 32, 32, 5)

    def loss_fn(p, x, y):
        for w in p[:-1]:
            x = activation(x @ w)
        return cross_entropy(x @ p[-1], y).mean()

    def start(seed):
        keys = jax.random.split(jax.random.key(seed), 3)
        pairs = zip(keys, sizes, sizes[1:], strict=False)
        return [jax.random.normal(k, (a, b), jnp.float32) / a**0.5 for k, a, b in pairs]

    tx = curvature.kfac(curvature.register(loss_fn, start(0), x[:8], y[:8]), MODEL, **options)

    @jax.jit
    def run(seed):
        params = start(seed)

        def step(carry, key):
            params, state = carry
            chosen = jax.random.randint(key, (8,), 0, len(x))
            batch = x[chosen], y[chosen]
            grads = jax.grad(loss_fn)(params, *batch)
            updates, state = tx.update(grads, state, params, loss_args=batch, key=key)
            params = optax.apply_updates(params, updates)
            return (params, state), loss_fn(params, x, y)

        keys = jax.random.split(jax.random.key(seed), 300)
        losses = jax.lax.scan(step, (params, tx.init(params)), keys)[1]
        return loss_fn(params, x, y), losses

    for seed in range(3):
        before, losses = run(seed)
        assert losses.max() < 1.5 * before
        assert losses[-20:].mean() < before
