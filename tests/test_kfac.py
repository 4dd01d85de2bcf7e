"""The optax transformations: against NumPy, against optax, and when things go wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvature

EXAMPLES = 7
EXACT = curvature.GaussNewton()
TINY = 1e-22  # damping; its square root meets the factors


def close(actual, expected, tolerance=1e-10):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def all_close(actual, expected, tolerance=1e-10):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(functools.partial(close, tolerance=tolerance), actual, expected)


def equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def net(params, x):
    h = jnp.tanh(x @ params["a"]["w"] + params["a"]["b"])
    return (h * jnp.cumsum(params["s"]) if "s" in params else h) @ params["c"]


def loss_fn(params, batch):
    return curvature.losses.l2_loss(net(params, batch["x"]), batch["y"]).sum(-1).mean()


def parameters(dtype=jnp.float64, generic=False):
    rng = np.random.default_rng(0)
    params = {
        "a": {"w": rng.normal(size=(3, 4)), "b": rng.normal(size=4)},
        "c": rng.normal(size=(4, 2)),
    }
    if generic:
        params["s"] = rng.normal(size=4)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def batch(seed=0, examples=EXAMPLES, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(examples, 3)), rng.normal(size=(examples, 2))
    return {"x": jnp.asarray(x, dtype), "y": jnp.asarray(y, dtype)}


def registered(dtype=jnp.float64, generic=False):
    return curvature.register(loss_fn, parameters(dtype, generic), batch(dtype=dtype))


REGISTRY = registered()
gradient = jax.jit(jax.grad(loss_fn))


def stepper(tx, loss=loss_fn):
    """A jitted training step: (params, state, batch, key) -> (params, state, updates)."""

    @jax.jit
    def step(params, state, batch, key):
        grads = jax.grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params, loss_args=(batch,), key=key)
        return optax.apply_updates(params, updates), state, updates

    return step


# One step -----------------------------------------------------------------------------------------

LEAST_SQUARES = {
    "mean": lambda z, y: curvature.losses.l2_loss(z, y).sum(-1).mean(),
    "sum": lambda z, y: curvature.losses.l2_loss(z, y).sum(),
    "uneven weights": lambda z, y: (
        0.3 * curvature.losses.squared_error(z, y).sum() + 2 * curvature.losses.l2_loss(z, y).mean()
    ),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [*[(name, EXACT) for name in LEAST_SQUARES], ("mean", curvature.Fisher(samples=None))],
    ids=str,
)
def test_a_step_on_linear_least_squares_is_newtons(name, kind):
    """G of one linear layer is A x B without approximation, so the step solves the problem."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(20, 3)), rng.normal(size=(20, 2))
    params = {"w": jnp.asarray(rng.normal(size=(3, 2))), "b": jnp.asarray(rng.normal(size=2))}

    def loss(params, x, y):
        return LEAST_SQUARES[name](x @ params["w"] + params["b"], y)

    def flat_loss(flat):
        return loss({"w": flat[:6].reshape(3, 2), "b": flat[6:]}, x, y)

    registry = curvature.register(loss, params, x, y)
    tx = curvature.kfac(registry, 1.0, momentum=0.0, damping=TINY, kind=kind, kl_clip=None)

    @jax.jit
    def step(params):
        grads = jax.grad(loss)(params, x, y)
        updates, _ = tx.update(grads, tx.init(params), params, loss_args=(x, y))
        flat = jnp.concatenate([params["w"].ravel(), params["b"]])
        return updates, jax.grad(flat_loss)(flat), jax.hessian(flat_loss)(flat)

    updates, gradient, hessian = step(params)
    newton = -np.linalg.solve(hessian, gradient)
    close(jnp.concatenate([updates["w"].ravel(), updates["b"]]), newton, 1e-8)
    solution = np.linalg.lstsq(np.column_stack([x, np.ones(20)]), y, rcond=None)[0]
    new = optax.apply_updates(params, updates)
    close(np.concatenate([new["w"], new["b"][None]]), solution, 1e-8)


def test_a_control_the_empirical_fisher_is_not_newton():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(20, 3)), rng.normal(size=(20, 2))
    params = {"w": jnp.asarray(rng.normal(size=(3, 2)))}

    def loss(params, x, y):
        return curvature.losses.l2_loss(x @ params["w"], y).sum(-1).mean()

    registry = curvature.register(loss, params, x, y)
    tx = curvature.kfac(registry, 1.0, 0.0, TINY, kind=curvature.EmpiricalFisher())
    grads = jax.grad(loss)(params, x, y)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params, loss_args=(x, y))
    solution = np.linalg.lstsq(x, y, rcond=None)[0]
    assert np.abs(updates["w"] + params["w"] - solution).max() > 0.1


# Averages, refreshes, schedules -------------------------------------------------------------------


def factored_inverse(a, b, damping):
    """The two inverted factors of a Kronecker block."""
    pi = np.sqrt(np.trace(a) / len(a) / (np.trace(b) / len(b)))
    return (
        np.linalg.inv(a + pi * np.sqrt(damping) * np.eye(len(a))),
        np.linalg.inv(b + np.sqrt(damping) / pi * np.eye(len(b))),
    )


