"""Refresh: four methods, turns, tolerance; and what else goes into a preconditioned step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import curvature
from curvature import linalg
from curvature.optimizer import quadratic
from curvature.optimizer.refresh import methods, schedule

KEYS = jax.random.split(jax.random.key(0), 8)
PARAMS = {
    "w": jax.random.normal(KEYS[0], (3, 5)),
    "b": jax.random.normal(KEYS[1], (5,)),
    "v": jax.random.normal(KEYS[2], (5, 4)),
}
X, Y = jax.random.normal(KEYS[3], (8, 3)), jnp.arange(8) % 4
EXACT = curvature.Fisher(samples=None)


def loss_fn(p, x, y):
    z = jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]
    return curvature.losses.softmax_cross_entropy_with_integer_labels(z, y).mean()


REGISTRY = curvature.register(loss_fn, PARAMS, X, Y)
gradient = jax.jit(jax.grad(loss_fn))
GRADS = gradient(PARAMS, X, Y)
FIRST, SECOND = "w", "v"


def close(one, other, tolerance=1e-9):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=1e-10), one, other
    )


def flat(tree):
    return ravel_pytree(tree)[0]


def matrices(seed, count=3, size=6, rank=12):
    x = np.random.default_rng(seed).normal(size=(count, size, rank))
    return jnp.asarray(x @ x.transpose(0, 2, 1) / rank)


def run(tx, steps, params=PARAMS, args=lambda t: (X, Y), state=None, move=True):
    """(parameters, updates, state) after every step."""
    update = jax.jit(tx.update)
    state, history = tx.init(params) if state is None else state, []
    for t in range(steps):
        grads = gradient(params, *args(t))
        updates, state = update(grads, state, params, loss_args=args(t), key=jax.random.key(t))
        params = optax.apply_updates(params, updates) if move else params
        history.append((params, updates, state))
    return history


# Methods ------------------------------------------------------------------------------------------

TRUTH = matrices(0) + 0.1 * jnp.eye(6)


@pytest.mark.parametrize("size", [1, 6, 2 * linalg._LARGE + 3])
def test_inverses_are_inverses(size):
    truth = matrices(1, 2, size, size + 5) + 0.1 * jnp.eye(size)
    np.testing.assert_allclose(
        linalg.cholesky_inverse(truth) @ truth, np.stack([np.eye(size)] * 2), atol=1e-9
    )


def test_the_inverse_of_what_is_not_positive_is_nan():
    wrong = TRUTH.at[1, 0, 0].set(-1.0)
    assert np.isnan(linalg.cholesky_inverse(wrong)[1]).all()
    np.testing.assert_array_equal(
        linalg.cholesky_inverse(wrong)[0], linalg.cholesky_inverse(TRUTH)[0]
    )


def test_diagonals():
    np.testing.assert_array_equal(linalg.diagonal(TRUTH), np.diagonal(TRUTH, axis1=1, axis2=2))


@pytest.mark.parametrize("method", [curvature.Cholesky(), curvature.NewtonSchulz()])
def test_inverses_from_nothing(method):
    found, _ = method.inverse(TRUTH, jnp.zeros_like(TRUTH))
    np.testing.assert_allclose(found, np.linalg.inv(TRUTH), rtol=1e-9)


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_newton_schulz_squares_the_residual(iterations):
    change = 0.01 * matrices(2)
    method = curvature.NewtonSchulz(iterations)
    found, stale = method.inverse(TRUTH + change, jnp.asarray(np.linalg.inv(TRUTH)))
    residual = np.eye(6) - np.linalg.inv(TRUTH) @ (TRUTH + change)
    np.testing.assert_allclose(stale, np.linalg.norm(residual, axis=(1, 2)) / np.sqrt(6), rtol=1e-9)
    left = np.linalg.matrix_power(residual, 2**iterations)
    expected = (np.eye(6) - left) @ np.linalg.inv(TRUTH + change)
    np.testing.assert_allclose(found, (expected + expected.transpose(0, 2, 1)) / 2, atol=1e-6)
    assert np.abs(found @ (TRUTH + change) - np.eye(6)).max() < np.abs(left).max() * 2 + 1e-9


def test_newton_schulz_that_would_diverge_is_cholesky():
    far = jnp.asarray(np.linalg.inv(TRUTH)) * jnp.array([1.0, 10.0, jnp.nan])[:, None, None]
    found, _ = curvature.NewtonSchulz().inverse(TRUTH, far)
    np.testing.assert_allclose(found, np.linalg.inv(TRUTH), rtol=1e-8)


@pytest.mark.parametrize("method", [curvature.Eigh(), curvature.QR()])
def test_bases_from_nothing_are_eigenbases(method):
    values, q, stale = method.basis(TRUTH, jnp.broadcast_to(jnp.eye(6), TRUTH.shape), True)
    np.testing.assert_allclose(q * values[:, None] @ q.mT, TRUTH, atol=1e-10)
    np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(TRUTH), rtol=1e-9)
    np.testing.assert_array_equal(stale, 1)


def test_qr_tracks_the_eigenbasis():
    """One step of orthogonal iteration, by hand; many of them find the eigenbasis."""
    start = jnp.asarray(np.linalg.eigh(TRUTH)[1])
    moved = TRUTH + 0.05 * matrices(3)
    values, q, stale = curvature.QR().basis(moved, start, False)
    rotated = np.asarray(start.mT @ moved @ start)
    off = rotated - np.stack([np.diag(np.diag(r)) for r in rotated])
    norms = [np.linalg.norm(x, axis=(1, 2)) for x in (off, np.asarray(moved))]
    np.testing.assert_allclose(stale, norms[0] / norms[1], rtol=1e-9)
    np.testing.assert_allclose(q.mT @ q, np.stack([np.eye(6)] * 3), atol=1e-12)
    np.testing.assert_allclose(values, np.diagonal(q.mT @ moved @ q, axis1=1, axis2=2), rtol=1e-9)
    span = np.linalg.qr(np.asarray(moved @ start[:, :, ::-1]))[0]  # eigh ascends, QR descends
    np.testing.assert_allclose(
        np.abs(np.asarray(q.mT) @ span), np.stack([np.eye(6)] * 3), atol=1e-9
    )
    track = jax.jit(curvature.QR().basis)
    for _ in range(300):
        values, q, stale = track(moved, q, jnp.asarray(False))
    np.testing.assert_allclose(stale, 0, atol=1e-6)
    np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(moved), rtol=1e-6)


@pytest.mark.parametrize("size", [0.001, 0.3])
@pytest.mark.parametrize(
    "make", [curvature.Cholesky, curvature.NewtonSchulz, curvature.Eigh, curvature.QR]
)
def test_a_tolerance_keeps_what_is_good_enough(make, size):
    moved = TRUTH + size * matrices(4)
    if make in (curvature.Eigh, curvature.QR):
        _, start = jnp.linalg.eigh(TRUTH)
        values, new, stale = make(tolerance=0.02).basis(moved, start, jnp.asarray(False))
        np.testing.assert_allclose(values, linalg.diagonal(new.mT @ moved @ new), rtol=1e-9)
    else:
        start = jnp.asarray(np.linalg.inv(TRUTH))
        new, stale = make(tolerance=0.1).inverse(moved, start)
    kept = np.array_equal(new, start)
    assert kept == (size == 0.001), stale


def test_cholesky_estimates_its_staleness():
    """Along eight random directions the residual is about as long as its norm says."""
    moved = TRUTH + 0.3 * matrices(4)
    inverse = jnp.asarray(np.linalg.inv(TRUTH))
    _, stale = curvature.Cholesky(tolerance=0.5).inverse(moved, inverse)
    exact = np.linalg.norm(moved @ inverse - np.eye(6), axis=(1, 2)) / np.sqrt(6)
    np.testing.assert_allclose(stale, exact, rtol=0.5)


@pytest.mark.parametrize("make", [methods.Cholesky, methods.NewtonSchulz, methods.Eigh, methods.QR])
def test_tolerances_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match=r"tolerance is 1.0, expected"):
        make(tolerance=1.0)
    with pytest.raises(ValueError, match="iterations is 0"):
        methods.NewtonSchulz(0)


# Through the preconditioner -----------------------------------------------------------------------


def dense(params, x=X, y=Y):
    """The block-diagonal K-FAC matrix of every layer, by layer name."""
    operator = curvature.Estimator(REGISTRY, EXACT)(params, x, y)
    return {name: np.asarray(block.to_dense()) for name, block in operator.blocks.items()}


def in_blocks(tree):
    """Block coordinates of a tree."""
    first = np.concatenate([tree["w"], tree["b"][None]])
    return {FIRST: first.ravel(), SECOND: np.ravel(tree["v"])}


def not_below_typical(means, traces):
    """What relative damping takes for mean eigenvalues: 0.3 of the mean by traces, if larger."""
    return np.maximum(means, 0.3 * np.dot(means, traces) / np.sum(traces))


@pytest.mark.parametrize("method", [curvature.Eigh(factored=False), curvature.QR(factored=False)])
@pytest.mark.parametrize("relative", [False, True])
def test_eigenbases_damp_exactly(method, relative):
    tx = curvature.scale_by_curvature(
        REGISTRY, EXACT, damping=0.1, refresh=method, relative_damping=relative
    )
    ((_, updates, _),) = run(tx, 1)
    found, grads, blocks = in_blocks(updates), in_blocks(GRADS), dense(PARAMS)
    traces = [np.trace(matrix) for matrix in blocks.values()]
    means = [np.mean(np.diag(matrix)) for matrix in blocks.values()]
    means = not_below_typical(means, traces) if relative else np.ones(2)
    for (name, matrix), mean in zip(blocks.items(), means, strict=True):
        damped = matrix + 0.1 * mean * np.eye(len(matrix))
        exact = np.linalg.solve(damped, grads[name])
        np.testing.assert_allclose(found[name], exact, rtol=1e-8)


@pytest.mark.parametrize("block", ["kronecker", "ekfac", "diagonal", "dense", "identity"])
def test_relative_damping_goes_with_the_scale_of_the_curvature(block):
    """A loss of another scale: with relative damping the direction scales, and does not turn."""
    directions = []
    for scale in (1.0, 1e3, 1e200):

        def scaled(p, x, y, scale=scale):
            return scale * loss_fn(p, x, y)

        registry = curvature.register(scaled, PARAMS, X, Y).with_blocks(block)
        tx = curvature.scale_by_curvature(registry, EXACT, damping=0.1, relative_damping=True)
        updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, loss_args=(X, Y))
        directions.append(flat(updates) * scale)
    for other in directions[1:]:
        np.testing.assert_allclose(directions[0], other, rtol=1e-7)


def test_relative_damping_is_that_of_the_mean_eigenvalue_or_of_the_nets():
    registry = REGISTRY.with_blocks("diagonal")
    params = PARAMS | {"v": PARAMS["v"] / 100}  # the layer before it has next to no curvature
    tx = curvature.scale_by_curvature(registry, EXACT, damping=0.5, relative_damping=True)
    updates, _ = tx.update(GRADS, tx.init(params), params, loss_args=(X, Y))
    operator = curvature.Estimator(registry, EXACT)(params, X, Y)
    values = in_blocks(operator.diagonal())
    means, traces = zip(*((x.mean(), x.sum()) for x in values.values()), strict=True)
    used = not_below_typical(means, traces)
    assert used.max() == max(means) and used.min() > 10 * min(means)
    for (name, found), mean in zip(in_blocks(updates).items(), used, strict=True):
        exact = in_blocks(GRADS)[name] / (values[name] + 0.5 * mean)
        np.testing.assert_allclose(found, exact, rtol=1e-9)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("block", ["kronecker", "ekfac"])
def test_factored_damping_is_that_of_the_factors(block, relative):
    """To G it adds (A + s I) (x) (B + t I) - A (x) B, also where G is EKFAC's."""
    registry = REGISTRY.with_blocks(block)
    estimator = curvature.Estimator(registry, EXACT)
    params = PARAMS | {"v": PARAMS["v"] / 100}
    operator = estimator(params, X, Y)
    factors = curvature.Estimator(REGISTRY, EXACT)(params, X, Y).blocks
    methods = [curvature.Eigh(factored=True), curvature.QR(factored=True), curvature.Cholesky()]
    found = []
    for method in methods:
        tx = curvature.scale_by_curvature(
            registry, EXACT, damping=0.1, refresh=method, relative_damping=relative, decay=0.0
        )
        # EKFAC's first corrections are K-FAC's eigenvalues: look at the second.
        *_, (_, updates, _) = run(tx, 2, params, move=False)
        found.append(in_blocks(updates))
    traces = [float(block.trace()) for block in factors.values()]
    outputs = [float(block.mean_eigenvalues[1]) for block in factors.values()]
    outputs = dict(zip(factors, not_below_typical(outputs, traces), strict=True))
    for name, grad in in_blocks(jax.grad(loss_fn)(params, X, Y)).items():
        a, b = np.asarray(factors[name].input), np.asarray(factors[name].output)
        pi = np.sqrt(np.mean(np.diag(a)) / np.mean(np.diag(b)))
        means = np.mean(np.diag(a)), outputs[name]
        s, t = np.sqrt(0.1) * np.array(means if relative else (pi, 1 / pi))
        damped = np.kron(a + s * np.eye(len(a)), b + t * np.eye(len(b))) - np.kron(a, b)
        exact = np.linalg.solve(np.asarray(operator.blocks[name].to_dense()) + damped, grad)
        for one in found:
            np.testing.assert_allclose(one[name], exact, rtol=1e-7)


