"""`in_eigenbasis`: against plain references, and by what is left unchanged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal

import curvature
from curvature.optimizer.moments import Layout

X, Y, TOKENS = normal(0, 8, 3), jnp.arange(8) % 4, jnp.arange(8) % 5
PARAMS = {
    "table": normal(1, 5, 3),
    "w": normal(2, 3, 4) / 2,
    "b": normal(3, 4),
    "blocks": {"w": normal(4, 2, 4, 4) / 2, "b": normal(5, 2, 4), "scale": 1 + normal(6, 2, 4) / 5},
    "v": normal(7, 4, 4),
    "odd": normal(8, 4),
}
KINDS = {
    "fisher": curvature.Fisher(samples=None),
    "empirical": curvature.EmpiricalFisher(),
    "shampoo": curvature.Shampoo(),
}
SOURCES = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
KEY = jax.random.key(0)
pytestmark = pytest.mark.usefixtures("standard_promotion")  # for optax.scale_by_adam


def net(params, x, tokens):
    """An embedding, a scan over two blocks, a bias that is generic."""

    def block(h, p):
        return h + jnp.tanh((h @ p["w"] + p["b"]) * p["scale"]), None

    h = jnp.tanh((x + params["table"][tokens]) @ params["w"] + params["b"])
    h, _ = jax.lax.scan(block, h, params["blocks"])
    return (h + jnp.cumsum(params["odd"])) @ params["v"]


def loss_fn(params, x, tokens, y):
    logits = net(params, x, tokens)
    return curvature.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()


DATA = (X, TOKENS, Y)
REGISTRY = curvature.register(loss_fn, PARAMS, *DATA)


def small_loss_fn(params, x, y):
    logits = jnp.tanh(x @ params["w"] + params["b"]) @ params["v"] * params["scale"]
    return curvature.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()


SMALL = {name: PARAMS[name] for name in ("w", "b", "v")} | {"scale": 1 + normal(9, 4) / 5}
SMALL_DATA = (X, Y)
SMALL_REGISTRY = curvature.register(small_loss_fn, SMALL, *SMALL_DATA)
ALWAYS = {"statistics_every": 1, "refresh_every": 1, "refresh": curvature.Eigh()}


def run(tx, steps=6, rate=0.1, params=SMALL, loss_fn=small_loss_fn, data=SMALL_DATA):
    """Parameters, state and updates of some steps, each with other gradients."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params, state, key):
        grads = jax.grad(loss_fn)(params, *data)
        updates, state = tx.update(grads, state, params, loss_args=data, key=key)
        updates = jax.tree.map(lambda u: -rate * u, updates)
        return optax.apply_updates(params, updates), state, updates

    state, all_updates = tx.init(params), []
    for i in range(steps):
        params, state, updates = step(params, state, jax.random.fold_in(KEY, i))
        all_updates.append(updates)
    return params, state, all_updates


def close(actual, expected, tolerance=1e-9):
    compare = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(compare, actual, expected)


# What must not change anything -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fisher", "shampoo"])
@pytest.mark.parametrize(
    "method, nesterov", [(curvature.Eigh(), False), (curvature.QR(), True)], ids=["Eigh", "QR"]
)
def test_what_is_linear_is_as_it_is_elsewhere(kind, method, nesterov):
    """Rotation and back is the identity, and a momentum follows every change of basis."""
    kind, inner = KINDS[kind], optax.trace(0.9, nesterov)
    options = {"refresh": method, "warmup_steps": 2, "statistics_every": 1, "refresh_every": 2}
    tx = curvature.in_eigenbasis(REGISTRY, inner, kind, **options)
    whole = {"params": PARAMS, "loss_fn": loss_fn, "data": DATA}
    params, state, updates = run(tx, **whole)
    expected, _, others = run(inner, **whole)
    close((params, updates), (expected, others))
    assert state.stats.staleness > 1e-3  # bases do change


@pytest.mark.parametrize(
    "make", [curvature.eigen_adam, functools.partial(curvature.kfac, refresh=curvature.QR())]
)
def test_staleness_is_that_of_what_was_renewed_last(make):
    """Two layers, five turns: most renew nothing, and leave it."""
    tx = make(SMALL_REGISTRY, 0.1, statistics_every=1, refresh_every=5, warmup_steps=0)
    grads, found = jax.grad(small_loss_fn)(SMALL, *SMALL_DATA), []

    @jax.jit
    def after(state, key):
        return tx.update(grads, state, SMALL, loss_args=SMALL_DATA, key=key)[1]

    state = tx.init(SMALL)
    for i in range(9):
        state = after(state, jax.random.fold_in(KEY, i))
        found.append(float(state.stats.staleness))
    assert min(found[2:]) > 0
    assert 1 < len(set(found[2:])) < len(found[2:])