def inverses(statistics, damping):
    """{layer: (A^-1, B^-1)} with NumPy from {layer: {input, output}}."""
    return {
        name: factored_inverse(np.asarray(s["input"] / s["rows"]), np.asarray(s["output"]), damping)
        for name, s in statistics.items()
    }


def preconditioned(inverse, grads):
    """The preconditioned gradient of `net`, layer by layer, with NumPy."""
    names = {layer.parameters: layer.name for layer in REGISTRY.layers}
    left, right = inverse[names["['a']['w']", "['a']['b']"]]
    first = left @ np.concatenate([grads["a"]["w"], grads["a"]["b"][None]]) @ right
    left, right = inverse[names[("['c']",)]]
    return {"a": {"w": first[:-1], "b": first[-1]}, "c": left @ grads["c"] @ right}


KIND = curvature.Fisher(samples=2)


@functools.cache
def path():
    """Five steps with another batch, key and parameters each, and their statistics."""
    estimator = jax.jit(curvature.Estimator(REGISTRY, KIND).statistics)
    steps = []
    for t in range(5):
        params = jax.tree.map(lambda p, t=t: p * (1 + t / 9), parameters())
        data, key = batch(t), jax.random.key(t)
        steps.append((params, data, key, estimator(params, data, key=key)))
    return steps


def by_hand(damping, decay, statistics_every, refresh_every):
    """What `scale_by_curvature` has to keep and to return on `path`, step by step."""
    averages, weight, inverse = None, 0.0, None
    for t, (params, data, _, fresh) in enumerate(path()):
        if averages is None:
            averages = jax.tree.map(np.zeros_like, fresh)
        if t % statistics_every == 0:
            averages = jax.tree.map(
                lambda m, s: decay * m + (1 - decay) * np.asarray(s), averages, fresh
            )
            weight = decay * weight + (1 - decay)
        if t % refresh_every == 0:
            used = damping(t)
            inverse = inverses(jax.tree.map(lambda m, w=weight: m / w, averages), used)
        yield averages, weight, used, inverse, preconditioned(inverse, gradient(params, data))


@pytest.mark.parametrize(
    ("statistics_every", "refresh_every", "decay"),
    [(1, 1, 0.8), (2, 2, 0.8), (1, 3, 0.8), (3, 2, 0.0)],
)
def test_averages_and_refreshes_are_those_computed_by_hand(statistics_every, refresh_every, decay):
    def damping(t):
        return 0.05 / (1.0 + jnp.asarray(t, float))

    tx = curvature.scale_by_curvature(
        REGISTRY,
        KIND,
        damping=damping,
        decay=decay,
        statistics_every=statistics_every,
        refresh_every=refresh_every,
        warmup_steps=0,
        spread=False,
    )
    update = jax.jit(tx.update)
    state = tx.init(parameters())
    expected = by_hand(damping, decay, statistics_every, refresh_every)
    for t, ((params, data, key, _), hand) in enumerate(zip(path(), expected, strict=True)):
        averages, weight, used, inverse, direction = hand
        grads = gradient(params, data)
        updates, state = update(grads, state, params, loss_args=(data,), key=key)
        found = curvature.averages(REGISTRY, state)
        all_close(found, jax.tree.map(lambda x, w=weight: x / w, averages))
        close(state.weight, weight)
        close(state.stats.damping, used)
        kept = {n: {"input": a, "output": b} for n, (a, b) in inverse.items()}
        all_close(jax.tree.map(lambda x: x[0], state.inverse), kept, 1e-8)
        all_close(updates, direction, 1e-8)
        assert state.step == t + 1
    assert state.stats.skipped == state.stats.failed_refreshes == 0


@functools.cache
def one_step():
    """Parameters, data, their gradient and exact statistics."""
    params, data = parameters(), batch()
    statistics = jax.jit(curvature.Estimator(REGISTRY, EXACT).statistics)(params, data)
    return params, data, gradient(params, data), statistics


def test_the_first_step_uses_unbiased_averages():
    """However long the memory, the first inverse is that of the first statistics."""
    tx = curvature.scale_by_curvature(REGISTRY, EXACT, damping=0.1, decay=0.999)
    params, data, grads, statistics = one_step()
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params, loss_args=(data,))
    all_close(updates, preconditioned(inverses(statistics, 0.1), grads))


def test_wide_factors_are_diagonal():
    tx = curvature.scale_by_curvature(REGISTRY, EXACT, damping=0.1, max_factor_dim=3)
    params, data, grads, statistics = one_step()
    cut = {
        name: {k: np.diag(np.diag(f)) if np.size(f) > 9 else np.asarray(f) for k, f in s.items()}
        for name, s in statistics.items()
    }
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params, loss_args=(data,))
    all_close(updates, preconditioned(inverses(cut, 0.1), grads))
    assert sorted(x.ndim - 1 for x in jax.tree.leaves(state.inverse)) == [1, 1, 1, 2]


def test_the_default_kind_is_the_fisher_with_one_sample(key):
    params, data = parameters(), batch()
    grads = gradient(params, data)
    found = []
    for kinds in ((), (curvature.Fisher(samples=1),)):
        tx = curvature.scale_by_curvature(REGISTRY, *kinds)
        update = jax.jit(tx.update)
        found.append(update(grads, tx.init(params), params, loss_args=(data,), key=key)[0])
    equal(*found)