@pytest.mark.parametrize(
    "method",
    [
        curvature.NewtonSchulz(3),
        curvature.Eigh(),
        curvature.QR(),
        curvature.QR(factored=False),
    ],
)
@pytest.mark.parametrize("block", ["kronecker", "ekfac"])
def test_methods_agree_in_the_long_run(method, block):
    """The same inverse as by Cholesky, or, damped exactly, as by Eigh; parameters at rest."""
    registry = REGISTRY.with_blocks(block)
    exact = not getattr(method, "factored", True)
    other = curvature.Eigh(factored=False) if exact else curvature.Cholesky()
    one, two = (
        run(
            curvature.scale_by_curvature(registry, EXACT, damping=0.1, refresh=m, refresh_every=2),
            20,
            args=lambda t: (X * (1 + 0.5 * min(t, 3)), Y),
            move=False,
        )[-1][1]
        for m in (method, other)
    )
    one, two = flat(one), flat(two)
    assert np.linalg.norm(one - two) < 0.05 * np.linalg.norm(two)


# Turns --------------------------------------------------------------------------------------------


def test_turns_are_balanced_and_complete():
    """Longest first: no turn has more than 4/3 of the best possible (Graham 1969)."""
    rng = np.random.default_rng(0)
    costs = [int(c) for c in rng.integers(1, 1000, 40) ** 2]
    windows = schedule.dealt([schedule.Unit(i, ("input",), 1, c) for i, c in enumerate(costs)], 7)
    assert all(sum(window.turns) == 1 for window in windows)
    best = max(sum(costs) / 7, max(costs))
    work = [sum(w.unit.cost for w in windows if w.turns[turn]) for turn in range(7)]
    assert max(work) <= 4 / 3 * best


