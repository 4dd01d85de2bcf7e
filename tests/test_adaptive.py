"""The quadratic model, damping by the reduction ratio, steps by the model, and the clip."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

import curvature
from curvature.optimizer import quadratic

KEYS = jax.random.split(jax.random.key(0), 6)
X, Y = jax.random.normal(KEYS[0], (8, 3)), jnp.arange(8) % 4
PARAMS = {"w": jax.random.normal(KEYS[1], (3, 5)), "v": jax.random.normal(KEYS[2], (5, 4))}


def net(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"]


def loss_fn(p, x, y):
    losses = curvature.losses.softmax_cross_entropy_with_integer_labels(net(p, x), y)
    return losses.mean()


REGISTRY = curvature.register(loss_fn, PARAMS, X, Y)
gradient = jax.jit(jax.grad(loss_fn))
GRADS = gradient(PARAMS, X, Y)


@jax.jit
def gauss_newton(params):
    """The dense J'HJ of the mean loss."""
    flat, unravel = ravel_pytree(params)
    z = net(params, X)
    losses = lambda z: optax.losses.softmax_cross_entropy_with_integer_labels(z, Y).mean()  # noqa: E731
    hessian = jax.hessian(lambda z: losses(z.reshape(8, 4)))(z.ravel())
    jacobian = jax.jacrev(lambda w: net(unravel(w), X).ravel())(flat)
    return jacobian.T @ hessian @ jacobian


def directions(count):
    def one(i):
        return jax.tree.map(lambda x: jax.random.normal(KEYS[3 + i], x.shape), PARAMS)

    return [one(i) for i in range(count)]


def flat(tree):
    return ravel_pytree(tree)[0]


def model(steps, damping=0.3):
    lam = jnp.asarray(damping)
    along = lambda steps: quadratic.along(loss_fn, False, PARAMS, (X, Y), GRADS, steps, lam)  # noqa: E731
    return jax.jit(along)(steps)


def test_the_quadratic_model_is_that_of_dense_matrices():
    steps = directions(3)
    found = model(steps)
    d = np.stack([flat(s) for s in steps])
    matrix = d @ (gauss_newton(PARAMS) + 0.3 * np.eye(35)) @ d.T
    np.testing.assert_allclose(found.matrix, matrix, rtol=1e-12)
    np.testing.assert_allclose(found.linear, d @ flat(GRADS), rtol=1e-12)
    c = jnp.array([1.0, -2.0, 0.5])
    np.testing.assert_allclose(found(c), c @ d @ flat(GRADS) + c @ matrix @ c / 2, rtol=1e-12)
    np.testing.assert_allclose(found.length(c), c @ matrix @ c, rtol=1e-12)
    np.testing.assert_allclose(
        found.minimiser(), -np.linalg.solve(matrix, d @ flat(GRADS)), rtol=1e-9
    )


def test_the_minimiser_leaves_out_what_is_zero_or_double():
    (one,) = directions(1)
    nothing = jax.tree.map(jnp.zeros_like, one)
    alone = model([one]).minimiser()[0]
    np.testing.assert_allclose(model([one, nothing]).minimiser(), [alone, 0], rtol=1e-9)
    np.testing.assert_allclose(model([one, one]).minimiser().sum(), alone, rtol=1e-9)


def run(tx, steps, params=PARAMS):
    """(parameters, updates, state) after every step; and how often it was compiled."""
    compiled = []

    @jax.jit
    def step(params, state, key):
        compiled.append(1)
        grads = jax.grad(loss_fn)(params, X, Y)
        updates, state = tx.update(grads, state, params, loss_args=(X, Y), key=key)
        return optax.apply_updates(params, updates), updates, state

    history, state = [], tx.init(params)
    for i in range(steps):
        params, updates, state = step(params, state, jax.random.key(i))
        history.append((params, updates, state))
    assert len(compiled) == 1
    return history