def test_momentum_and_learning_rate():
    """As optax's `trace` after the preconditioner, and by hand: v <- direction + momentum v."""
    settings = {"damping": 0.01, "decay": 0.9, "statistics_every": 2, "refresh_every": 1}
    settings["warmup_steps"] = 0
    precondition = curvature.scale_by_curvature(REGISTRY, **settings)
    tx = curvature.kfac(REGISTRY, 0.1, 0.7, kl_clip=None, **settings)
    update, direct = jax.jit(tx.update), jax.jit(precondition.update)
    params = parameters()
    state, inner = tx.init(params), precondition.init(params)
    trace = optax.trace(0.7)
    traced = trace.init(params)
    velocity = jax.tree.map(np.zeros_like, params)
    for t in range(4):
        args = {"loss_args": (batch(t),), "key": jax.random.key(t)}
        grads = gradient(params, batch(t))
        direction, inner = direct(grads, inner, params, **args)
        velocity = jax.tree.map(lambda v, d: np.asarray(d) + 0.7 * v, velocity, direction)
        optax_velocity, traced = trace.update(direction, traced)
        updates, state = update(grads, state, params, **args)
        all_close(updates, jax.tree.map(lambda v: -0.1 * v, velocity), 1e-12)
        all_close(updates, jax.tree.map(lambda v: -0.1 * v, optax_velocity), 1e-12)
        params = optax.apply_updates(params, updates)
        all_close(state.curvature, inner, 1e-12)
        equal(tuple(state.stats[:5]), tuple(state.curvature.stats))


def schedule(function):
    """An optax schedule; they mix int32 and float, which strict promotion forbids."""

    def at(count):
        with jax.numpy_dtype_promotion("standard"):
            return function(count)

    return at


def test_schedules_of_learning_rate_and_damping():
    """Both count the same steps, from zero."""
    rate = schedule(optax.piecewise_constant_schedule(0.5, {1: 0.1, 3: 0.5}))
    damping = schedule(optax.linear_schedule(0.1, 0.01, 3))
    options = {"kind": EXACT, "decay": 0.0, "refresh_every": 1, "kl_clip": None}
    tx = curvature.kfac(REGISTRY, rate, 0.0, damping, **options)
    params, data, grads, statistics = one_step()
    state = tx.init(params)
    update = jax.jit(tx.update)
    table = [(0.5, 0.1), (0.05, 0.07), (0.05, 0.04), (0.025, 0.01), (0.025, 0.01)]
    for r, d in table:
        updates, state = update(grads, state, params, loss_args=(data,))
        direction = preconditioned(inverses(statistics, d), grads)
        all_close(updates, jax.tree.map(lambda x, r=r: -r * x, direction), 1e-6)
        close(state.stats.damping, d, 1e-6)


def test_hyperparameters_can_be_injected():
    """`optax.inject_hyperparams` passes traced numbers; one may be changed between steps."""
    static = ("statistics_every", "refresh_every", "burn_in", "accumulate", "max_factor_dim")
    static += ("warmup_steps",)
    make = optax.inject_hyperparams(curvature.kfac, static_args=static)
    tx = make(REGISTRY, learning_rate=0.1, damping=0.01, decay=0.9, kind=EXACT, kl_clip=None)
    params, data, grads, statistics = one_step()
    state = tx.init(params)
    state.hyperparams["damping"] = jnp.asarray(0.5)
    updates, state = jax.jit(tx.update)(grads, state, params, loss_args=(data,))
    direction = preconditioned(inverses(statistics, 0.5), grads)
    all_close(updates, jax.tree.map(lambda x: -0.1 * x, direction))


def test_chain_passes_the_extra_arguments_on():
    tx = optax.chain(
        optax.clip_by_global_norm(0.3),
        curvature.scale_by_curvature(REGISTRY, EXACT, damping=0.1),
        optax.scale(-0.2),
    )
    params, data, grads, statistics = one_step()
    norm = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(grads)))
    assert norm > 0.3
    clipped = jax.tree.map(lambda g: np.asarray(g) * 0.3 / norm, grads)
    direction = preconditioned(inverses(statistics, 0.1), clipped)
    _, _, updates = stepper(tx)(params, tx.init(params), data, None)
    all_close(updates, jax.tree.map(lambda d: -0.2 * d, direction))


def test_extra_arguments_of_others_are_ignored():
    tx = curvature.kfac(REGISTRY, 0.1, kind=EXACT)
    params, data = parameters(), batch()
    grads = gradient(params, data)
    plain, _ = jax.jit(tx.update)(grads, tx.init(params), params, loss_args=(data,))
    more, _ = jax.jit(tx.update)(
        grads, tx.init(params), params, loss_args=[data], value=1.0, grad=grads
    )
    equal(plain, more)


def test_another_batch_size_than_registered_works():
    params, data = parameters(), batch(examples=11)
    grads = gradient(params, data)
    found = []
    for examples in (EXAMPLES, 11):
        registry = curvature.register(loss_fn, params, batch(examples=examples))
        tx = curvature.kfac(registry, 0.1, kind=EXACT)
        found.append(jax.jit(tx.update)(grads, tx.init(params), params, loss_args=(data,)))
    equal(*found)