def test_every_inverse_has_its_turn():
    """Between its turns an inverse stays; at it, it is that of the averages then."""
    make = functools.partial(curvature.scale_by_curvature, REGISTRY, EXACT, warmup_steps=0)
    tx, always = make(damping=0.1, refresh_every=4), make(damping=0.1, refresh_every=1)
    batches = [(X * (1 + t / 9), Y) for t in range(9)]
    states = [s for *_, s in run(tx, 9, args=lambda t: batches[t], move=False)]
    fresh = [s for *_, s in run(always, 9, args=lambda t: batches[t], move=False)]
    close(states[0].inverse, fresh[0].inverse)
    renewed = dict.fromkeys(
        [(name, side) for name in (FIRST, SECOND) for side in ("input", "output")], 0
    )
    for t in range(1, 9):
        changed = 0
        for name, side in renewed:
            now = states[t].inverse[name][side]
            if np.array_equal(now, states[t - 1].inverse[name][side]):
                continue
            np.testing.assert_allclose(now, fresh[t].inverse[name][side], rtol=1e-9)
            renewed[name, side] += 1
            changed += 1
        assert changed == 1  # four factors, four turns
    assert set(renewed.values()) == {2}


# Burn-in, accumulation, checkpoints ---------------------------------------------------------------


def test_burn_in_averages_and_does_nothing_else():
    tx = curvature.kfac(REGISTRY, 0.1, kind=EXACT, burn_in=2, statistics_every=3, decay=0.5)
    batches = [(X * (1 + t / 9), Y) for t in range(3)]
    (p1, u1, s1), (p2, u2, s2), (_, u3, s3) = run(tx, 3, args=lambda t: batches[t])
    assert not flat(u1).any() and not flat(u2).any() and flat(u3).any()
    close((p1, p2), (PARAMS, PARAMS), 0)
    assert [int(s.curvature.step) for s in (s1, s2, s3)] == [-1, 0, 1]
    estimator = curvature.Estimator(REGISTRY, EXACT)
    parts = [estimator.statistics(PARAMS, *b) for b in batches]
    expected = jax.tree.map(lambda a, b, c: 0.125 * a + 0.25 * b + 0.5 * c, *parts)
    expected = jax.tree.map(lambda x: x / 0.875, expected)
    close(curvature.averages(REGISTRY, s3), expected)