def test_rate_and_momentum_minimise_the_model_over_both_directions():
    always = {"statistics_every": 1, "refresh_every": 1, "kl_clip": None}
    tx = curvature.kfac(REGISTRY, curvature.QuadraticModel(), damping=0.05, **always)
    first, second = run(tx, 2)
    params, previous, state = first
    grads = jax.grad(loss_fn)(params, X, Y)
    g, matrix = flat(grads), gauss_newton(params) + 0.05 * np.eye(35)
    step, latest = flat(second[1]), second[2].latest
    direction = (step - latest.momentum * flat(previous)) / latest.learning_rate
    basis = np.stack([direction, flat(previous)])
    best = -np.linalg.solve(basis @ matrix @ basis.T, basis @ g)
    np.testing.assert_allclose([latest.learning_rate, latest.momentum], best, rtol=1e-8)
    scale = curvature.scale_by_curvature(REGISTRY, damping=0.05)
    expected, _ = scale.update(
        grads, state.curvature, params, loss_args=(X, Y), key=jax.random.key(1)
    )
    np.testing.assert_allclose(direction, -flat(expected), rtol=1e-8)
    assert first[2].latest.momentum == 0  # there was no step before


def test_without_momentum_only_the_rate_is_chosen():
    tx = curvature.kfac(REGISTRY, curvature.QuadraticModel(), 0.0, damping=0.05)
    assert all(state.stats.momentum == 0 for _, _, state in run(tx, 3))


def digits():
    data = load_digits()
    return jnp.asarray(data.data / 16), jnp.asarray(data.target)


def deep_params():
    """Martens and Grosse's small net."""
    sizes, rng = [64, 20, 20, 20, 20, 20, 10], np.random.default_rng(0)
    return [
        {"w": jnp.asarray(rng.normal(size=(a, b)) / np.sqrt(a)), "b": jnp.zeros(b)}
        for a, b in itertools.pairwise(sizes)
    ]


def deep_logits(p, x):
    *hidden, last = p
    for layer in hidden:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def deep_loss(p, x, y):
    losses = curvature.losses.softmax_cross_entropy_with_integer_labels(deep_logits(p, x), y)
    return losses.mean()


LM = curvature.LevenbergMarquardt


@pytest.mark.parametrize("rate", [0.3, curvature.QuadraticModel()], ids=["rate", "model"])
def test_the_damping_follows_the_measured_reduction_ratio(rate):
    lm = LM(initial=0.5, every=3, factor=0.8)
    tx = curvature.kfac(REGISTRY, rate, damping=lm)
    history = run(tx, 9)
    before, damping, fresh = PARAMS, 0.5, 0.0
    for t, (params, updates, state) in enumerate(history, 1):
        if t % 3 == 0:
            v, g = flat(updates), flat(gradient(before, X, Y))
            matrix = gauss_newton(before) + damping * np.eye(35)
            ratio = (loss_fn(params, X, Y) - loss_fn(before, X, Y)) / (g @ v + v @ matrix @ v / 2)
            np.testing.assert_allclose(state.stats.reduction_ratio, ratio, rtol=1e-8)
            confirmed = fresh >= (0.25 if rate == 0.3 else 0)
            damping *= 0.8**3 if ratio > 0.75 and confirmed else 0.8**-3 if ratio < 0.25 else 1
        np.testing.assert_allclose(state.next_damping, damping, rtol=1e-12)
        before, fresh = params, state.stats.next_batch_ratio
    assert damping != 0.5


@pytest.mark.parametrize(
    "ratio, damping, expected",
    [
        (0.9, 1.0, 0.5),
        (0.5, 1.0, 1.0),
        (0.1, 1.0, 2.0),
        (-3.0, 1.0, 2.0),
        (np.nan, 1.0, 2.0),
        (0.9, 1e-3, 1e-3),
        (0.1, 1e3, 1e3),
    ],
)
def test_damping_grows_and_shrinks_within_bounds(ratio, damping, expected):
    lm = LM(initial=1.0, every=1, factor=0.5, minimum=1e-3, maximum=1e3)
    found = lm.updated(jnp.asarray(damping), jnp.asarray(ratio))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("by_model, enough", [(False, 0.25), (True, 0.0)])
