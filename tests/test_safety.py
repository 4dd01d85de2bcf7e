"""What keeps a run from being lost: bounds on steps, early refreshes, rules, and errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import curvature
from curvature.optimizer.uncovered import typical_inverse

L = curvature.losses
KEYS = jax.random.split(jax.random.key(0), 6)
X, Y = jax.random.normal(KEYS[0], (32, 5)), jnp.arange(32) % 3
T = jax.random.normal(KEYS[1], (32, 2))
PARAMS = {
    "w": jax.random.normal(KEYS[2], (5, 8)) * 0.3,
    "c": jax.random.normal(KEYS[3], (8, 3)) * 0.3,
}
EXACT = curvature.Fisher(samples=None)
LM, MODEL = curvature.LevenbergMarquardt(), curvature.QuadraticModel()
cross_entropy = L.softmax_cross_entropy_with_integer_labels


def loss_fn(p, x, y):
    return cross_entropy(jnp.tanh(x @ p["w"]) @ p["c"], y).mean()


REGISTRY = curvature.register(loss_fn, PARAMS, X, Y)
GRADS = jax.jit(jax.grad(loss_fn))(PARAMS, X, Y)


def dot(a, b):
    return sum(float(jnp.vdot(x, y)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def first_step(tx, grads=GRADS, params=PARAMS, args=(X, Y)):
    return jax.jit(tx.update)(grads, tx.init(params), params, loss_args=args, key=KEYS[4])


def seen(step, damping):
    """v'(G + damping I)v as the blocks see it, by inverting what preconditions."""
    blocks = curvature.Estimator(REGISTRY, EXACT)(PARAMS, X, Y).blocks
    total = 0.0
    for layer in REGISTRY.layers:
        inverse = np.asarray(blocks[layer.name].damped_inverse(damping).to_dense())
        v = np.ravel(step[layer.name])
        total += v @ np.linalg.solve(inverse, v)
    return total


# The bound on a step ------------------------------------------------------------------------------


@pytest.mark.parametrize("graft", [None, optax.scale(7.0)], ids=["plain", "grafted"])
@pytest.mark.parametrize("clip", [1e-4, lambda count: 1e-4 / (1.0 + count)], ids=["n", "schedule"])
def test_a_step_is_as_long_as_the_bound_allows(clip, graft, standard_promotion):
    """1/2 v'(G + damping I)v is the bound, also where another optimizer gives the lengths."""
    options = {"momentum": 0.0, "damping": 0.1, "kind": EXACT, "graft": graft}
    updates, state = first_step(curvature.kfac(REGISTRY, 10.0, kl_clip=clip, **options))
    np.testing.assert_allclose(seen(updates, 0.1) / 2, 1e-4, rtol=1e-6)
    free, _ = first_step(curvature.kfac(REGISTRY, 10.0, kl_clip=None, **options))
    np.testing.assert_allclose(updates["w"], state.stats.clipped * free["w"], rtol=1e-9)


def test_the_bound_of_the_preconditioner_alone():
    tx = curvature.scale_by_curvature(REGISTRY, EXACT, damping=0.1, kl_clip=1e-5)
    updates, _ = first_step(tx)
    np.testing.assert_allclose(seen(updates, 0.1) / 2, 1e-5, rtol=1e-6)


def test_steps_are_bounded_by_default():
    plain, _ = first_step(curvature.kfac(REGISTRY, 100.0, kind=EXACT))
    bounded, _ = first_step(curvature.kfac(REGISTRY, 100.0, kind=EXACT, kl_clip=1e-3))
    np.testing.assert_array_equal(plain["w"], bounded["w"])


def test_weight_decay_is_not_shortened():
    options = {"kind": EXACT, "momentum": 0.0, "damping": 0.1, "kl_clip": 1e-9}
    plain, _ = first_step(curvature.kfac(REGISTRY, 0.5, **options))
    decayed, _ = first_step(curvature.kfac(REGISTRY, 0.5, weight_decay=0.1, **options))
    for name, w in PARAMS.items():
        np.testing.assert_allclose(decayed[name], plain[name] - 0.05 * w, rtol=1e-12)


# The first steps ----------------------------------------------------------------------------------