def test_accumulated_micro_batches_are_one_batch():
    """Exact Fisher: gradient and statistics are means over examples, whatever the batches."""
    options = {"kind": EXACT, "decay": 0.5, "statistics_every": 1, "refresh_every": 2}
    whole = run(curvature.kfac(REGISTRY, 0.1, **options), 3)
    halves = [(X[:4], Y[:4]), (X[4:], Y[4:])]
    parts = run(
        curvature.kfac(REGISTRY, 0.1, accumulate=2, **options), 6, args=lambda t: halves[t % 2]
    )
    close([p for p, *_ in whole], [p for p, *_ in parts[1::2]])
    assert not any(flat(u).any() for _, u, _ in parts[::2])
    assert int(parts[-1][2].curvature.step) == 3
    for name, arrays in whole[-1][2].curvature.statistics.items():
        found = parts[-1][2].curvature.statistics[name]
        close(arrays["output"], found["output"])
        close(arrays["input"] / arrays["rows"], found["input"] / found["rows"])


def test_a_run_goes_on_with_fewer_micro_batches_for_a_step():
    """A state kept after three of four of them has two already."""
    four, two = (curvature.kfac(REGISTRY, 0.1, kind=EXACT, accumulate=n) for n in (4, 2))
    _, _, state = run(four, 3)[-1]
    steps = [int(s.curvature.step) for _, _, s in run(two, 3, state=state)]
    assert steps == [1, 1, 2]