def test_the_damping_shrinks_only_where_the_next_batch_agrees(by_model, enough):
    lm = LM(initial=1.0, every=1, factor=0.5)
    for own, expected in ((0.9, 0.5), (0.5, 1.0), (0.1, 2.0)):
        for fresh in (enough, enough - 1e-3):
            ratio = lm.confirmed(jnp.asarray(own), jnp.asarray(fresh), by_model=by_model)
            found, _ = lm.judged(jnp.ones(()), ratio, jnp.asarray(True))
            np.testing.assert_allclose(found, max(expected, 1.0 if fresh < enough else 0.0))


@pytest.mark.parametrize(
    "wrong", [{"initial": 0.0}, {"minimum": 2.0}, {"factor": 1.0}, {"low": 0.9}, {"every": 0}]
)
def test_levenberg_marquardt_refuses_what_makes_no_sense(wrong):
    with pytest.raises(ValueError, match="Expected"):
        LM(**wrong)


@pytest.mark.parametrize("rate", [0.2, curvature.QuadraticModel()], ids=["rate", "model"])
def test_the_damping_grows_by_what_the_step_does_to_the_next_batch(rate, monkeypatch):
    """On another batch, against the objective with the penalty; never after a good step.

    After every step of the quadratic model, after every measured one of a given rate.
    """
    every = 1 if isinstance(rate, curvature.QuadraticModel) else 2
    # The own batch never counts: no step is a leap, and no ratio low.
    monkeypatch.setattr(LM, "is_leap", lambda *_: jnp.asarray(False))
    lm = LM(initial=1e-2, every=2, factor=0.9, low=-1e9, high=1e9)
    options = {"l2": 1e-3, "momentum": 0.0, "kl_clip": None, "warmup_steps": 0}
    tx = curvature.kfac(REGISTRY, rate, damping=lm, **options)
    objective = lambda p, x, y: loss_fn(p, x, y) + 5e-4 * jnp.sum(flat(p) ** 2)  # noqa: E731
    before, params, state, damping, ratios = None, PARAMS, tx.init(PARAMS), 1e-2, []
    update = jax.jit(tx.update)
    for t in range(20):
        x, y = X[t % 4 :][:4], jax.random.randint(jax.random.key(52 + t), (4,), 0, 4)
        if t and t % every == 0:
            change = objective(params, x, y) - objective(before, x, y)
            ratios.append(change / state.stats.predicted)
            if ratios[-1] < -1 and state.stats.predicted < 0:
                damping *= max(np.sqrt(-ratios[-1]), 0.9**-2)
        value, grads = jax.value_and_grad(loss_fn)(params, x, y)
        more = {"value": value} if t % 4 == 0 else {}
        key = jax.random.key(t)
        rejected = state.stats.rejected
        updates, state = update(grads, state, params, loss_args=(x, y), key=key, **more)
        if state.stats.rejected > rejected:
            damping *= max(np.sqrt(-state.stats.reduction_ratio), 2)
        np.testing.assert_allclose(state.next_damping, damping, rtol=1e-7)
        if ratios:
            found = state.stats.next_batch_ratio
            np.testing.assert_allclose(found, ratios[-1], rtol=1e-7, atol=1e-12)
        before, params = params, optax.apply_updates(params, updates)

    assert damping > 1e-2


@pytest.mark.parametrize(
    "ratio, regular, expected, rejected",
    [
        (0.9, True, 0.5, False),
        (0.9, False, 1.0, False),
        (0.1, False, 1.0, False),
        (-1.0, True, 2.0, False),
        (-1.1, True, 2.0, True),
        (-1.1, False, 2.0, True),
        (-100.0, False, 10.0, True),
        (np.nan, False, 100.0, True),
        (-np.inf, True, 100.0, True),
    ],
)
def test_a_step_is_judged_by_its_own_batch(ratio, regular, expected, rejected):
    lm = LM(initial=1.0, every=1, factor=0.5, maximum=1e3)
    found = lm.judged(jnp.asarray(1.0), jnp.asarray(ratio), jnp.asarray(regular))
    np.testing.assert_allclose(found[0], expected, rtol=1e-12)
    assert found[1] == rejected