def test_the_first_steps_renew_everything():
    """As with periods of one; then every period counts."""
    options = {"kind": EXACT, "damping": 0.1}
    slow = {"statistics_every": 7, "refresh_every": 9}
    often = curvature.scale_by_curvature(REGISTRY, **options)
    warm = curvature.scale_by_curvature(REGISTRY, warmup_steps=3, **options, **slow)
    states = [tx.init(PARAMS) for tx in (often, warm)]
    updates = [jax.jit(tx.update) for tx in (often, warm)]
    for t in range(5):
        params = jax.tree.map(lambda p, t=t: p * (1 + t / 2), PARAMS)
        out = []
        for i, update in enumerate(updates):
            step, states[i] = update(GRADS, states[i], params, loss_args=(X, Y))
            out.append(np.asarray(step["w"]))
        assert np.allclose(*out, rtol=1e-12) == (t < 3)


def residual(p, x, y):
    """What is added to the stream, and what is read from it, is zero at first."""
    h = x @ p["in"]
    for up, down in zip(p["up"], p["down"], strict=True):
        h = h + jax.nn.gelu(h / jnp.sqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6) @ up) @ down
    return cross_entropy(h @ p["head"], y).mean()


@pytest.mark.parametrize("make", [curvature.kfac, curvature.ekfac, curvature.foof])
def test_layers_behind_zeros_do_not_run_away(make, library_defaults):
    """Their curvature is next to nothing at first: damped by it alone, the loss triples."""
    data = load_digits()
    x, y = jnp.asarray(data.data / 16, jnp.float32), jnp.asarray(data.target)
    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "in": jax.random.normal(keys[0], (64, 32)) / 8,
        "up": [jax.random.normal(key, (32, 64)) / 32**0.5 for key in keys[1:]],
        "down": [jnp.zeros((64, 32))] * 4,
        "head": jnp.zeros((32, 10)),
    }
    tx = make(curvature.register(residual, params, x[:64], y[:64]), 0.1)

    def step(carry, key):
        p, s = carry
        index = jax.random.randint(key, (64,), 0, len(x))
        value, g = jax.value_and_grad(residual)(p, x[index], y[index])
        u, s = tx.update(g, s, p, loss_args=(x[index], y[index]), key=key)
        return (optax.apply_updates(p, u), s), value

    keys = jax.random.split(jax.random.key(1), 60)
    _, values = jax.jit(jax.lax.scan, static_argnums=0)(step, (params, tx.init(params)), keys)
    assert values.max() < 2.31 and values[-10:].mean() < 0.5


# Parameters without curvature ---------------------------------------------------------------------


def two_heads(p, x, y, t):
    """One of two losses is not tagged; a weight of the losses is learned."""
    h = jnp.tanh(x @ p["w"])
    untagged = 0.1 * optax.l2_loss(h @ p["aux"], t).mean()
    weighted = jnp.exp(-p["s"]) * cross_entropy(h @ p["c"], y).mean() + p["s"]
    return weighted + untagged


HEADS = PARAMS | {"aux": jax.random.normal(KEYS[5], (8, 2)) * 0.3, "s": jnp.zeros(())}


@pytest.mark.parametrize("damping", [1e-8, 1e-3, 0.1])
def test_parameters_without_curvature_step_as_the_rest_does(damping):
    """g'Pg / g'g of the rest times the gradient, whatever the damping is."""
    registry = curvature.register(two_heads, HEADS, X, Y, T)
    grads = jax.grad(two_heads)(HEADS, X, Y, T)
    tx = curvature.scale_by_curvature(registry, EXACT, damping=damping)
    updates, state = first_step(tx, grads, HEADS, (X, Y, T))
    covered = [{n: tree[n] for n in ("w", "c")} for tree in (grads, updates)]
    scale = dot(*covered) / dot(covered[0], covered[0])
    for name in ("aux", "s"):
        np.testing.assert_allclose(updates[name], scale * grads[name], rtol=1e-9)
        assert name not in state.statistics


def test_the_typical_scale_of_nothing_is_one():
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    assert typical_inverse(zeros, zeros, jnp.zeros(())) == 1


@pytest.mark.parametrize("fallback", [None, optax.scale_by_adam()], ids=["none", "adam"])
@pytest.mark.parametrize("damping", [1e-3, 1e-2])
def test_no_run_is_lost_to_them(fallback, damping, standard_promotion):
    registry = curvature.register(two_heads, HEADS, X, Y, T)
    tx = curvature.kfac(registry, 0.1, damping=damping, fallback=fallback)

    @jax.jit
    def step(carry, i):
        p, s = carry
        value, g = jax.value_and_grad(two_heads)(p, X, Y, T)
        u, s = tx.update(g, s, p, loss_args=(X, Y, T), key=jax.random.key(i))
        return (optax.apply_updates(p, u), s), value

    _, values = jax.lax.scan(step, (HEADS, tx.init(HEADS)), jnp.arange(60))
    assert float(values.max()) < 1.1 * float(values[0]) and float(values[-1]) < float(values[0])