@pytest.mark.parametrize("block", ["kronecker", "ekfac"])
def test_factors_alone_restore_a_run(block):
    """With all inverses made at once, as they were, the run goes on as it did."""
    registry = REGISTRY.with_blocks(block)
    tx = curvature.kfac(
        registry, 0.1, 0.0, kind=EXACT, decay=0.5, statistics_every=1, refresh_every=3, spread=False
    )
    history = run(tx, 5)
    params, _, state = history[2]
    again = curvature.with_factors(tx.init(params), curvature.factors(state))
    assert int(again.curvature.step) == 3
    (found, *_), *_ = run(tx, 1, params, state=again)
    np.testing.assert_allclose(flat(found), flat(history[3][0]), rtol=1e-8)
    chained = optax.chain(optax.clip(1.0), tx)
    restored = curvature.with_factors(chained.init(params), curvature.factors(state))
    close(curvature.factors(restored), curvature.factors(state), 0)


def test_factors_of_something_else_are_refused():
    tx = curvature.kfac(REGISTRY, 0.1)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="Found 0 states"):
        curvature.factors(optax.adam(0.1).init(PARAMS))
    saved = curvature.factors(state)
    saved["statistics"] = {FIRST: saved["statistics"][FIRST]}
    with pytest.raises(ValueError, match="another model's"):
        curvature.with_factors(state, saved)


# The step -----------------------------------------------------------------------------------------