def test_a_leap_is_more_than_twice_the_step_before():
    lengths = jnp.asarray([0.0, 1.0, 2.0, 2.1, 1e9])
    np.testing.assert_array_equal(LM().is_leap(lengths, 1.0), [False, False, False, True, True])
    assert LM().is_leap(jnp.asarray(1e-9), 0.0)  # the first step


@pytest.mark.parametrize(
    "ratio, expected",
    [(0.5, 1), (-1, 1), (np.nan, 1), (-1.1, 2), (-100, 10), (-1e9, 100), (-np.inf, 100)],
)
def test_damping_never_shrinks_after_the_next_batch(ratio, expected):
    lm = LM(initial=1.0, every=1, factor=0.5, maximum=1e3)
    one, large = jnp.asarray(1.0), jnp.asarray(999.0)
    np.testing.assert_allclose(lm.checked(one, jnp.asarray(ratio)), expected, rtol=1e-12)
    assert lm.checked(large, jnp.asarray(ratio)) <= 1e3


def test_a_step_that_its_own_batch_forbids_is_not_taken():
    """The first step is measured, and so is every leap: with rho below -1 it is a step of zero."""
    params, lm = (
        jax.tree.map(lambda p: 0.3 * p, PARAMS),
        LM(1e-8, every=99, factor=0.99, minimum=1e-9),
    )
    key, grads = jax.random.key(0), jax.grad(loss_fn)(params, X, Y)

    def start(damping, weight_decay=0.0):
        tx = curvature.kfac(
            REGISTRY,
            curvature.QuadraticModel(),
            damping=damping,
            weight_decay=weight_decay,
            kl_clip=None,
        )
        options = {"params": params, "loss_args": (X, Y), "key": key}
        return jax.jit(lambda state: tx.update(grads, state, **options)), tx.init(params)

    step, state = start(lm.initial)
    wanted, free = step(state)
    change = loss_fn(optax.apply_updates(params, wanted), X, Y) - loss_fn(params, X, Y)
    ratio = change / free.stats.predicted
    assert ratio < -10
    step, state = start(lm, weight_decay=1.0)
    updates, state = step(state)  # nothing is taken of it, no decay either
    assert not flat(updates).any() and not flat(state.previous).any()
    np.testing.assert_allclose(state.stats.reduction_ratio, ratio, rtol=1e-8)
    np.testing.assert_allclose(state.next_damping, lm.initial * np.sqrt(-ratio), rtol=1e-8)
    assert state.stats.rejected == 1 and state.stats.update_norm == 0
    while not flat(updates).any():  # until the damping is what the batch can bear
        updates, state = step(state)
        assert state.stats.rejected < 20
    assert flat(updates).any() and 1 < state.stats.rejected < 18
    moved = optax.apply_updates(params, state.previous)  # without the decay
    assert loss_fn(moved, X, Y) < loss_fn(params, X, Y)


@pytest.mark.parametrize("initial", [1e-6, 1e-3, 1.0])
def test_a_first_damping_that_is_too_small_costs_time_and_no_more(initial):
    """Undamped, the first steps of this net are so long that nothing comes back from them."""
    tx = curvature.kfac(REGISTRY, curvature.QuadraticModel(), damping=LM(initial))
    params = jax.tree.map(lambda p: 0.1 * p, PARAMS)
    history = run(tx, 60, params)
    losses = [float(loss_fn(p, X, Y)) for p, *_ in history]
    assert max(losses) < 2 * float(loss_fn(params, X, Y)), losses
    assert losses[-1] < 0.05, losses


def test_a_perfect_fit_on_small_batches_is_kept():
    """There, each batch confirms any step of its own: without the next batch, training explodes."""
    x, y = (array[:600] for array in digits())
    params = deep_params()
    registry = curvature.register(deep_loss, params, x[:200], y[:200])
    tx = curvature.kfac(registry, curvature.QuadraticModel(), damping=LM(1e-3))

    def body(i, carry):
        params, state = carry
        batch = jax.random.choice(jax.random.key(i), 600, (200,), replace=False)
        value, grads = jax.value_and_grad(deep_loss)(params, x[batch], y[batch])
        updates, state = tx.update(
            grads,
            state,
            params,
            loss_args=(x[batch], y[batch]),
            key=jax.random.key(i),
            value=value,
        )
        return optax.apply_updates(params, updates), state

    @jax.jit
    def hundred(i, params, state):
        return jax.lax.fori_loop(100 * i, 100 * (i + 1), body, (params, state))

    state, losses = tx.init(params), []
    for i in range(6):
        params, state = hundred(i, params, state)
        losses.append(float(deep_loss(params, x, y)))

    assert max(losses[2:]) < 1e-6, losses