# Parameters without a gradient --------------------------------------------------------------------


def partly_frozen(p, x, y):
    """A frozen layer and mask, rows of another layer that are not read, something not used."""
    stop = jax.lax.stop_gradient
    h = jnp.tanh(x @ stop(p["w"]))
    return cross_entropy(jnp.where(stop(p["mask"]) < 0, 0, h)[:, 1:] @ p["c"][1:], y).mean()


STILL = PARAMS | {"mask": jnp.array([-jnp.inf] + 7 * [0.0]), "unused": jnp.ones(3)}


@pytest.mark.parametrize(
    "make",
    [
        lambda r: curvature.kfac(r, 0.1, l2=0.1),
        lambda r: curvature.kfac(r, 0.1, weight_decay=0.1),
        lambda r: curvature.kfac(r, 0.1, l2=0.1, damping=LM, graft=optax.scale_by_adam()),
        lambda r: curvature.kfac(r, MODEL, l2=0.1, damping=LM, fallback=optax.scale_by_adam()),
        lambda r: curvature.eigen_adam(
            r,
            0.1,
            weight_decay=0.1,
            weight_decay_mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p),
        ),
    ],
    ids=["l2", "weight decay", "graft", "by model", "eigen_adam"],
)
def test_penalties_leave_what_is_frozen_as_it_is(make, standard_promotion):
    registry = curvature.register(partly_frozen, STILL, X, Y)
    tx = make(registry)
    update, params, state = jax.jit(tx.update), STILL, tx.init(STILL)
    for key in KEYS[:3]:
        grads = jax.grad(partly_frozen)(params, X, Y)
        updates, state = update(grads, state, params, loss_args=(X, Y), key=key)
        params = optax.apply_updates(params, updates)
    for name in ("w", "mask", "unused"):
        np.testing.assert_array_equal(params[name], STILL[name])
    np.testing.assert_array_equal(params["c"][0], STILL["c"][0])
    assert np.all(params["c"][1:] != STILL["c"][1:])


def test_penalties_are_of_everything_where_the_loss_is_not_what_is_minimised():
    """Its gradient comes from elsewhere, and may reach what the registered function does not."""
    registry = curvature.register(partly_frozen, STILL, X, Y, objective=False)
    params = STILL | {"mask": jnp.ones(8)}
    grads = jax.tree.map(jnp.zeros_like, params)
    tx = curvature.kfac(registry, 0.1, kind=EXACT, weight_decay=0.1)
    updates, _ = first_step(tx, grads, params)
    for name, w in params.items():
        np.testing.assert_allclose(updates[name], -0.01 * w, rtol=1e-12)


# Inverses that cannot be had ----------------------------------------------------------------------


@pytest.mark.parametrize("block", ["kronecker", "foof", "dense", "ekfac"])
def test_a_layer_whose_first_refresh_fails_moves_all_the_same(block):
    """No damping and an input of rank one; the mean eigenvalue stands in, and stats tell."""
    x = jnp.ones_like(X)
    registry = REGISTRY.with_blocks(block)
    grads = jax.grad(loss_fn)(PARAMS, x, Y)
    tx = curvature.scale_by_curvature(registry, EXACT, damping=0.0)
    updates, state = first_step(tx, grads, args=(x, Y))
    failed = block in ("kronecker", "foof")  # the others have a pseudo-inverse
    assert int(state.stats.failed_refreshes) == failed
    assert all(np.any(np.asarray(u)) and np.isfinite(u).all() for u in updates.values())
    if block == "kronecker":
        found = curvature.Estimator(registry, EXACT)(PARAMS, x, Y).blocks["w"]
        means = [np.trace(f) / len(f) for f in (found.input, found.output)]
        # Both factors, of ones and of one gradient a class, are singular.
        np.testing.assert_allclose(updates["w"], grads["w"] / np.prod(means), rtol=1e-9)


# Runs that take no steps --------------------------------------------------------------------------