@SOURCES
def test_in_the_coordinates_themselves_it_is_the_inner_transformation(kind):
    """With every side wider than `max_factor_dim`."""
    tx = curvature.in_eigenbasis(SMALL_REGISTRY, optax.scale_by_adam(), kind, max_factor_dim=0)
    params, state, _ = run(tx)
    close(params, run(optax.scale_by_adam())[0])
    assert state.step == 6


def test_layers_without_factors_get_the_inner_transformation_as_it_is():
    adam = optax.scale_by_adam()
    tx = curvature.in_eigenbasis(SMALL_REGISTRY.override("*", exclude=True), adam)
    close(run(tx)[0], run(adam)[0])
    once, plain = run(curvature.in_eigenbasis(SMALL_REGISTRY, adam), 1)[2], run(adam, 1)[2]
    close(once[0]["scale"], plain[0]["scale"])
    assert np.abs(once[0]["v"] - plain[0]["v"]).max() > 0.01


def test_steps_do_not_depend_on_the_coordinates_of_data_and_hidden_units():
    """Orthogonal changes of both sides' coordinates change nothing, as they would for Adam."""
    u, _ = np.linalg.qr(normal(20, 3, 3))
    targets = normal(21, 8, 4)

    def loss_fn(params, x, y):
        return curvature.losses.squared_error(x @ params["w"] @ params["v"], y).sum(-1).mean()

    def losses(tx_of, turn):
        x, w = X @ turn, turn.T @ PARAMS["w"]
        params, data = {"w": w, "v": PARAMS["v"]}, (x, targets)
        tx = tx_of(curvature.register(loss_fn, params, *data))
        return [loss_fn(run(tx, n, 0.05, params, loss_fn, data)[0], *data) for n in (1, 5)]

    for kind in (curvature.GaussNewton(), curvature.Shampoo()):
        adam = optax.scale_by_adam(eps=1e-6)
        tx_of = functools.partial(curvature.in_eigenbasis, inner=adam, kind=kind, **ALWAYS)
        close(losses(tx_of, u), losses(tx_of, np.eye(3)), 1e-6)
    adam = [losses(lambda _: optax.scale_by_adam(), turn)[1] for turn in (u, np.eye(3))]
    assert abs(adam[0] - adam[1]) > 1e-4


# References --------------------------------------------------------------------------------------


def reference(gradients, factors, b1, b2, eps, decay):
    """SOAP for one matrix, in numpy: directions for a list of gradients.

    Factors are averaged, a basis is made of them at every step; the mean is kept in the original
    coordinates, the mean square as the diagonal in the present basis of the operator it is.
    """
    rows, columns = gradients[0].shape
    left, right = np.zeros((rows, rows)), np.zeros((columns, columns))
    mean, square, basis = np.zeros((rows, columns)), np.zeros((rows, columns)), None
    directions = []
    for t, (gradient, (first, second)) in enumerate(zip(gradients, factors, strict=True), 1):
        left = decay * left + (1 - decay) * first
        right = decay * right + (1 - decay) * second
        a, b = np.linalg.eigh(left)[1], np.linalg.eigh(right)[1]
        new = np.kron(a, b)
        if basis is not None:
            operator = basis @ np.diag(square.ravel()) @ basis.T
            square = np.diag(new.T @ operator @ new).reshape(rows, columns)
        basis = new
        mean = b1 * mean + (1 - b1) * gradient
        square = b2 * square + (1 - b2) * (a.T @ gradient @ b) ** 2
        corrected = np.sqrt(square / (1 - b2**t)) + eps
        directions.append(a @ (a.T @ mean @ b / (1 - b1**t) / corrected) @ b.T)
    return directions


def linear():
    """The registry of a single matrix, 3 x 4."""

    def loss_fn(w, x, y):
        return curvature.losses.squared_error(x @ w, y).sum()

    return curvature.register(loss_fn, PARAMS["w"], X, normal(9, 8, 4))


