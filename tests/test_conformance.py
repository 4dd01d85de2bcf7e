"""Every optimizer of ours does what optax expects of an optimizer, and goes through its wrappers.

The rows are those of the table that optax holds its own contributed optimizers to, and the wrappers
that users put around an optimizer. Each is run on a small net with a matrix, a bias and a scale.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvature

DAMPING = 0.01
GIVEN = {"learning_rate": 0.3, "damping": DAMPING}
CHOSEN = {
    "learning_rate": curvature.QuadraticModel(),
    "damping": curvature.LevenbergMarquardt(1.0, every=2),
}


def scaled(registry):
    """The preconditioner alone, with a learning rate behind it."""
    precondition = curvature.scale_by_curvature(registry, damping=DAMPING)
    return optax.chain(precondition, optax.scale_by_learning_rate(1.0))


OPTIMIZERS = {
    "kfac": functools.partial(curvature.kfac, **GIVEN),
    "ekfac": functools.partial(curvature.ekfac, **GIVEN),
    "foof": functools.partial(curvature.foof, **GIVEN),
    "scale_by_curvature": scaled,
    "chosen": functools.partial(curvature.kfac, **CHOSEN),
    "eigen_adam": functools.partial(
        curvature.eigen_adam, learning_rate=optax.cosine_decay_schedule(0.1, 100)
    ),
    "soap": functools.partial(
        curvature.eigen_adam,
        learning_rate=optax.cosine_decay_schedule(0.1, 100),
        kind=curvature.Shampoo(),
    ),
}


EIGEN = ("eigen_adam", "soap")


@pytest.fixture(autouse=True)
def promotion(request):
    """Strict, but where optax's Adam is inside, which cannot stand that."""
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name")
    with jax.numpy_dtype_promotion("standard" if name in EIGEN else "strict"):
        yield


def each_of(names):
    """The recipes with other blocks run other blocks, nothing that a quick test has to see."""
    slow = {"ekfac", "foof", "soap"}
    marked = [pytest.param(n, marks=pytest.mark.slow) if n in slow else n for n in names]
    return pytest.mark.parametrize("name", marked)


each = each_of(OPTIMIZERS)


def parameters(dtype=jnp.float64):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 2)) / 2, "b": np.zeros(2), "scale": np.ones(2)}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def net(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) * params["scale"]


def batch(seed=1, dtype=jnp.float64):
    """Data that the net can fit."""
    x = np.random.default_rng(seed).normal(size=(16, 3))
    y = net({"w": np.array([[1, -1], [0.5, 0.5], [-1, 0]]), "b": 0.2, "scale": 1.5}, x)
    return {"x": jnp.asarray(x, dtype), "y": jnp.asarray(y, dtype)}


def loss_fn(params, batch):
    return curvature.losses.l2_loss(net(params, batch["x"]), batch["y"]).mean()


PARAMS, BATCH, KEY = parameters(), batch(), jax.random.key(0)
REGISTRY = curvature.register(loss_fn, PARAMS, BATCH)
gradient = jax.jit(jax.grad(loss_fn))


def stepper(tx):
    """A training step: (params, state, batch, key) -> (params, state)."""

    def step(params, state, batch, key):
        value, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, loss_args=(batch,), key=key, value=value)
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def optimizer(name):
    """An optimizer, its jitted training step, and its jitted update on `BATCH`."""
    tx = OPTIMIZERS[name](REGISTRY)

    def update(grads, params):
        return tx.update(grads, tx.init(params), params, loss_args=(BATCH,), key=KEY)

    return tx, jax.jit(stepper(tx)), jax.jit(update)


def run(step, params, state, steps=2):
    """Parameters and state after some steps, each on another batch."""
    for t in range(steps):
        params, state = step(params, state, batch(t), jax.random.key(t))
    return params, state


def train(tx):
    return run(jax.jit(stepper(tx)), PARAMS, tx.init(PARAMS))


def close(actual, expected, tolerance=1e-9):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    compare = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(compare, actual, expected)


def definite(name, state):
    """`state`, but no bases of a null space, where any do: a single gradient has one."""
    return state._replace(bases=()) if name == "soap" else state