def test_shapes_are_enough_to_register():
    params, data = parameters(), batch()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, data))
    grads = gradient(params, data)
    found = []
    for registry in (REGISTRY, curvature.register(loss_fn, *shapes)):
        tx = curvature.kfac(registry, 0.1, kind=EXACT)
        found.append(jax.jit(tx.update)(grads, tx.init(params), params, loss_args=(data,)))
    equal(*found)


# Excluded parameters and the fallback -------------------------------------------------------------


def fallback_setting():
    """A registry with a generic parameter, and what one step on it needs."""
    registry, params, data = registered(generic=True), parameters(generic=True), batch()
    return registry, params, data, gradient(params, data)


def test_fallback_takes_the_generic_parameters_and_nothing_else(standard_promotion):
    """`s` gets Adam's steps, the layers those of the plain preconditioner; no key is needed.

    (optax's Adam raises a float to an int32 power, which strict promotion forbids.)
    """
    registry, params, data, grads = fallback_setting()
    settings = {"kind": EXACT, "damping": 0.1}
    plain = curvature.scale_by_curvature(registry, **settings)
    mixed = curvature.scale_by_curvature(registry, fallback=optax.scale_by_adam(), **settings)
    adam = optax.scale_by_adam()
    plain_update, mixed_update, adam_update = (jax.jit(tx.update) for tx in (plain, mixed, adam))
    states = [plain.init(params), mixed.init(params), adam.init(params["s"])]
    for t in range(3):
        grads = jax.tree.map(lambda g, t=t: g * (1 + t) ** 2, grads)
        without, states[0] = plain_update(
            grads, states[0], params, loss_args=(data,), key=jax.random.key(t)
        )
        updates, states[1] = mixed_update(grads, states[1], params, loss_args=(data,))
        expected, states[2] = adam_update(grads["s"], states[2])
        close(updates["s"], expected, 1e-12)
        assert np.abs(np.asarray(without["s"]) - expected).max() > 0.01
        for name in ("a", "c"):
            all_close(updates[name], without[name], 1e-12)
    assert set(states[1].statistics) == set(states[0].statistics) - {"s"}
    state = states[1]
    zeros, after = mixed_update(poison(grads), state, params, loss_args=(data,))
    assert all(np.all(np.asarray(z) == 0) for z in jax.tree.leaves(zeros))
    equal(after.fallback, state.fallback)


def test_gradients_of_excluded_parameters_pass_unchanged_or_go_to_the_fallback():
    registry, params, data, grads = fallback_setting()
    registry = registry.override("s", exclude=True).override("c", exclude=True)
    for fallback, factor in ((None, 1.0), (optax.scale(-3.0), -3.0)):
        tx = curvature.scale_by_curvature(registry, EXACT, fallback=fallback)
        updates, state = jax.jit(tx.update)(grads, tx.init(params), params, loss_args=(data,))
        for name in ("s", "c"):
            close(updates[name], factor * grads[name], 1e-15)
        assert list(state.statistics) == ["a"]
        assert not np.allclose(updates["a"]["w"], factor * grads["a"]["w"])


def test_kfac_applies_momentum_and_learning_rate_to_the_fallback_too():
    registry, params, data, grads = fallback_setting()
    options = {"kind": EXACT, "kl_clip": None}
    tx = curvature.kfac(registry, 0.1, 0.5, fallback=optax.scale(2.0), **options)
    update, state = jax.jit(tx.update), tx.init(params)
    for total in (1.0, 1.5):
        updates, state = update(grads, state, params, loss_args=(data,))
        close(updates["s"], -0.1 * total * 2.0 * grads["s"], 1e-12)


def test_the_fallback_gets_the_extra_arguments():
    def update(updates, state, params=None, *, value, **extra):
        return jax.tree.map(lambda u: u * value, updates), state

    fallback = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    registry, params, data, grads = fallback_setting()
    tx = curvature.kfac(registry, 1.0, 0.0, kind=EXACT, fallback=fallback, kl_clip=None)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params, loss_args=(data,), value=5.0)
    close(updates["s"], -5.0 * grads["s"], 1e-15)


# State --------------------------------------------------------------------------------------------