@pytest.mark.parametrize("rate", [5.0, curvature.QuadraticModel()], ids=["rate", "model"])
def test_the_clip_bounds_the_change_of_predictions(rate):
    """1/2 v'Gv is the KL divergence to second order: with the exact curvature, it stays below."""
    kind = curvature.GaussNewton()
    options = {"damping": 1e-3, "kind": kind, "momentum": 0.0}
    dense = REGISTRY.override("*", block="dense")
    (_, updates, state), *_ = run(curvature.kfac(dense, rate, kl_clip=1e-3, **options), 1)
    v, matrix = flat(updates), np.array(gauss_newton(PARAMS))
    if rate == 5.0:  # without the quadratic model, as the blocks see it
        matrix[:20, 20:] = matrix[20:, :20] = 0
    length = v @ matrix @ v / 2
    assert 0.5e-3 < length <= 1e-3 * (1 + 1e-9)
    assert state.stats.clipped < 1
    (_, free, state), *_ = run(curvature.kfac(dense, rate, kl_clip=1e6, **options), 1)
    assert state.stats.clipped == 1
    cosine = v @ flat(free) / np.linalg.norm(v) / np.linalg.norm(flat(free))
    np.testing.assert_allclose(cosine, 1, rtol=1e-12)


def test_a_batch_that_is_not_finite_leaves_damping_and_step_alone():
    tx = curvature.kfac(REGISTRY, curvature.QuadraticModel(), damping=LM(every=1))
    *_, (params, updates, state) = run(tx, 2)
    bad = X.at[0, 0].set(jnp.nan)
    grads = jax.grad(loss_fn)(params, bad, Y)
    key = jax.random.key(9)
    updates, after = tx.update(grads, state, params, loss_args=(bad, Y), key=key)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    assert after.stats.skipped == 1 and after.next_damping == state.next_damping
    jax.tree.map(np.testing.assert_array_equal, after.previous, state.previous)


def test_g_digits_are_learnt_in_21_iterations():
    """Martens and Grosse's small net: at most 5 % training error by iteration 9, none by 21."""
    (x, y), params = digits(), deep_params()
    registry = curvature.register(deep_loss, params, x, y)
    tx = curvature.kfac(
        registry,
        curvature.QuadraticModel(),
        damping=LM(initial=0.1, every=1, factor=0.95**5),
        kind=curvature.GaussNewton(),
        decay=0.0,
        statistics_every=1,
        refresh_every=1,
    )

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})
    def step(params, state, x, y):
        grads = jax.grad(deep_loss)(params, x, y)
        updates, state = tx.update(grads, state, params, loss_args=(x, y))
        params = optax.apply_updates(params, updates)
        return params, state, jnp.mean(deep_logits(params, x).argmax(-1) != y)

    state, errors = tx.init(params), []
    for _ in range(21):
        params, state, error = step(params, state, x, y)
        errors.append(float(error))
    assert errors[8] <= 0.05 and errors[20] == 0, errors


@pytest.mark.slow
@pytest.mark.parametrize("recipe, block", [("ekfac", "ekfac"), ("foof", "foof")])
def test_recipes_are_kfac_with_other_blocks(recipe, block):
    tx = getattr(curvature, recipe)(REGISTRY, 0.1, damping=1e-2)
    other = curvature.kfac(REGISTRY.with_blocks(block), 0.1, damping=1e-2)
    for one, two in zip(run(tx, 2), run(other, 2), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one[1], two[1])
    plain = run(curvature.kfac(REGISTRY, 0.1, damping=1e-2), 1)
    assert np.abs(flat(plain[0][1]) - flat(run(tx, 1)[0][1])).max() > 1e-3