def signature(tree):
    """Structure, shapes, dtypes and weak types."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(x.shape, x.dtype, x.weak_type) for x in leaves]


# The optimizer itself -----------------------------------------------------------------------------


@each
def test_it_converges_and_can_be_scanned(name):
    tx, _, _ = optimizer(name)

    def body(carry, key):
        return stepper(tx)(*carry, BATCH, key), None

    start, keys = (PARAMS, tx.init(PARAMS)), jax.random.split(KEY, 100)
    (params, state), _ = jax.jit(lambda: jax.lax.scan(body, start, keys))()
    assert loss_fn(params, BATCH) < 1e-3 * loss_fn(PARAMS, BATCH)
    assert optax.tree_utils.tree_get(state, "skipped") == 0


@each
def test_jit_changes_nothing_and_compiles_once(name):
    tx, _, _ = optimizer(name)
    jitted = jax.jit(stepper(tx))
    start = (PARAMS, tx.init(PARAMS))
    first = jitted(*start, BATCH, KEY)
    close(first, stepper(tx)(*start, BATCH, KEY))
    jitted(*first, BATCH, KEY)
    assert jitted._cache_size() == 1


@each
def test_without_jit_later_steps_compile_nothing(name, compilations):
    tx, _, _ = optimizer(name)
    step, now = stepper(tx), (PARAMS, tx.init(PARAMS))
    for _ in range(3):
        compilations.clear()
        now = jax.block_until_ready(step(*now, BATCH, KEY))
    assert not compilations


@each
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_state_is_arrays_of_a_constant_form_and_updates_have_the_parameters_dtype(name, dtype):
    params, data = parameters(dtype), batch(dtype=dtype)
    tx = OPTIMIZERS[name](curvature.register(loss_fn, params, data))
    state = tx.init(params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert signature(jax.eval_shape(tx.init, params)) == signature(state)

    def step(params, state):
        grads = jax.grad(loss_fn)(params, data)
        other = jnp.zeros((), "float16" if dtype == "float32" else "float32")
        return tx.update(grads, state, params, loss_args=(data,), key=KEY, value=other)

    updates, after = jax.eval_shape(step, params, state)
    assert signature(after) == signature(state)
    assert signature(updates) == signature(params)


@each
def test_parameters_and_state_can_be_donated(name):
    tx, step, _ = optimizer(name)
    donating = jax.jit(stepper(tx), donate_argnums=(0, 1))
    copied = jax.tree.map(jnp.copy, PARAMS)
    close(run(donating, copied, tx.init(copied)), run(step, PARAMS, tx.init(PARAMS)))


@each
def test_optax_finds_its_way_in_the_state(name):
    """By name, and by what is shaped like the parameters: the momentum."""
    tx, step, _ = optimizer(name)
    _, state = run(step, PARAMS, tx.init(PARAMS), 1)
    if name in EIGEN:
        assert optax.tree_utils.tree_get(state, "refreshed")
    else:
        damping = optax.tree_utils.tree_get(state, "damping")
        assert damping == (1.0 if name == "chosen" else DAMPING)
    shapes = optax.tree_utils.tree_map_params(
        tx, lambda x: -1.0, state, transform_non_params=lambda x: 1.0
    )
    like_params = sum(x < 0 for x in jax.tree.leaves(shapes))
    assert like_params == (len(PARAMS) if optax.tree_utils.tree_get(state, "previous") else 0)


@each
def test_empty_parts_of_the_tree_stay_empty(name):
    empty = {"nothing": {}, "none": None, "masked": optax.MaskedNode()}
    params = PARAMS | empty
    tx = OPTIMIZERS[name](curvature.register(loss_fn, params, BATCH))
    grads = jax.grad(loss_fn)(params, BATCH)
    updates, _ = tx.update(grads, tx.init(params), params, loss_args=(BATCH,), key=KEY)
    _, _, update = optimizer(name)
    close(updates, update(gradient(PARAMS, BATCH), PARAMS)[0] | empty)


def test_an_empty_tree_is_refused_and_an_excluded_one_left_alone():
    with pytest.raises(ValueError, match="There are no parameters"):
        curvature.register(lambda params, x: curvature.losses.l2_loss(x, x).mean(), {}, jnp.ones(3))
    tx = curvature.kfac(REGISTRY.override("*", exclude=True), 0.5, 0.0, kl_clip=None)
    grads = gradient(PARAMS, BATCH)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, loss_args=(BATCH,), key=KEY)
    close(updates, jax.tree.map(lambda g: -0.5 * g, grads))


# Hyperparameters ----------------------------------------------------------------------------------

NUMBERS = {"momentum": 0.5, **GIVEN}
FACTORIES = {
    "kfac": (curvature.kfac, NUMBERS),
    "ekfac": (curvature.ekfac, NUMBERS),
    "foof": (curvature.foof, NUMBERS),
    "scale_by_curvature": (curvature.scale_by_curvature, {"damping": DAMPING}),
    "eigen_adam": (curvature.eigen_adam, {"learning_rate": 0.1, "weight_decay": 0.1}),
}


def injected(factory, **options):
    """The recipe: whole numbers and masks are static, everything else can change from outside."""
    arguments = inspect.signature(factory).parameters.values()
    static = {p.name for p in arguments if type(p.default) is int or p.name.endswith("_mask")}
    return optax.inject_hyperparams(factory, static_args=static)(REGISTRY, **options)


@each_of(FACTORIES)
def test_hyperparameters_can_be_injected_and_changed(name):
    factory, numbers = FACTORIES[name]
    tx = injected(factory, **numbers)
    step, state = jax.jit(stepper(tx)), tx.init(PARAMS)
    params, after = run(step, PARAMS, state)
    close((params, after.inner_state), train(factory(REGISTRY, **numbers)))
    assert set(numbers) <= set(state.hyperparams)
    assert signature(after) == signature(state)

    halves = {key: value / 2 for key, value in numbers.items()}
    state.hyperparams.update({key: jnp.asarray(value) for key, value in halves.items()})
    params, after = run(step, PARAMS, state)
    close((params, after.inner_state), train(factory(REGISTRY, **halves)))


def test_what_is_chosen_by_the_model_goes_through_injection():
    tx, step, _ = optimizer("chosen")
    found, _ = train(injected(curvature.kfac, **CHOSEN))
    close(found, run(step, PARAMS, tx.init(PARAMS))[0])


@each_of(FACTORIES)
def test_a_constant_schedule_is_a_number(name):
    factory, numbers = FACTORIES[name]
    schedules = {key: optax.constant_schedule(value) for key, value in numbers.items()}
    close(train(factory(REGISTRY, **schedules)), train(factory(REGISTRY, **numbers)))


# Wrappers -----------------------------------------------------------------------------------------


@each
def test_chain(name):
    """Clipping before, weight decay after."""
    tx, _, update = optimizer(name)
    wrapped = optax.chain(optax.clip_by_global_norm(0.1), tx, optax.add_decayed_weights(-0.2))
    params, state = jax.jit(stepper(wrapped))(PARAMS, wrapped.init(PARAMS), BATCH, KEY)
    grads = gradient(PARAMS, BATCH)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    assert norm > 0.1
    updates, inner = update(jax.tree.map(lambda g: g * 0.1 / norm, grads), PARAMS)
    close(params, jax.tree.map(lambda p, u: p + u - 0.2 * p, PARAMS, updates))
    close(definite(name, state[1]), definite(name, inner))


MASK = {"w": True, "b": True, "scale": False}
MASKS = {
    "masked": lambda tx: optax.masked(tx, MASK),
    "partition": lambda tx: optax.partition({True: tx, False: optax.sgd(0.1)}, MASK),
}


def trained(params):
    """`params` as an optimizer sees them behind the mask."""
    return jax.tree.map(lambda m, p: p if m else optax.MaskedNode(), MASK, params)


def masked_loss(part, params, batch):
    """The loss as a function of what is behind the mask; the rest is taken from `params`."""
    return loss_fn(jax.tree.map(lambda m, t, p: t if m else p, MASK, part, params), batch)


@each
@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_around_a_loss_of_what_is_behind_it(name, mask):
    """As if the rest were constant: the loss is registered as a function of the masked tree."""
    tx = OPTIMIZERS[name](curvature.register(masked_loss, trained(PARAMS), PARAMS, BATCH))
    grads = gradient(PARAMS, BATCH)

    def update(tx, params, grads):
        loss_args = (PARAMS, BATCH)
        return tx.update(grads, tx.init(params), params, loss_args=loss_args, key=KEY)[0]

    updates = jax.jit(functools.partial(update, MASKS[mask](tx)))(PARAMS, grads)

    def constant(part, batch):
        return loss_fn({**part, "scale": PARAMS["scale"]}, batch)

    part = {key: PARAMS[key] for key in ("w", "b")}
    tx = OPTIMIZERS[name](curvature.register(constant, part, BATCH))
    expected, _ = tx.update(
        {key: grads[key] for key in part}, tx.init(part), part, loss_args=(BATCH,), key=KEY
    )
    other = {"masked": 1.0, "partition": -0.1}[mask] * grads["scale"]
    close(updates, {**expected, "scale": other})


@each
@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_around_a_loss_of_everything_is_refused_at_once(name, mask):
    tx = MASKS[mask](optimizer(name)[0])
    with pytest.raises(ValueError, match=r"params\['scale'\] is masked.*exclude=True.*fallback="):
        tx.init(PARAMS)


def test_excluded_parameters_can_have_an_optimizer_of_their_own():
    """The partition comes after the preconditioner, not around it."""
    registry = REGISTRY.override("scale", exclude=True)
    precondition = curvature.scale_by_curvature(registry, damping=DAMPING)
    apart = optax.partition({True: optax.sgd(0.3), False: optax.sgd(0.1)}, MASK)
    always = {"statistics_every": 1, "refresh_every": 1, "kl_clip": None}
    whole = curvature.kfac(registry, 0.3, 0.0, DAMPING, fallback=optax.scale(1 / 3), **always)
    close(train(optax.chain(precondition, apart))[0], train(whole)[0])


@each
def test_multi_steps(name, standard_promotion):
    """One step with the mean gradient and the statistics of the last micro-batch."""
    tx, _, update = optimizer(name)
    wrapped = optax.MultiSteps(tx, 2, accumulator_dtype=jnp.float64)
    step = jax.jit(stepper(wrapped))
    params, state = step(PARAMS, wrapped.init(PARAMS), batch(5), KEY)
    close((params, state.inner_opt_state), (PARAMS, tx.init(PARAMS)), 0)
    params, state = step(params, state, BATCH, KEY)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *(gradient(PARAMS, x) for x in (batch(5), BATCH)))
    updates, inner = update(mean, PARAMS)
    close(params, optax.apply_updates(PARAMS, updates))
    close(definite(name, state.inner_opt_state), definite(name, inner))


@each
def test_apply_if_finite(name):
    tx, plain, _ = optimizer(name)
    wrapped = optax.apply_if_finite(tx, 3)
    step, start = jax.jit(stepper(wrapped)), wrapped.init(PARAMS)
    params, state = step(PARAMS, start, BATCH, KEY)
    close((params, state.inner_state), plain(PARAMS, start.inner_state, BATCH, KEY))
    same, _ = step(params, state, jax.tree.map(lambda x: x * jnp.nan, BATCH), KEY)
    close(same, params, 0)


@each
def test_parameters_can_be_averaged_by_optax(name):
    """Beside the optimizer, in one jitted step."""
    tx, step, _ = optimizer(name)

    def averaging(params, state, batch, key):
        params, inner = stepper(tx)(params, state[0], batch, key)
        return params, (inner, optax.incremental_update(params, state[1], 0.1))

    last, (_, average) = run(jax.jit(averaging), PARAMS, (tx.init(PARAMS), PARAMS))
    first, _ = run(step, PARAMS, tx.init(PARAMS), 1)
    close(last, run(step, PARAMS, tx.init(PARAMS))[0])
    mean = jax.tree.map(lambda *p: 0.81 * p[0] + 0.09 * p[1] + 0.1 * p[2], PARAMS, first, last)
    close(average, mean)


def test_schedule_free():
    tx = optax.contrib.schedule_free(curvature.kfac(REGISTRY, 0.3, 0.0, DAMPING), 0.3)
    params, state = run(jax.jit(stepper(tx)), PARAMS, tx.init(PARAMS), 30)
    averaged = optax.contrib.schedule_free_eval_params(state, params)
    assert loss_fn(averaged, BATCH) < 0.1 * loss_fn(PARAMS, BATCH)