@pytest.mark.parametrize(
    "kind, usual",
    [
        (curvature.Fisher(), {"decay": 0.8, "statistics_every": 5}),
        (curvature.Shampoo(), {"decay": 0.95, "statistics_every": 1}),
    ],
)
def test_how_long_and_how_often_factors_are_averaged_depends_on_their_source(kind, usual):
    make = functools.partial(
        curvature.in_eigenbasis, SMALL_REGISTRY, optax.scale_by_adam(), kind, warmup_steps=1
    )
    default, given = (run(make(**options), steps=3)[:2] for options in ({}, usual))
    close(default, given, 0)
    for name, value in {"decay": 0.9, "statistics_every": 2}.items():
        _, other, _ = run(make(**usual | {name: value}), steps=3)
        assert not np.allclose(other.weight, given[1].weight)


def test_with_the_factors_of_shampoo_it_is_soap():
    gradients = [np.asarray(normal(30 + i, 3, 4)) for i in range(7)]
    registry = curvature.register(
        lambda w, x, y: curvature.losses.squared_error(x @ w, y).sum(),
        PARAMS["w"],
        X,
        normal(9, 8, 4),
    )
    tx = curvature.in_eigenbasis(
        registry,
        optax.scale_by_adam(0.8, 0.9, 1e-6),
        curvature.Shampoo(),
        decay=0.7,
        **ALWAYS,
    )
    factors = [(g @ g.T, g.T @ g) for g in gradients]
    expected = reference(gradients, factors, 0.8, 0.9, 1e-6, 0.7)
    state, update = tx.init(PARAMS["w"]), jax.jit(tx.update)
    for gradient, direction in zip(gradients, expected, strict=True):
        found, state = update(gradient, state)
        close(found, direction, 1e-7)


@pytest.mark.parametrize("block", ["kronecker", "kronecker_reduce", "ekfac"])
def test_with_the_factors_of_the_fisher_matrix(block):
    """The same reference, with the estimator's factors for a layer with a bias."""
    registry = SMALL_REGISTRY.with_blocks(block)
    kind = curvature.Fisher(samples=None)
    adam = optax.scale_by_adam(0.8, 0.9, 1e-6)
    tx = curvature.in_eigenbasis(registry, adam, kind, decay=0.7, **ALWAYS)
    blocks = registry.with_blocks("kronecker" if block == "ekfac" else block)
    estimator = curvature.Estimator(blocks, kind)
    params, state = SMALL, tx.init(SMALL)
    gradients, factors, found = [], [], []

    @jax.jit
    def step(params, state):
        grads = jax.grad(small_loss_fn)(params, *SMALL_DATA)
        updates, state = tx.update(grads, state, params, loss_args=SMALL_DATA, key=KEY)
        return grads, updates, state, estimator(params, *SMALL_DATA, key=KEY).arrays()

    for _ in range(4):
        grads, updates, state, arrays = step(params, state)
        gradients.append(np.vstack([grads["w"], grads["b"]]))
        factors.append((arrays["w"]["input"], arrays["w"]["output"]))
        found.append(np.vstack([updates["w"], updates["b"]]))
        params = optax.apply_updates(params, jax.tree.map(lambda u: -0.05 * u, updates))
    expected = reference(gradients, factors, 0.8, 0.9, 1e-6, 0.7)
    close(found, expected, 1e-5)


def test_a_wide_side_keeps_its_own_coordinates():
    """One-sided: the update of a matrix whose other side is wide."""
    gradient = np.asarray(normal(40, 3, 4))
    registry = linear()
    options = {"max_factor_dim": 3, "refresh": curvature.Eigh()}
    rms = optax.scale_by_rms(decay=0.0, eps=1e-12)
    tx = curvature.in_eigenbasis(registry, rms, curvature.Shampoo(), **options)
    found, _ = jax.jit(tx.update)(gradient, tx.init(PARAMS["w"]))
    basis = np.linalg.eigh(gradient @ gradient.T)[1]
    close(found, basis @ np.sign(basis.T @ gradient), 1e-6)


# Steps -------------------------------------------------------------------------------------------


@SOURCES
def test_micro_batches_make_the_step_of_the_whole_batch(kind):
    adam = optax.scale_by_adam(eps=1e-6)
    whole = curvature.in_eigenbasis(SMALL_REGISTRY, adam, kind, **ALWAYS)
    tx = curvature.in_eigenbasis(SMALL_REGISTRY, adam, kind, accumulate=2, **ALWAYS)
    expected, _, _ = run(whole, steps=1)
    params, state = SMALL, tx.init(SMALL)
    update = jax.jit(tx.update)
    for half in (slice(0, 4), slice(4, 8)):
        data = tuple(x[half] for x in SMALL_DATA)
        grads = jax.grad(small_loss_fn)(SMALL, *data)
        updates, state = update(grads, state, SMALL, loss_args=data, key=KEY)
        params = optax.apply_updates(params, jax.tree.map(lambda u: -0.1 * u, updates))
    tolerance = 1e-6 if isinstance(kind, curvature.EmpiricalFisher) else 1e-7
    close(params, expected, tolerance)