def test_idle_steps_are_counted_in_a_row_and_stop_a_run():
    tx = curvature.kfac(REGISTRY, 0.1, kind=EXACT)
    bad = jax.tree.map(lambda g: g * jnp.nan, GRADS)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    curvature.check_progress(state)
    for grads, idle in ((bad, 1), (bad, 2), (GRADS, 0), (bad, 1), (bad, 2), (bad, 3)):
        _, state = update(grads, state, PARAMS, loss_args=(X, Y))
        assert state.stats.idle == idle
    curvature.check_progress(state, limit=3)
    with pytest.raises(RuntimeError, match=r"none of its latest 3 steps .* 5 were skipped"):
        curvature.check_progress((state, {"more": 1}), limit=2)


def test_gradients_that_apply_if_finite_keeps_away_stop_a_run_too():
    tx = optax.apply_if_finite(curvature.kfac(REGISTRY, 0.1, kind=EXACT), 100)
    bad = jax.tree.map(lambda g: g * jnp.nan, GRADS)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for grads in (GRADS, bad, bad, bad):
        _, state = update(grads, state, PARAMS, loss_args=(X, Y))
    curvature.check_progress(state, limit=3)
    with pytest.raises(RuntimeError, match=r"none of its latest 3 steps .* 3 were skipped"):
        curvature.check_progress(state, limit=2)


@pytest.mark.parametrize("given", [True, False], ids=["value", "evaluated"])
def test_losses_that_are_not_finite_leave_the_damping_and_stop_a_run(given):
    """Their gradients are finite all the same, as behind a `jnp.where`."""

    def lost(p, x, y):
        return loss_fn(p, x, y) + jax.lax.stop_gradient(jnp.nan * p["w"][0, 0])

    tx = curvature.kfac(
        curvature.register(lost, PARAMS, X, Y),
        0.1,
        damping=curvature.LevenbergMarquardt(0.1, every=1),
        kind=EXACT,
    )
    state, update, value = tx.init(PARAMS), jax.jit(tx.update), {"value": jnp.nan} if given else {}
    for _ in range(3):
        updates, state = update(GRADS, state, PARAMS, loss_args=(X, Y), **value)
    assert np.all(updates["w"] != 0) and state.next_damping == 0.1
    curvature.check_progress(state, limit=3)
    with pytest.raises(RuntimeError, match="was not finite, in the latest 3 measurements"):
        curvature.check_progress(state, limit=2)


def test_rejected_steps_are_idle(monkeypatch):
    never = lambda self, damping, *_: (damping, jnp.asarray(True))  # noqa: E731
    monkeypatch.setattr(curvature.LevenbergMarquardt, "judged", never)
    tx = curvature.kfac(REGISTRY, 0.1, damping=curvature.LevenbergMarquardt(), kind=EXACT)
    _, state = first_step(tx)
    assert (state.stats.idle, state.stats.skipped, state.stats.rejected) == (1, 0, 1)


# The quadratic model ------------------------------------------------------------------------------


def test_a_custom_loss_has_a_gauss_newton_model():
    def loss(p, x, y):
        f = lambda z, t: (z - t) ** 2 / 2 + 0.1 * jnp.log(jnp.cosh(z))  # noqa: E731
        return L.custom(f, (x @ p["w"])[:, 0], y, event_ndim=0).mean()

    params, y = {"w": jnp.ones((5, 1))}, jnp.zeros(32)
    registry = curvature.register(loss, params, X, y)
    grads = jax.grad(loss)(params, X, y)
    for damping in (0.1, curvature.LevenbergMarquardt()):
        tx = curvature.kfac(
            registry, curvature.QuadraticModel(), damping=damping, kind=curvature.GaussNewton()
        )
        updates, _ = first_step(tx, grads, params, (X, y))
        assert dot(updates, grads) < 0


@pytest.mark.parametrize("offset", [10.0, 1e5])
def test_a_large_constant_in_the_loss_changes_nothing(offset, standard_promotion):
    """In float32, where the change of the loss is a rounding error."""

    def run(constant):
        p32, x, y = jax.tree.map(lambda a: a.astype(jnp.float32), (PARAMS, X, T[:, 0]))

        def loss(p, x, y):
            return L.l2_loss((jnp.tanh(x @ p["w"]) @ p["c"])[:, 0], y).mean() + constant

        lm = curvature.LevenbergMarquardt(1.0)
        tx = curvature.kfac(
            curvature.register(loss, p32, x, y), curvature.QuadraticModel(), damping=lm, kind=EXACT
        )

        def step(carry, _):
            p, s = carry
            u, s = tx.update(jax.grad(loss)(p, x, y), s, p, loss_args=(x, y))
            return (optax.apply_updates(p, u), s), (s.next_damping, s.stats.rejected)

        _, (damping, rejected) = jax.lax.scan(step, (p32, tx.init(p32)), None, length=60)
        return float(damping[-1]), int(rejected[-1])

    (plain, none), (shifted, rejected) = run(jnp.float32(0.0)), run(jnp.float32(offset))
    assert none == rejected == 0 and shifted < 2 * plain


