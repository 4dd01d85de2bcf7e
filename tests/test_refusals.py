"""What is refused, and in which words: models, settings, and what `init` and `update` are given."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_net import REGISTRY, all_close, batch, gradient, loss_fn, net, parameters, registered

import curvature

PARAMS, BATCH = parameters(), batch()
EMPTY = {name: x[:0] for name, x in BATCH.items()}
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
    "no examples": (
        lambda: curvature.register(loss_fn, PARAMS, EMPTY), ValueError,
        r"l2_loss at .* has no predictions: they are float64\[0, 2\]. Leave empty batches out"),
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
    "batch without examples": (
        {"loss_args": (EMPTY,)}, ValueError, r"no predictions: they are float64\[0, 2\]"),
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