@SOURCES
def test_a_step_that_is_not_finite_is_skipped(kind):
    tx = curvature.in_eigenbasis(SMALL_REGISTRY, optax.scale_by_adam(), kind)
    _, state, _ = run(tx, steps=2)
    grads = jax.grad(small_loss_fn)(SMALL, *SMALL_DATA)
    update = jax.jit(tx.update)
    bad = jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(jnp.nan), grads)
    updates, after = update(bad, state, SMALL, loss_args=SMALL_DATA, key=KEY)
    assert all(np.all(u == 0) for u in jax.tree.leaves(updates))
    assert (after.stats.skipped, after.stats.idle, after.step) == (1, 1, 2)
    close(after.inner, state.inner)
    close(after.statistics, state.statistics)
    _, again = update(grads, after, SMALL, loss_args=SMALL_DATA, key=KEY)
    assert (again.stats.skipped, again.stats.idle, again.step) == (1, 0, 3)
    for _ in range(22):
        _, after = update(bad, after, SMALL, loss_args=SMALL_DATA, key=KEY)
    with pytest.raises(RuntimeError, match="took none of its latest 23 steps"):
        curvature.check_progress(after)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["fisher", "shampoo"])
def test_burn_in_only_averages(kind, accumulate):
    options = {"burn_in": 2, "accumulate": accumulate, "decay": 0.95, **ALWAYS}
    tx = curvature.in_eigenbasis(SMALL_REGISTRY, optax.scale_by_adam(), KINDS[kind], **options)
    params, state, _ = run(tx, steps=2)
    close(params, SMALL)
    assert state.step == 0 and state.weight > 0.04
    (name, *_) = [layer.name for layer in SMALL_REGISTRY.layers if layer.factored]
    factor = np.asarray(curvature.averages(SMALL_REGISTRY, state)[name]["output"])
    assert np.linalg.eigvalsh(factor).max() > 0
    assert run(tx, steps=2 + accumulate)[1].step == 1


# The state of the inner transformation -----------------------------------------------------------

MOMENTS = {
    "adam": (optax.scale_by_adam(), ["vector", "diagonal"]),
    "amsgrad": (optax.scale_by_amsgrad(), ["vector", "diagonal", "diagonal"]),
    "lion": (optax.scale_by_lion(), ["vector"]),
    "rms": (optax.scale_by_rms(initial_scale=1.0), ["diagonal"]),
    "adamax": (optax.scale_by_adamax(), ["vector", "diagonal"]),
    "belief": (optax.scale_by_belief(), ["vector", "diagonal"]),
    "adagrad": (optax.scale_by_rss(), ["diagonal"]),
    "chain": (optax.chain(optax.trace(0.9), optax.scale_by_rms()), ["vector", "diagonal"]),
    "sign": (optax.scale_by_sign(), []),
}


@pytest.mark.parametrize("inner, moments", MOMENTS.values(), ids=MOMENTS)
def test_moments_are_told_apart(inner, moments):
    layout = Layout.of(inner)
    assert [m for m in layout.moments if m] == moments
    state = inner.init(SMALL)
    parts = layout.split(state)
    assert [len(parts[kind]) for kind in ("vector", "diagonal")] == [
        moments.count("vector"),
        moments.count("diagonal"),
    ]
    jax.tree.map(np.testing.assert_array_equal, layout.joined(state, parts), state)
    run(curvature.in_eigenbasis(SMALL_REGISTRY, inner, curvature.Shampoo(), **ALWAYS), steps=2)


def test_a_factored_second_moment_stays_where_it_is():
    inner = optax.scale_by_factored_rms(min_dim_size_to_factor=3)
    tx = curvature.in_eigenbasis(SMALL_REGISTRY, inner, curvature.Shampoo(), **ALWAYS)
    _, state, updates = run(tx, steps=3)
    # Of the rows of the weight and its bias.
    assert [x.shape[-1] for x in jax.tree.leaves(state.inner.v_row)] == [1, 4]
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