# Mistakes -----------------------------------------------------------------------------------------

K = functools.partial(curvature.kfac, REGISTRY)
MISTAKES = {
    "class for a rate": (lambda: K(curvature.QuadraticModel), r"expected an instance: Quad"),
    "class for damping": (lambda: K(0.1, damping=curvature.LevenbergMarquardt), "an instance: Lev"),
    "string for damping": (lambda: K(0.1, damping="small"), "damping is 'small', expected a num"),
    "string for a rate": (lambda: K("fast"), "learning_rate is 'fast', expected a number"),
    "string for kind": (lambda: K(0.1, kind="fisher"), r"kind is 'fisher', expected Fisher\(\)"),
    "class for kind": (lambda: K(0.1, kind=curvature.Fisher), r"expected an instance: Fisher\(\)"),
    "graft not called": (lambda: K(0.1, graft=optax.adam), r"Call it: graft=adam\(...\)"),
    "fallback not called": (lambda: K(0.1, fallback=optax.adam), r"Call it: fallback=adam"),
    "loss for registry": (lambda: curvature.kfac(loss_fn, 0.1), r"expected what curvature\.regis"),
    "number for a key": (
        lambda: curvature.Estimator(REGISTRY)(PARAMS, X, Y, key=0),
        r"key is 0, expected a random key: jax\.random\.key\(0\)",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused_in_words(name):
    call, words = MISTAKES[name]
    with pytest.raises(TypeError, match=words):
        call()


@pytest.mark.parametrize("clip", [0.0, -1.0])
def test_a_bound_of_nothing_is_refused(clip):
    with pytest.raises(ValueError, match="kl_clip is"):
        K(0.1, kl_clip=clip)


OTHERS = {
    "blocks": curvature.kfac(REGISTRY.with_blocks("diagonal"), 0.1),
    "refresh": curvature.kfac(REGISTRY, 0.1, refresh=curvature.Eigh()),
    "ekfac": curvature.ekfac(REGISTRY, 0.1),
    "accumulate": curvature.kfac(REGISTRY, 0.1, accumulate=2),
    "graft": curvature.kfac(REGISTRY, 0.1, graft=optax.scale_by_adam()),
    "width": curvature.kfac(REGISTRY, 0.1, max_factor_dim=4),
    "recipe": curvature.scale_by_curvature(REGISTRY),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_state_of_another_configuration_is_refused(name):
    state = K(0.1).init(PARAMS)
    with pytest.raises((ValueError, TypeError), match=r"optimizer's state .*tx\.init\(params\)"):
        OTHERS[name].update(GRADS, state, PARAMS, loss_args=(X, Y), key=KEYS[4])


@pytest.mark.parametrize("make", [curvature.kfac, curvature.eigen_adam])
def test_a_state_of_another_dtype_is_refused(make, standard_promotion):
    """JAX's own error names a branch of a conditional."""
    single = jax.tree.map(lambda p: p.astype(jnp.float32), PARAMS)
    state = make(curvature.register(loss_fn, single, X.astype(jnp.float32), Y), 0.1).init(single)
    with pytest.raises(ValueError, match=r"dtype: statistics.*is float32, expected float64. Cast"):
        make(REGISTRY, 0.1).update(GRADS, state, PARAMS, loss_args=(X, Y), key=KEYS[4])


def test_a_mask_of_false_decays_nothing():
    def loss(w, x, y):
        return L.squared_error(x @ w, y).mean()

    w, args = T[0], (T, T[:, 0])
    registry = curvature.register(loss, w, *args)
    for mask in (True, False):
        tx = curvature.kfac(registry, 0.1, weight_decay=0.5, weight_decay_mask=mask)
        updates, _ = first_step(tx, jnp.zeros(2), w, args)
        np.testing.assert_allclose(updates, -0.05 * w if mask else jnp.zeros(2), rtol=1e-6)
