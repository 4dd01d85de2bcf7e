"""The registry as its user sees it: table, overrides, exclusion, errors, and what it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import io_callback

import curvature

X = jax.random.normal(jax.random.key(0), (6, 3))
Y = jax.random.normal(jax.random.key(1), (6, 2))


def parameters():
    key = functools.partial(jax.random.fold_in, jax.random.key(2))
    return {
        "dense": {"w": jax.random.normal(key(0), (3, 4)), "b": jax.random.normal(key(1), (4,))},
        "gain": jax.random.normal(key(2), (4,)),
        "head": jax.random.normal(key(3), (4, 2)),
        "odd": jax.random.normal(key(4), (4,)),
        "unused": jnp.ones(2),
    }


def loss_fn(p, x, y):
    h = jnp.tanh(x @ p["dense"]["w"] + p["dense"]["b"]) * p["gain"]
    z = (h * jnp.cumsum(p["odd"])) @ p["head"]
    penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))
    return curvature.losses.l2_loss(z, y).mean() + 1e-3 * penalty


REGISTRY = curvature.register(loss_fn, parameters(), X, Y)
KEY = jax.random.key(3)


def kinds(registry):
    return {layer.name: (layer.kind, layer.block) for layer in registry.layers}


def test_layers_are_found_and_a_penalty_on_the_weights_is_no_use():
    assert kinds(REGISTRY) == {
        "dense": ("dense", "kronecker"),
        "gain": ("scale", "diagonal"),
        "head": ("dense", "kronecker"),
        "odd": ("generic", "diagonal"),
        "unused": ("generic", "diagonal"),
    }
    assert [layer.uses for layer in REGISTRY.layers] == [1, 1, 1, 1, 0]
    assert REGISTRY.layers[0].parameters == ("['dense']['w']", "['dense']['b']")
    assert REGISTRY.coverage == (16 + 4 + 8) / 34


def test_the_table_names_every_parameter_with_its_reason():
    lines = str(REGISTRY).splitlines()
    row = {line.split()[0]: line for line in lines[2:8]}
    assert row["['dense']['b']"].split()[1:5] == ["4", "dense", "kronecker", "1"]
    assert "cumsum at test_registry.py:" in row["['odd']"]
    assert "no curvature: no tagged loss depends on it" in row["['unused']"]
    assert "28 of 34 parameters (82.4%) are in structured blocks." in lines
    assert any(line.startswith("loss l2_loss on [6, 2] at test_registry.py:") for line in lines)


def test_shapes_are_enough():
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (parameters(), X, Y))
    assert str(curvature.register(loss_fn, *shapes)) == str(REGISTRY)


def test_the_loss_is_traced_twice_and_scanned_layers_do_not_cost_more():
    calls = []

    def deep(p, x, y, depth):
        calls.append(1)
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"], length=depth)
        return curvature.losses.l2_loss(h, y).mean()

    steps = []
    for depth in (2, 40):
        calls.clear()
        loss = functools.partial(deep, depth=depth)
        params = {"w": jnp.ones((depth, 3, 3))}
        registry = curvature.register(loss, params, X, X)
        assert len(calls) == 2
        steps.append(len(list(registry.analyse(params, (X, X)).program.walk())))
    assert steps[0] == steps[1]


def test_override_by_glob_is_a_new_registry():
    changed = REGISTRY.override("dense/*", block="diagonal").override("hea*", block="dense")
    assert kinds(changed)["dense"] == ("dense", "diagonal")
    assert kinds(changed)["head"] == ("dense", "dense")
    assert kinds(REGISTRY)["dense"] == ("dense", "kronecker")
    operator = jax.jit(curvature.Estimator(changed))(parameters(), X, Y, key=KEY)
    assert operator.blocks["head"].to_dense().shape == (8, 8)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda r: r.override("dens/*", block="diagonal"), "No parameter matches .*dense/w"),
        (lambda r: r.override("dense/w", exclude=True), "a part of layer 'dense' .*'b'"),
        (lambda r: r.override("gain", block="kronecker"), "'gain' .*is scale and cannot"),
        (lambda r: r.override("gain"), "either block=.* or exclude=True"),
        (
            lambda r: r.override("dense/b", block="diagonal"),
            r"ambiguous: .* but not \['dense'\]\['w'\]",
        ),
    ],
)
def test_bad_overrides_say_what_to_do(call, words):
    with pytest.raises(ValueError, match=f"(?s){words}"):
        call(REGISTRY)


def step(registry, **options):
    params = parameters()
    tx = curvature.scale_by_curvature(registry, damping=0.1, **options)
    grads = jax.grad(loss_fn)(params, X, Y)
    run = jax.jit(lambda g, p: tx.update(g, tx.init(p), p, loss_args=(X, Y), key=KEY)[0])
    return grads, run(grads, params)


def test_gradients_of_excluded_parameters_pass_unchanged():
    grads, updates = step(REGISTRY.override("dense/*", exclude=True))
    _, plain = step(REGISTRY)
    jax.tree.map(np.testing.assert_array_equal, updates["dense"], grads["dense"])
    np.testing.assert_allclose(updates["head"], plain["head"], rtol=1e-10)
    assert np.abs(plain["dense"]["w"] - grads["dense"]["w"]).max() > 1e-3


def test_the_fallback_takes_what_is_generic_or_excluded(standard_promotion):
    registry = REGISTRY.override("gain", exclude=True)
    grads, updates = step(registry, fallback=optax.scale_by_adam())
    adam = optax.scale_by_adam()
    expected, _ = adam.update(grads, adam.init(grads))
    for name in ("odd", "unused", "gain"):
        np.testing.assert_allclose(updates[name], expected[name], rtol=1e-12)
    _, plain = step(REGISTRY)
    np.testing.assert_allclose(updates["head"], plain["head"], rtol=1e-10)


def test_a_loss_with_side_effects_is_refused():
    def noisy(p, x, y):
        io_callback(lambda v: None, None, x.sum())
        return loss_fn(p, x, y)

    with pytest.raises(ValueError, match=r"side effect, io_callback at test_registry\.py:"):
        curvature.register(noisy, parameters(), X, Y)


def looped(p, x):
    """A layer in a `while` loop, which JAX cannot differentiate in reverse."""
    body = lambda carry: (carry[0] + 1, jnp.tanh(carry[1] @ p["square"]))  # noqa: E731
    return jax.lax.while_loop(lambda carry: carry[0] < 3, body, (0, x @ p["first"]))[1]


def test_a_loss_that_no_gradient_passes_names_the_loop_and_the_parameters():
    params = {"first": jnp.ones((3, 2)), "square": jnp.ones((2, 2)), "last": jnp.ones((2, 2))}

    def loss_fn(p, x, y):
        return curvature.losses.l2_loss(looped(p, x) @ p["last"], y).mean()

    registry = curvature.register(loss_fn, params, X, Y)
    (square,) = (layer for layer in registry.layers if layer.name == "square")
    assert square.kind == "generic"
    assert "while, which no gradient passes, at test_registry.py:" in square.reason
    words = r"while at test_registry\.py:\d+ \(\['first'\], \['square'\]\).*custom_vjp"
    with pytest.raises(ValueError, match=words):
        curvature.Estimator(registry)(params, X, Y, key=KEY)


@pytest.mark.parametrize(
    "shapes, words",
    [
        ({"w": (4, 2)}, r"test_registry\.py:\d+: the parameter \['w'\] is met in shape \(4, 2\)"),
        ({"b": (3,)}, r"test_registry\.py:\d+: the parameter \['b'\] is met in shape \(3,\)"),
    ],
)
def test_a_tag_whose_shapes_do_not_fit_names_the_parameter_and_the_line(shapes, words):
    shapes = {"w": (3, 2), "b": (2,)} | shapes

    def tagged(p, x, y):
        z = jnp.sum(x) + jnp.zeros((len(x), 2))
        return curvature.losses.l2_loss(curvature.tag_layer(z, x, p["w"], p["b"]), y).mean()

    with pytest.raises(ValueError, match=words):
        curvature.register(tagged, {k: jnp.ones(s) for k, s in shapes.items()}, X, Y)


def test_a_tag_on_a_part_of_a_leaf_leaves_its_other_parts_alone():
    def loss_fn(p, x, y):
        w, v = p["all"][:6].reshape(3, 2), p["all"][6:].reshape(2, 2)
        h = curvature.tag_layer(x @ w, x, w)
        return curvature.losses.l2_loss(jnp.tanh(h) @ v, y).mean()

    registry = curvature.register(loss_fn, {"all": jnp.arange(10.0)}, X, Y)
    assert [(x.kind, x.shape, x.uses) for x in registry.layers] == [
        ("dense", (3, 2), 1),
        ("dense", (2, 2), 1),
    ]


def test_a_fallback_takes_no_leaf_of_which_a_part_has_a_block(standard_promotion):
    def part(p, x, y):
        return curvature.losses.l2_loss(x @ p["w"][:3] + p["b"], y).mean()

    params = {"w": jnp.ones((5, 2)), "b": jnp.zeros(2)}
    registry = curvature.register(part, params, X, Y)
    tx = curvature.kfac(registry, 0.1, fallback=optax.scale_by_adam())
    grads = jax.grad(part)(params, X, Y)
    updates, _ = tx.update(grads, tx.init(params), params, loss_args=(X, Y), key=KEY)
    plain = curvature.kfac(registry, 0.1)
    expected, _ = plain.update(grads, plain.init(params), params, loss_args=(X, Y), key=KEY)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), updates, expected)


@pytest.mark.parametrize("mode", ["clip", "fill"])
def test_a_lookup_out_of_bounds_counts_where_it_reads(mode):
    def loss_fn(p, tokens):
        rows = jnp.take(p["e"], tokens, axis=0, mode=mode, fill_value=0.0)
        return curvature.losses.l2_loss(rows).sum()

    tokens = jnp.array([[0, 5], [-7, 2], [1, 4]])
    params = {"e": 1 + jax.random.normal(KEY, (3, 2))}
    registry = curvature.register(loss_fn, params, tokens)
    kind = curvature.GaussNewton()
    found = jax.jit(curvature.Estimator(registry, kind))(params, tokens).blocks["e"].input
    read = (
        jnp.clip(tokens, 0, 2)
        if mode == "clip"
        else jnp.where((tokens >= 0) & (tokens < 3), tokens, 3)
    )
    np.testing.assert_allclose(found, jnp.bincount(read.ravel(), length=4)[:3] / 6)


def test_the_class_of_a_kind_is_no_kind():
    with pytest.raises(TypeError, match=r"class Fisher, expected an instance: Fisher\(\)"):
        curvature.Estimator(REGISTRY, curvature.Fisher)


def test_concatenated_leaves_are_generic_where_they_are_used_elsewhere_too():
    params = {"a": jnp.ones((3, 1)), "b": jnp.ones((3, 1)), "c": jnp.ones((3, 2))}

    def loss_fn(p, x, y):
        z = x @ jnp.concatenate([p["a"], p["b"]], 1)
        again = x @ jnp.concatenate([p["c"], p["a"]], 1)[:, :2]  # a part of it
        return curvature.losses.l2_loss(z + again, y).mean()

    registry = curvature.register(loss_fn, params, X, Y)
    reasons = [layer.reason for layer in registry.layers]
    assert [layer.kind for layer in registry.layers] == ["generic"] * 3
    assert all("concatenated and used" in reason for reason in reasons)
    operator = curvature.Estimator(registry)(params, X, Y, key=KEY)
    assert all(bool(jnp.all(jnp.isfinite(d))) for d in jax.tree.leaves(operator.diagonal()))


def test_a_loss_that_cannot_be_differentiated_is_refused():
    def integer(p, x, y):
        return jnp.round(loss_fn(p, x, y)).astype(int)

    with pytest.raises(TypeError, match="int64, expected floating point"):
        curvature.register(integer, parameters(), X, Y)


def test_a_prediction_that_depends_on_another_loss_is_refused():
    def nested(p, x, y):
        first = curvature.losses.l2_loss(x @ p["dense"]["w"][:, :2], y)
        return curvature.losses.l2_loss(x @ p["dense"]["w"][:, 2:] * first, y).mean()

    with pytest.raises(ValueError, match="depend on the value of another tagged loss"):
        curvature.register(nested, parameters(), X, Y)


def test_entries_that_never_meet_the_data_are_in_the_table():
    def part(p, x, y):
        return curvature.losses.l2_loss(x @ p["w"][:, 1:3], y).mean()

    params = {"w": jnp.ones((3, 4))}
    registry = curvature.register(part, params, X, Y)
    assert [(x.name, x.kind, x.size) for x in registry.layers] == [
        ("w", "dense", 6),
        ("w#rest0", "generic", 3),
        ("w#rest1", "generic", 3),
    ]
    operator = curvature.Estimator(registry, curvature.GaussNewton())(params, X, Y)
    solved = operator.solve({"w": jnp.ones((3, 4))}, damping=0.5)["w"]
    np.testing.assert_allclose(solved[:, [0, 3]], 2.0)
    expected = np.linalg.solve(X.T @ X / 12 + 0.5 * np.eye(3), np.ones((3, 2)))
    np.testing.assert_allclose(solved[:, 1:3], expected, rtol=1e-9)


def test_data_in_a_closure_has_its_batch_in_front():
    def closed(p):
        return loss_fn(p, X, Y)

    registry = curvature.register(closed, parameters())
    assert kinds(registry) == kinds(REGISTRY)
    assert not registry.batch_found and "axes of the batch's size" in str(registry)


# Arrays of size zero ------------------------------------------------------------------------------


def affine(p, x):
    return x @ p["w"] + p["b"]


# (shapes, net): what else is used adds nothing to an affine map.
EMPTY = {
    "inputs": ({"e": (0, 2)}, lambda p, x: x[:, :0] @ p["e"] + affine(p, x)),
    "outputs": (
        {"e": (3, 0), "f": (0,)},
        lambda p, x: affine(p, jnp.concatenate([x, x @ p["e"] + p["f"]], 1)),
    ),
    "a slice": ({}, lambda p, x: x[:, :0] @ p["w"][:0] + affine(p, x)),
    "joined": ({"e": (0, 2)}, lambda p, x: x @ jnp.concatenate([p["e"], p["w"]]) + p["b"]),
    "scale": ({"e": (0,)}, lambda p, x: affine(p, jnp.concatenate([x, x[:, :0] * p["e"]], 1))),
    "no layers in a stack": (
        {"e": (0, 3, 3)},
        lambda p, x: affine(p, jax.lax.scan(lambda h, w: (h @ w, None), x, p["e"])[0]),
    ),
}


def empty_problem(net, shapes):
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    params |= {name: jnp.zeros(shape) for name, shape in shapes.items()}

    def loss_fn(p, x, y):
        return curvature.losses.l2_loss(net(p, x), y).mean()

    return curvature.register(loss_fn, params, X, Y), params


@pytest.mark.parametrize("case", EMPTY)
def test_parameters_of_size_zero_do_not_count(case):
    """Steps are those of the net without them."""
    updates = []
    for shapes, net in (EMPTY[case], ({}, affine)):
        registry, params = empty_problem(net, shapes)
        assert registry.coverage == 1
        tx = curvature.kfac(registry, 0.1, kind=curvature.Fisher(None))
        grads = jax.grad(registry.loss_fn)(params, X, Y)
        step, _ = jax.jit(tx.update)(grads, tx.init(params), params, loss_args=(X, Y))
        updates.append(step)
    for leaf in ("w", "b"):
        np.testing.assert_allclose(updates[0][leaf], updates[1][leaf], rtol=1e-9)


def test_a_bias_of_an_empty_weight_is_a_shift():
    shapes = {"e": (0, 2)}
    registry, _ = empty_problem(lambda p, x: (x[:, :0] @ p["e"] + p["b"]) * (x @ p["w"]), shapes)
    found = {layer.name: (layer.kind, layer.reached) for layer in registry.layers}
    assert found == {"b": ("shift", True), "e": ("generic", False), "w": ("dense", True)}
    assert "it has no entries" in str(registry)