def test_a_state_that_cannot_follow_is_refused():
    def update(updates, state, params=None):
        return updates, jax.tree.map(lambda s, u: s + u + u**2, state, updates)

    inner = optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), update)
    with pytest.raises(ValueError, match=r"neither odd in the gradient.*nor even"):
        curvature.in_eigenbasis(REGISTRY, inner)


@pytest.mark.parametrize(
    ("inner", "by_entry"),
    [
        (optax.adamw(lambda count: 0.1 * count), True),
        (optax.scale_by_trust_ratio(), False),
        (optax.lamb(lambda count: 0.1 * count), False),  # the first rate is zero
        (optax.clip_by_block_rms(5.0), False),  # which the first trial's gradient does not reach
    ],
)
def test_what_acts_entry_by_entry_is_found_out(inner, by_entry, standard_promotion):
    assert Layout.of(inner).by_entry == by_entry


def test_a_flattened_state_is_refused():
    with pytest.raises(ValueError, match=r"has the shape \(6,\) for a matrix of \(2, 3\)"):
        curvature.in_eigenbasis(REGISTRY, optax.flatten(optax.scale_by_adam()))


def test_a_state_that_is_built_otherwise_for_a_tree_is_refused_in_words():
    tx = curvature.in_eigenbasis(
        SMALL_REGISTRY, optax.scale_by_sm3(), curvature.Shampoo(), **ALWAYS
    )
    with pytest.raises(ValueError, match="built in another way than that for one matrix"):
        run(tx, steps=2)


def test_a_traced_hyperparameter_is_refused_in_words():
    make = jax.jit(lambda rate: curvature.in_eigenbasis(REGISTRY, optax.adam(rate)).init(PARAMS))
    with pytest.raises(ValueError, match="learning rate behind"):
        make(0.1)


# Messages ----------------------------------------------------------------------------------------


def test_what_is_wrong_is_said_at_once():
    make = functools.partial(curvature.in_eigenbasis, REGISTRY)
    adam = optax.scale_by_adam()
    with pytest.raises(TypeError, match=r"inner is .*expected an optax transformation"):
        make(optax.scale_by_adam)
    with pytest.raises(TypeError, match=r"refresh is Cholesky.*expected Eigh\(\) or QR\(\)"):
        make(adam, refresh=curvature.Cholesky())
    with pytest.raises(TypeError, match=r"kind is the class Shampoo, expected an instance"):
        make(adam, curvature.Shampoo)
    with pytest.raises(ValueError, match="refresh_every is 0"):
        make(adam, refresh_every=0)
    with pytest.raises(ValueError, match="decay is 1"):
        make(adam, decay=1.0)
    tx = make(adam)
    with pytest.raises(ValueError, match="without loss_args"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    with pytest.raises(TypeError, match="expected EigenbasisState"):
        tx.update(PARAMS, (), PARAMS, loss_args=DATA)
    with pytest.raises(ValueError, match="without params, which weight_decay shrinks"):
        decaying = curvature.eigen_adam(
            SMALL_REGISTRY, 0.1, kind=curvature.Shampoo(), weight_decay=0.1
        )
        decaying.update(SMALL, decaying.init(SMALL))


def test_a_part_of_the_state_that_a_first_update_leaves_alone_is_refused():
    """A lagging vector would look like the diagonal of an operator."""

    def update(updates, state, params=None):
        return state[1], (state[1], updates)

    def init(params):
        return jax.tree.map(jnp.zeros_like, (params, params))

    with pytest.raises(ValueError, match="its first update does not change it"):
        curvature.in_eigenbasis(REGISTRY, optax.GradientTransformation(init, update))


@pytest.mark.usefixtures("library_defaults")
def test_moments_of_few_bits_stay_so_when_a_basis_is_renewed():
    def loss(p, x, y):
        return curvature.losses.l2_loss(x @ p["w"], y).mean()

    params, x, y = {"w": jnp.eye(4, 3)}, jnp.ones((4, 4)), jnp.zeros((4, 3))
    inner = optax.scale_by_adam(mu_dtype=jnp.bfloat16)
    tx = curvature.in_eigenbasis(curvature.register(loss, params, x, y), inner)
    state, grads = tx.init(params), jax.grad(loss)(params, x, y)
    for i in range(2):
        _, after = tx.update(grads, state, params, loss_args=(x, y), key=jax.random.key(i))
        assert [x.dtype for x in jax.tree.leaves(after)] == [
            x.dtype for x in jax.tree.leaves(state)
        ]
        state = after