def signature(tree):
    """Structure, shapes, dtypes and weak types."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(x.shape, x.dtype, x.weak_type) for x in leaves]


@pytest.mark.parametrize(
    ("dtype", "generic", "periods"),
    [
        ("float64", False, (1, 1)),
        ("float64", True, (2, 3)),
        ("float32", True, (1, 1)),
        ("float32", True, (2, 3)),
        ("bfloat16", True, (1, 1)),
        ("bfloat16", False, (2, 3)),
    ],
    ids=str,
)
def test_state_is_a_pytree_of_arrays_that_never_changes_its_form(periods, generic, dtype):
    """Nor do parameters and updates their dtype: statistics are float32 or wider, they are not."""
    registry = registered(dtype, generic)
    tx = curvature.kfac(
        registry, 0.01, damping=0.1, statistics_every=periods[0], refresh_every=periods[1]
    )
    params, data = parameters(dtype, generic), batch(dtype=dtype)
    state = tx.init(params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert signature(jax.eval_shape(tx.init, params)) == signature(state)
    grads = jax.eval_shape(jax.grad(loss_fn), params, data)
    update = functools.partial(tx.update, loss_args=(data,), key=jax.random.key(0))
    updates, after = jax.eval_shape(update, grads, state, params)
    assert signature(after) == signature(state)
    assert signature(updates) == signature(params)
    wide = {jnp.dtype("float64" if dtype == "float64" else "float32")}
    kept = (state.curvature.statistics, state.curvature.inverse)
    assert {x.dtype for x in jax.tree.leaves(kept)} == wide


def test_low_precision_parameters_are_trained():
    registry = registered("bfloat16", generic=True)
    tx = curvature.kfac(registry, 0.01, damping=0.1, statistics_every=2)
    params, data = parameters("bfloat16", generic=True), batch(dtype="bfloat16")
    state = tx.init(params)
    step, form = stepper(tx), signature((params, state))
    for t in range(3):
        params, state, updates = step(params, state, data, jax.random.key(t))
        assert signature((params, state)) == form
        assert all(np.any(np.asarray(u) != 0) for u in jax.tree.leaves(updates))
    assert state.stats.skipped == 0


def test_low_precision_follows_double_precision():
    """bfloat16 parameters and activations, float32 statistics: the same direction to 2 %."""
    found = {}
    for dtype in (jnp.float64, jnp.bfloat16):
        registry = registered(dtype)
        tx = curvature.scale_by_curvature(registry, EXACT, damping=0.1)
        rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (parameters(), batch()))
        params, data = jax.tree.map(lambda x, d=dtype: x.astype(d), rounded)
        _, _, updates = stepper(tx)(params, tx.init(params), data, None)
        leaves = [np.asarray(u, np.float64).ravel() for u in jax.tree.leaves(updates)]
        found[dtype] = np.concatenate(leaves)
    exact, low = found.values()
    assert 0 < np.linalg.norm(low - exact) < 0.02 * np.linalg.norm(exact)


def test_a_jitted_step_compiles_once():
    traces = []

    def counted(params, batch):
        traces.append(None)
        return loss_fn(params, batch)

    tx = curvature.kfac(REGISTRY, 0.01, damping=0.1, statistics_every=2, refresh_every=3)
    step = stepper(tx, counted)
    params = parameters()
    state = tx.init(params)
    losses = []
    for t in range(20):
        params, state, _ = step(params, state, batch(), jax.random.key(t))
        losses.append(loss_fn(params, batch()))
    assert len(traces) == 1  # the step's own gradient: traced once
    assert losses[-1] < losses[0]


# What is not finite -------------------------------------------------------------------------------


def poison(tree, value=np.nan):
    """The tree with one entry of each leaf replaced."""
    return jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(value), tree)


def as_large_as_can_be(tree):
    """Finite, but multiplied by anything above 1.1 it is not."""
    largest = max(np.abs(x).max() for x in jax.tree.leaves(tree))
    return jax.tree.map(lambda x: x / largest * 1.7e308, tree)


POISONED = {
    "gradient nan": lambda grads, data: (poison(grads), data),
    "one leaf of the gradient nan": lambda grads, data: ({**grads, "c": poison(grads["c"])}, data),
    "gradient inf": lambda grads, data: (poison(grads, np.inf), data),
    "batch and gradient nan": lambda grads, data: (poison(grads), poison(data)),
    "statistics nan": lambda grads, data: (grads, poison(data)),
    "statistics inf": lambda grads, data: (grads, poison(data, 1e200)),
    "update inf": lambda grads, data: (as_large_as_can_be(grads), data),
}
OPTIMIZERS = {
    "scale_by_curvature": lambda **kwargs: curvature.scale_by_curvature(REGISTRY, EXACT, **kwargs),
    "kfac": lambda **kwargs: curvature.kfac(REGISTRY, 0.01, kind=EXACT, **kwargs),
}


@functools.cache
def optimizer(name, every):
    periods = {"statistics_every": every, "refresh_every": every, "warmup_steps": 0}
    tx = OPTIMIZERS[name](damping=1e-3, **periods)
    return tx, jax.jit(tx.update)


def without_skipped(state):
    curvature_state = getattr(state, "curvature", state)
    stats = curvature_state.stats._replace(skipped=0, idle=0)
    curvature_state = curvature_state._replace(stats=stats)
    if hasattr(state, "curvature"):
        return state._replace(curvature=curvature_state)
    return curvature_state


@pytest.mark.parametrize(
    ("name", "every"), [("scale_by_curvature", 1), ("scale_by_curvature", 2), ("kfac", 2)]
)
@pytest.mark.parametrize("what", POISONED)
def test_a_step_that_is_not_finite_is_skipped(what, name, every):
    """The update is zero, the state as before but for the count; training goes on unharmed."""
    tx, update = optimizer(name, every)

    def run(bad_steps):
        params, out = parameters(), []
        state = tx.init(params)
        for t in range(4):
            data = batch(t)
            grads = gradient(params, data)
            if t in bad_steps:
                bad_grads, bad_data = POISONED[what](grads, data)
                for _ in range(2):
                    zeros, after = update(bad_grads, state, params, loss_args=(bad_data,))
                    assert all(np.all(np.asarray(z) == 0) for z in jax.tree.leaves(zeros))
                    if what != "update inf":  # its statistics are averaged all the same
                        equal(without_skipped(after), without_skipped(state))
                    assert after.stats.skipped == state.stats.skipped + 1
                    state = after
            updates, state = update(grads, state, params, loss_args=(data,))
            params = optax.apply_updates(params, updates)
            assert all(np.any(np.asarray(u) != 0) for u in jax.tree.leaves(updates))
            out.append((params, without_skipped(state)))
        return out, state.stats.skipped

    # Steps 0 and 2 are those in which statistics are taken in either period.
    disturbed, skipped = run({0, 2})
    undisturbed, none = run(set())
    assert (skipped, none) == (4, 0)
    if what != "update inf":
        equal(disturbed, undisturbed)


def test_what_is_finite_is_not_skipped_because_of_its_size():
    """The control: huge but finite gradients and tiny ones pass."""
    tx, update = optimizer("scale_by_curvature", 1)
    params, data = parameters(), batch()
    grads = gradient(params, data)
    plain, _ = update(grads, tx.init(params), params, loss_args=(data,))
    for scale in (1e150, 1e-150):
        scaled = jax.tree.map(lambda g, s=scale: g * s, grads)
        updates, state = update(scaled, tx.init(params), params, loss_args=(data,))
        assert state.stats.skipped == 0
        all_close(jax.tree.map(lambda u, s=scale: u / s, updates), plain)


def test_a_refresh_that_is_not_finite_keeps_the_previous_inverse():
    """Singular factors and no damping at the second step: its Cholesky factor does not exist."""

    def damping(t):
        return jnp.where(t == 1, 0.0, 0.1)

    tx = curvature.scale_by_curvature(REGISTRY, EXACT, damping=damping)
    params, data = parameters(), batch()
    data["x"] = data["x"].at[:, 1].set(0)
    grads = gradient(params, data)
    update = jax.jit(tx.update)
    states, updates = [tx.init(params)], []
    for _ in range(3):
        u, s = update(grads, states[-1], params, loss_args=(data,))
        states.append(s)
        updates.append(u)
    singular = REGISTRY.layers[0].name
    equal(states[2].inverse[singular], states[1].inverse[singular])
    equal(updates[1]["a"], updates[0]["a"])
    assert [s.stats.failed_refreshes for s in states] == [0, 0, 1, 1]
    assert [s.stats.skipped for s in states] == [0, 0, 0, 0]
    assert [s.step for s in states] == [0, 1, 2, 3]
    all_close(updates[2], updates[0])


# Bad inputs ---------------------------------------------------------------------------------------

PARAMS, BATCH = parameters(), batch()
GRADS = gradient(PARAMS, BATCH)


def untagged(params, batch):
    return optax.losses.l2_loss(net(params, batch["x"]), batch["y"]).mean()


def integer(tree):
    return jax.tree.map(lambda x: x.astype(jnp.int32), tree)


# name -> (call, exception, words of the message in order)
BAD_MODELS = {
    "no tagged loss": (lambda: curvature.register(untagged, PARAMS, BATCH), ValueError,
                       "no tagged loss.*Use a loss of curvature.losses"),
    "a tagged loss that is not used": (
        lambda: curvature.register(lambda p: (p["c"] ** 2).sum(), PARAMS), ValueError,
        "no tagged loss.*curvature.losses"),
    "parameters are numbers": (
        lambda: curvature.register(loss_fn, {**PARAMS, "c": 1.0}, BATCH), TypeError,
        r"params\['c'\] is float, expected an array"),
    "parameters are lists": (
        lambda: curvature.register(loss_fn, {**PARAMS, "c": [1.0, 2.0]}, BATCH), TypeError,
        r"params\['c'\]\[0\] is float, expected an array"),
    "parameters are integers": (
        lambda: curvature.register(loss_fn, {**PARAMS, "c": integer(PARAMS["c"])}, BATCH),
        TypeError, r"params\['c'\] .*int32, expected .*floating.*another argument"),
    "parameters are complex": (
        lambda: curvature.register(loss_fn, {**PARAMS, "c": PARAMS["c"].astype(complex)}, BATCH),
        TypeError, r"params\['c'\] .*complex128, expected .*floating"),
    "a module is no tree of arrays": (
        lambda: curvature.register(loss_fn, {**PARAMS, "c": net}, BATCH), TypeError,
        r"params\['c'\] is function, expected an array"),
    "no parameters": (lambda: curvature.register(loss_fn, {}, BATCH), ValueError,
                      "no parameters.*empty"),
    "parameters are None": (lambda: curvature.register(loss_fn, None, BATCH), ValueError,
                            "no parameters.*empty"),
    "loss is not a scalar": (
        lambda: curvature.register(
            lambda p, b: curvature.losses.l2_loss(net(p, b["x"]), b["y"]), PARAMS, BATCH),
        TypeError, r"shape \(7, 2\), expected a scalar"),
    "has_aux is forgotten": (
        lambda: curvature.register(lambda p, b: (loss_fn(p, b), {}), PARAMS, BATCH), TypeError,
        "returned tuple, expected a scalar.*has_aux=True"),
    "has_aux without aux": (
        lambda: curvature.register(loss_fn, PARAMS, BATCH, has_aux=True), TypeError,
        r"loss_fn returned .*expected .*\(loss, aux\)"),
    "nothing is returned": (lambda: curvature.register(lambda p, b: None, PARAMS, BATCH), TypeError,
                            "returned NoneType, expected a scalar"),
    "override of an unknown path": (
        lambda: REGISTRY.override("decoder/*", block="diagonal"), ValueError,
        "No parameter matches .*'decoder/\\*'.*a/b, a/w, c"),
    "a block that the layer cannot have": (
        lambda: registered(generic=True).override("s", block="kronecker"), ValueError,
        "'s' .*is generic and cannot .*'kronecker'.*expected .*diagonal"),
    "neither a block nor exclusion": (lambda: REGISTRY.override("c"), ValueError,
                                      "either block=... or exclude=True, found block=None"),
    "a block and exclusion": (
        lambda: REGISTRY.override("c", block="diagonal", exclude=True), ValueError,
        "either block=... or exclude=True, found block='diagonal'"),
    "exclusion of half a layer": (
        lambda: REGISTRY.override("a/w", exclude=True), ValueError,
        r"'a/w' is ambiguous: it matches a part of layer 'a' .* but not \['a'\]\['b'\].*Match all"),
    "a block that does not exist": (
        lambda: REGISTRY.override("c", block="full"), ValueError,
        "'c' .*is dense and cannot .*'full'.*expected .*kronecker.*diagonal"),
}  # fmt: skip


# name -> arguments of the recipe, and words of the message
BAD_SETTINGS = {
    "negative damping": ({"damping": -1e-3}, "damping is -0.001, expected .*0"),
    "infinite damping": ({"damping": float("inf")}, "damping is inf, expected"),
    "damping nan": ({"damping": float("nan")}, "damping is nan, expected"),
    "decay one": ({"decay": 1.0}, r"decay is 1.0, expected .*\[0, 1\)"),
    "negative decay": ({"decay": -0.1}, r"decay is -0.1, expected .*\[0, 1\)"),
    "statistics_every zero": (
        {"statistics_every": 0},
        "statistics_every is 0, expected a positive",
    ),
    "statistics_every a fraction": ({"statistics_every": 1.5}, "statistics_every is 1.5, expected"),
    "refresh_every negative": ({"refresh_every": -2}, "refresh_every is -2, expected a positive"),
}
BAD_KFAC = {
    "momentum one": ({"momentum": 1.0}, r"momentum is 1.0, expected .*\[0, 1\)"),
    "negative momentum": ({"momentum": -0.5}, "momentum is -0.5, expected"),
    "negative learning rate": ({"learning_rate": -1.0}, "learning_rate is -1.0, expected"),
}
BAD_KINDS = {
    "no samples": (lambda: curvature.Fisher(samples=0), "samples is 0, expected a positive"),
    "negative samples": (lambda: curvature.Fisher(samples=-1), "samples is -1, expected"),
    "half a sample": (lambda: curvature.Fisher(samples=1.5), "samples is 1.5, expected"),
    "no probes": (lambda: curvature.GaussNewton(probes=0), "probes is 0, expected a positive"),
}

# name -> (changes of update's arguments, exception, words of the message in order)
BAD_UPDATES = {
    "no params": ({"params": None}, ValueError, "without params.*update.grads, state, params"),
    "no loss_args": ({"loss_args": None}, ValueError, r"without loss_args.*loss_args=\(batch,\)"),
    "loss_args not a tuple": ({"loss_args": BATCH}, TypeError,
                              r"loss_args is dict, expected a tuple.*loss_args=\(batch,\)"),
    "loss_args an array": ({"loss_args": BATCH["x"]}, TypeError,
                           r"loss_args is ArrayImpl, expected a tuple"),
    "no key": ({"key": None}, ValueError, r"Fisher\(samples=1\) needs a random key.*pass key="),
    "an argument is missing": ({"loss_args": ()}, ValueError,
                               "loss_args .*structure.*is missing"),
    "an argument too many": ({"loss_args": (BATCH, 1.0)}, ValueError,
                             r"loss_args .*structure.*\[1\] is not expected"),
    "batch of another structure": ({"loss_args": ({"x": BATCH["x"]},)}, ValueError,
                                   "loss_args .*structure.*'y'. is missing"),
    "batch of another rank": (
        {"loss_args": ({**BATCH, "x": BATCH["x"][None]},)}, ValueError,
        r"loss_args\[0\]\['x'\] is float64\[1, 7, 3\], but float64\[7, 3\]"),
    "batch of another dtype": (
        {"loss_args": ({**BATCH, "y": BATCH["y"].astype(jnp.float32)},)}, ValueError,
        r"loss_args\[0\]\['y'\] is float32\[7, 2\], but float64\[7, 2\]"),
    "params of another structure": ({"params": {"a": PARAMS["a"]}}, ValueError,
                                    "params .*structure.*'c'. is missing"),
    "params of another shape": ({"params": {**PARAMS, "c": PARAMS["c"].T}}, ValueError,
                                r"params\['c'\] is float64\[2, 4\], but float64\[4, 2\]"),
    "params of another dtype": (
        {"params": {**PARAMS, "c": PARAMS["c"].astype(jnp.bfloat16)}}, ValueError,
        r"params\['c'\] is bfloat16\[4, 2\], but float64\[4, 2\]"),
    "gradient of another shape": ({"updates": {**GRADS, "c": GRADS["c"].T}}, ValueError,
                                  r"\['c'\].*\[2, 4\].*\[4, 2\]"),
    "gradient of another structure": ({"updates": {"a": GRADS["a"]}}, ValueError,
                                      "trees like the parameters: .*'c'. is missing"),
}  # fmt: skip
BAD_PARAMS = {
    name: (changes["params"], words)
    for name, (changes, _, words) in BAD_UPDATES.items()
    if name.startswith("params of")
} | {"Flax's variables": ({"params": PARAMS}, r"params .*structure.*found \['params'\]\['a'\]")}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models_raise(name):
    call, exception, words = BAD_MODELS[name]
    with pytest.raises(exception, match=f"(?s){words}"):
        call()


@pytest.mark.parametrize("name", BAD_PARAMS)
@pytest.mark.parametrize("make", [curvature.kfac, curvature.eigen_adam])
def test_states_of_other_parameters_are_refused(make, name, standard_promotion):
    params, words = BAD_PARAMS[name]
    with pytest.raises(ValueError, match=f"(?s){words}"):
        make(REGISTRY, 0.1).init(params)


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings_raise_when_the_optimizer_is_made(name):
    settings, words = BAD_SETTINGS[name]
    for make in (
        curvature.scale_by_curvature,
        functools.partial(curvature.kfac, learning_rate=0.1),
    ):
        with pytest.raises(ValueError, match=f"(?s){words}"):
            make(REGISTRY, **settings)


@pytest.mark.parametrize("name", BAD_KFAC)
def test_bad_settings_of_kfac_raise_when_it_is_made(name):
    settings, words = BAD_KFAC[name]
    with pytest.raises(ValueError, match=f"(?s){words}"):
        curvature.kfac(REGISTRY, **({"learning_rate": 0.1} | settings))


@pytest.mark.parametrize("name", BAD_KINDS)
def test_bad_kinds_raise_when_they_are_made(name):
    call, words = BAD_KINDS[name]
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("transform", [lambda f: f(), lambda f: jax.jit(f)()], ids=["eager", "jit"])
@pytest.mark.parametrize("recipe", ["scale_by_curvature", "kfac"])
@pytest.mark.parametrize("name", BAD_UPDATES)
def test_bad_updates_raise(name, recipe, transform):
    changes, exception, words = BAD_UPDATES[name]
    more = {"learning_rate": 0.1} if recipe == "kfac" else {}
    tx = getattr(curvature, recipe)(REGISTRY, **more)
    good = {"updates": GRADS, "params": PARAMS, "loss_args": (BATCH,), "key": jax.random.key(0)}
    with pytest.raises(exception, match=f"(?s){words}"):
        transform(lambda: tx.update(state=tx.init(PARAMS), **(good | changes)))


def test_values_of_examples_are_refused():
    tx = curvature.kfac(REGISTRY, curvature.QuadraticModel())
    more = {"loss_args": (BATCH,), "key": jax.random.key(0), "value": jnp.ones(7)}
    with pytest.raises(ValueError, match=r"value has shape \(7,\), expected a scalar"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS, **more)


def test_only_kinds_that_draw_need_a_key():
    """And every kind where a parameter is generic, because examples then need random signs."""
    with_generic = registered(generic=True)
    table = [
        (curvature.Fisher(samples=1), True, True),
        (curvature.Fisher(samples=None), False, True),
        (curvature.GaussNewton(probes=1), True, True),
        (curvature.GaussNewton(), False, True),
        (curvature.EmpiricalFisher(), False, True),
    ]
    for kind, dense, generic in table:
        for registry, needed in ((REGISTRY, dense), (with_generic, generic)):
            params = parameters(generic=registry is with_generic)
            tx = curvature.scale_by_curvature(registry, kind)
            assert curvature.Estimator(registry, kind).needs_key == needed
            update = jax.jit(tx.update)
            call = functools.partial(update, params, tx.init(params), params, loss_args=(BATCH,))
            if needed:
                with pytest.raises(ValueError, match=r"needs a random key.*pass key="):
                    call()
            else:
                updates, _ = call()
                assert all(np.any(np.asarray(u) != 0) for u in jax.tree.leaves(updates))


@pytest.mark.parametrize(
    "kind",
    [
        curvature.Fisher(),
        curvature.GaussNewton(probes=2),
        curvature.GaussNewton(),
        curvature.EmpiricalFisher(),
    ],
    ids=str,
)
def test_old_keys_do_what_new_keys_do(kind):
    estimator = curvature.Estimator(registered(generic=True), kind)
    params, data = parameters(generic=True), batch()
    new = estimator.statistics(params, data, key=jax.random.key(3))
    all_close(estimator.statistics(params, data, key=jax.random.PRNGKey(3)), new)


def test_the_message_of_one_bad_argument_does_not_hide_in_a_trace():
    """Calling again with good arguments works: a failed call leaves nothing behind."""
    tx = curvature.kfac(REGISTRY, 0.1)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="without loss_args"):
        tx.update(GRADS, state, PARAMS)
    updates, state = tx.update(GRADS, state, PARAMS, loss_args=(BATCH,), key=jax.random.key(0))
    assert state.curvature.step == 1
    assert all(np.any(np.asarray(u) != 0) for u in jax.tree.leaves(updates))