def test_grafting_takes_lengths_layer_by_layer(standard_promotion):
    graft = optax.scale_by_adam()
    grafted = curvature.scale_by_curvature(REGISTRY, EXACT, damping=0.1, graft=graft)
    plain = curvature.scale_by_curvature(REGISTRY, EXACT, damping=0.1)
    one, two = run(grafted, 1)[0][1], run(plain, 1)[0][1]
    lengths, _ = graft.update(GRADS, graft.init(PARAMS))
    for name, v in in_blocks(one).items():
        np.testing.assert_allclose(
            np.linalg.norm(v), np.linalg.norm(in_blocks(lengths)[name]), rtol=1e-9
        )
        other = in_blocks(two)[name]
        cosine = v @ other / np.linalg.norm(v) / np.linalg.norm(other)
        np.testing.assert_allclose(cosine, 1, rtol=1e-12)


@pytest.mark.parametrize("rate", [0.1, curvature.QuadraticModel()], ids=["rate", "model"])
def test_l2_is_a_part_of_the_loss(rate):
    """The penalty in the loss and its curvature in the damping, by hand."""
    penalty, lam = 0.2, 0.05
    tx = curvature.kfac(REGISTRY, rate, 0.0, lam, kind=EXACT, l2=penalty)
    ((_, updates, state),) = run(tx, 1)
    gradient = jax.tree.map(lambda g, w: g + penalty * w, GRADS, PARAMS)
    scale = curvature.scale_by_curvature(REGISTRY, EXACT, damping=lam + penalty)
    direction, _ = scale.update(gradient, scale.init(PARAMS), PARAMS, loss_args=(X, Y))
    np.testing.assert_allclose(
        flat(updates), -state.stats.learning_rate * flat(direction), rtol=1e-9
    )
    if rate != 0.1:
        model = curvature.kfac(REGISTRY, rate, 0.0, lam + penalty, kind=EXACT)
        best, _ = model.update(gradient, model.init(PARAMS), PARAMS, loss_args=(X, Y))
        np.testing.assert_allclose(flat(updates), flat(best), rtol=1e-9)


def test_the_reduction_ratio_includes_the_penalty():
    lm = curvature.LevenbergMarquardt(initial=1.0, every=1)
    tx = curvature.kfac(REGISTRY, 0.3, 0.0, lm, kind=EXACT, l2=0.2)
    ((params, updates, state),) = run(tx, 1)

    def objective(p):
        return loss_fn(p, X, Y) + 0.1 * flat(p) @ flat(p)

    v, g = flat(updates), flat(jax.grad(objective)(PARAMS))
    along = quadratic.along(
        loss_fn, False, PARAMS, (X, Y), jax.grad(objective)(PARAMS), [updates], jnp.asarray(1.2)
    )
    predicted = along(jnp.ones(1))
    ratio = (objective(params) - objective(PARAMS)) / predicted
    np.testing.assert_allclose(state.stats.reduction_ratio, ratio, rtol=1e-8)
    assert v @ g < 0


def test_decoupled_decay_shrinks_parameters_and_nothing_else():
    options = {"kind": EXACT, "damping": 0.1}
    plain = run(curvature.kfac(REGISTRY, 0.1, **options), 1)[0]
    mask = {"w": True, "b": False, "v": True}
    tx = curvature.kfac(REGISTRY, 0.1, weight_decay=0.3, weight_decay_mask=mask, **options)
    decayed = run(tx, 1)[0]
    for name, w in PARAMS.items():
        expected = plain[1][name] - (0.03 * w if mask[name] else 0)
        np.testing.assert_allclose(decayed[1][name], expected, rtol=1e-9)
    close(decayed[2].previous, plain[2].previous)


def test_a_given_value_saves_a_loss():
    """The same damping; and one evaluation of the loss less in every measurement."""
    tx = curvature.kfac(REGISTRY, 0.3, damping=curvature.LevenbergMarquardt(every=1), kind=EXACT)
    state = tx.init(PARAMS)
    value = loss_fn(PARAMS, X, Y)
    _, one = tx.update(GRADS, state, PARAMS, loss_args=(X, Y))
    _, two = tx.update(GRADS, state, PARAMS, loss_args=(X, Y), value=value)
    np.testing.assert_allclose(one.next_damping, two.next_damping, rtol=1e-12)
    _, wrong = tx.update(GRADS, state, PARAMS, loss_args=(X, Y), value=value - 100.0)
    assert wrong.next_damping != two.next_damping


