"""The optax transformations, against NumPy and against optax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_net import (
    EXACT,
    EXAMPLES,
    REGISTRY,
    all_close,
    batch,
    close,
    equal,
    gradient,
    loss_fn,
    parameters,
    poison,
    registered,
    stepper,
)

import curvature

TINY = 1e-22  # damping; its square root meets the factors

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
    with pytest.raises(ValueError, match="whole numbers belong in static_args") as error:
        optax.inject_hyperparams(curvature.kfac)(REGISTRY, 0.1).init(one_step()[0])
    assert all(name in str(error.value) for name in static)
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


def test_what_is_neither_a_number_nor_a_mask_is_refused_at_once():
    for options in ({"learning_rate": "0.1"}, {"learning_rate": 0.1, "damping": "0.1"}):
        with pytest.raises(TypeError, match=r"is '0.1', expected a number or a schedule"):
            curvature.kfac(REGISTRY, **options)
    for mask in ("w", {"w": 2}):
        with pytest.raises(TypeError, match=r"weight_decay_mask is .*expected a tree of booleans"):
            curvature.kfac(REGISTRY, 0.1, weight_decay=0.1, weight_decay_mask=mask)