def test_a_method_is_an_instance():
    with pytest.raises(TypeError, match=r"expected Cholesky\(\)"):
        curvature.kfac(REGISTRY, 0.1, refresh=curvature.Cholesky)


@pytest.mark.parametrize("damping", [0.5, curvature.LevenbergMarquardt(initial=0.5)])
def test_a_damping_given_to_update_is_used(damping):
    tx = curvature.kfac(REGISTRY, 0.1, damping=damping, kind=EXACT)
    other = curvature.kfac(REGISTRY, 0.1, damping=0.02, kind=EXACT)
    one, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, loss_args=(X, Y), damping=0.02)
    two, _ = other.update(GRADS, other.init(PARAMS), PARAMS, loss_args=(X, Y))
    close(one, two)


def test_relative_damping_has_no_quadratic_model():
    for options in (
        {"learning_rate": curvature.QuadraticModel()},
        {"damping": curvature.LevenbergMarquardt()},
    ):
        with pytest.raises(ValueError, match="relative_damping"):
            curvature.kfac(REGISTRY, **{"learning_rate": 0.1, **options}, relative_damping=True)


# Long runs ----------------------------------------------------------------------------------------


def test_a_thousand_steps_are_compiled_once():
    """Schedules, refreshes, momentum and a changing damping."""
    compiled = []
    tx = curvature.kfac(
        REGISTRY,
        lambda t: 0.1 / (1 + 0.01 * jnp.asarray(t, float)),
        lambda t: 0.9 - 0.5 / (1 + jnp.asarray(t, float)),
        curvature.LevenbergMarquardt(initial=1.0, every=3),
        statistics_every=2,
        refresh_every=5,
        weight_decay=lambda t: 1e-3 / (1 + jnp.asarray(t, float)),
    )

    @jax.jit
    def step(params, state, key):
        compiled.append(1)
        loss, grads = jax.value_and_grad(loss_fn)(params, X, Y)
        updates, state = tx.update(grads, state, params, loss_args=(X, Y), key=key, value=loss)
        return optax.apply_updates(params, updates), state, loss

    params, state, dampings = PARAMS, tx.init(PARAMS), set()
    for t in range(1000):
        params, state, loss = step(params, state, jax.random.fold_in(KEYS[7], t))
        dampings.add(float(state.next_damping))
    assert len(compiled) == 1
    assert len(dampings) > 10 and loss < loss_fn(PARAMS, X, Y)


@pytest.mark.slow
def test_a_hundred_thousand_steps_drift_nowhere():
    """No change of dtype, shape, number of live arrays, or compilation; float32."""
    params = jax.tree.map(lambda p: p.astype(jnp.float32), PARAMS)
    x = X.astype(jnp.float32)
    registry = curvature.register(loss_fn, params, x, Y)
    tx = curvature.kfac(registry, 0.01, damping=1e-2, statistics_every=5, refresh_every=10)
    compiled = []

    @jax.jit
    def thousand(params, state, key):
        compiled.append(1)

        def step(carry, key):
            params, state = carry
            grads = jax.grad(loss_fn)(params, x, Y)
            updates, state = tx.update(grads, state, params, loss_args=(x, Y), key=key)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), jax.random.split(key, 1000))[0]

    state = tx.init(params)
    forms = jax.tree.map(lambda a: (a.shape, a.dtype, a.weak_type), (params, state))
    live = []
    for t in range(100):
        params, state = thousand(params, state, jax.random.fold_in(KEYS[7], t))
        live.append(len(jax.live_arrays()))
        assert jax.tree.map(lambda a: (a.shape, a.dtype, a.weak_type), (params, state)) == forms
    assert len(compiled) == 1
    assert len(set(live[1:])) == 1
    assert int(state.curvature.step) == 100_000
    assert state.stats.skipped == 0 and np.isfinite(flat(params)).all()
    np.testing.assert_allclose(state.curvature.weight, 1, rtol=1e-3)
