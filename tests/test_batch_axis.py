"""The batch axis wherever it is: in front, behind time, or merged with positions, in either order.

A wrong guess shows in diagonal blocks, which square the gradients of single examples, and in the
exact Gauss-Newton matrix, which lights one output of every example at a time.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal

import curvature

N, T, D = 4, 3, 2
PARAMS = {
    "w": normal(0, D, D),
    "b": normal(1, D),
    "gain": 1 + normal(2, D),
    "kernel": normal(3, 2, D, D),
    "head": normal(4, D, 3),
}
X = normal(5, N, T, D)
EXACT = curvature.GaussNewton()


def mix(h, axis):
    """Lets positions of an example see each other, so that they cannot pass for examples."""
    return h + jnp.tanh(h.sum(axis, keepdims=True))


def dense(p, h):
    return jnp.tanh(h @ p["w"] + p["b"])


def batch_major(p, x):
    h = dense(p, mix(x, 1).reshape(-1, D)) * p["gain"]
    return mix(h.reshape(-1, T, D), 1) @ p["head"]


def flat_logits(p, x):
    """As language models return them: one row a position."""
    return batch_major(p, x).reshape(-1, 3)


def norm_on_windows(p, x):
    h = dense(p, x).reshape(-1, D)
    h = h * p["gain"] / jnp.sqrt(1 + jnp.square(h).sum(-1, keepdims=True))
    return mix(h.reshape(-1, T, D), 1) @ p["head"]


def frames(p, x):
    """A convolution over frames that are folded into the batch."""
    x = jnp.stack([x, x + 1], 1).reshape(-1, T, D)
    y = jax.lax.conv_general_dilated(
        x, p["kernel"], (1,), [(1, 0)], dimension_numbers=("NWC", "WIO", "NWC")
    )
    return mix(jnp.tanh(y).reshape(-1, 2 * T, D), 1) @ p["head"]


def in_a_jit(p, x):
    return jax.jit(batch_major)(p, x)


FIRST = {
    "batch-major merge": batch_major,
    "flat logits": flat_logits,
    "norm on windows": norm_on_windows,
    "frames": frames,
    "in a jit": in_a_jit,
}


def time_major(p, x):
    h = dense(p, mix(x, 1).swapaxes(0, 1).reshape(-1, D)) * p["gain"]
    return mix(h.reshape(T, -1, D).swapaxes(0, 1), 1) @ p["head"]


def two_views(p, x):
    both = dense(p, jnp.concatenate([x[:, 0], x[:, 1]], 0)) * p["gain"]
    one, other = jnp.split(both, 2)
    return jnp.tanh(one * other) @ p["head"]


LAST = {
    "time-major merge": time_major,
    "two views": two_views,
    "in a jit": lambda p, x: jax.jit(time_major)(p, x),
}


def used(model, x):
    """The parameters that a model depends on."""
    z = lambda p: model(p, x).sum()  # noqa: E731
    return {k: PARAMS[k] for k, g in jax.jit(jax.grad(z))(PARAMS).items() if np.any(g)}


def losses(module, z):
    labels = jnp.arange(z[..., 0].size).reshape(z.shape[:-1]) % z.shape[-1]
    return module.softmax_cross_entropy_with_integer_labels(z, labels)


def registered(model, params, x):
    def loss_fn(p, x):
        return losses(curvature.losses, model({**PARAMS, **p}, x)).mean()

    return curvature.register(loss_fn, params, x).override("*", block="diagonal")


def exact(model, params, x):
    """The diagonal of J' H J."""

    @jax.jit
    def diagonal(params, x):
        z = model(PARAMS, x)
        total = lambda flat: losses(optax.losses, flat.reshape(z.shape)).mean()  # noqa: E731
        hessian = jax.hessian(total)(z.ravel())
        jacobian = jax.jacrev(lambda p: model({**PARAMS, **p}, x).ravel())(params)
        return jax.tree.map(lambda j: jnp.einsum("i...,ij,j...->...", j, hessian, j), jacobian)

    return diagonal(params, x)


def check(model, x, params=None):
    params = params or used(model, x)
    registry = registered(model, params, x)
    assert registry.batch_found and registry.coverage == 1
    found = jax.jit(curvature.Estimator(registry, EXACT))(params, x).diagonal()
    for name, expected in exact(model, params, x).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", FIRST)
def test_examples_first(name):
    check(FIRST[name], X)


@pytest.mark.parametrize("name", LAST)
def test_examples_last_are_not_told_apart_but_estimated_without_bias(name):
    model = LAST[name]
    params = used(model, X)
    registry = registered(model, params, X)
    examples = {layer.name: layer.examples for layer in registry.layers}
    assert examples["w"] == 1 and examples["head"] == N
    estimator = curvature.Estimator(registry, EXACT)
    with pytest.raises(ValueError, match="needs a random key"):
        estimator(params, X)
    keys = jax.random.split(jax.random.key(0), 300)
    draw = lambda key: estimator(params, X, key=key).diagonal()  # noqa: E731
    draws = jax.jit(lambda keys: jax.lax.map(draw, keys))(keys)
    for name, expected in exact(model, params, X).items():
        error = draws[name].std(0) / np.sqrt(len(keys))
        assert np.all(np.abs(draws[name].mean(0) - expected) < 4.5 * error + 1e-12), name


def scanned_time(p, x):
    """Data and outputs with time in front, as Haiku's recurrent nets have them."""
    step = lambda h, x: (dense(p, h + x) * p["gain"],) * 2  # noqa: E731
    return jax.lax.scan(step, jnp.zeros(x.shape[1:]), x)[1] @ p["head"]


def unrolled_time(p, x):
    h, out = jnp.zeros(x.shape[1:]), []
    for step in x:
        h = dense(p, h + step) * p["gain"]
        out.append(h @ p["head"])
    return jnp.stack(out)


def images_last(p, x):
    """The batch behind everything else."""
    return (mix(dense(p, jnp.moveaxis(x, -1, 0)), 1) @ p["head"]).mean(1)


def micro_batches(p, x):
    """A scan over parts of the batch, whose number must divide it."""
    parts = x.reshape(2, -1, *x.shape[1:])
    return jax.lax.map(lambda x: batch_major(p, x).mean(1), parts).reshape(-1, 3)


@pytest.mark.parametrize("model", [scanned_time, unrolled_time], ids=lambda m: m.__name__)
def test_time_in_front(model):
    check(model, X.swapaxes(0, 1))


def test_the_batch_behind_all_other_axes():
    check(images_last, jnp.moveaxis(X, 0, -1))


def test_a_batch_size_fixed_in_the_function_is_not_mistaken():
    """Time can grow there and the batch cannot: time is no batch."""
    weights = jnp.arange(1.0, N + 1)[:, None]

    def loss_fn(p, x):
        return (losses(curvature.losses, batch_major(PARAMS | p, x)) * weights).mean()

    registry = curvature.register(loss_fn, used(batch_major, X), X)
    assert not registry.batch_found and "axes of the batch's size" in str(registry)


def fixed(model, x):
    """A model into which the shape of its data is written: no larger batch can be traced."""
    return lambda p, data: model(p, data + jnp.zeros(x.shape))


def scanned(p, x):
    """A recurrent net that is given the batch first, and its carry's size."""
    step = lambda h, x: (dense(p, h + x) * p["gain"], None)  # noqa: E731
    return jax.lax.scan(step, jnp.zeros((N, D)), x.swapaxes(0, 1))[0] @ p["head"]


GUESSED = FIRST | {"scanned": scanned}


@pytest.mark.parametrize("name", GUESSED)
def test_a_batch_size_fixed_in_the_function_is_that_of_the_data(name):
    model = fixed(GUESSED[name], X)
    params = used(model, X)
    registry = registered(model, params, X)
    assert not registry.batch_found and registry.coverage == 1
    found = jax.jit(curvature.Estimator(registry, EXACT))(params, X).diagonal()
    for leaf, expected in exact(model, params, X).items():
        np.testing.assert_allclose(found[leaf], expected, rtol=1e-9, atol=1e-12, err_msg=leaf)


@pytest.mark.parametrize("key", [jax.random.key(0), jax.random.PRNGKey(0)], ids=["key", "raw"])
@pytest.mark.parametrize("name", GUESSED)
def test_data_closed_over_beside_a_key(name, key):
    model = GUESSED[name]
    params = used(model, X)

    def loss_fn(p, key):
        noise = jax.random.uniform(key, X.shape)
        return losses(curvature.losses, model({**PARAMS, **p}, X + noise)).mean()

    registry = curvature.register(loss_fn, params, key).override("*", block="diagonal")
    assert not registry.batch_found and registry.coverage == 1
    found = jax.jit(curvature.Estimator(registry, EXACT))(params, key).diagonal()
    for leaf, expected in exact(model, params, X + jax.random.uniform(key, X.shape)).items():
        np.testing.assert_allclose(found[leaf], expected, rtol=1e-9, atol=1e-12, err_msg=leaf)


def test_positions_in_front_are_not_told_apart_where_the_batch_size_is_fixed():
    registry = registered(fixed(time_major, X), used(time_major, X), X)
    examples = {layer.name: layer.examples for layer in registry.layers}
    assert not registry.batch_found and examples["w"] == 1 and examples["head"] == N


def test_a_larger_batch_is_not_looked_for_twice():
    traces = []

    def loss_fn(p, x, y):
        traces.append(x.shape)
        z = batch_major(p, x + jnp.zeros((N, 1, 1)))
        return curvature.losses.squared_error(z, y).mean()

    params, y = used(batch_major, X), normal(9, N, T, 3)
    registry = curvature.register(loss_fn, params, X, y)
    assert len(traces) <= 7
    del traces[:]
    curvature.Estimator(registry, EXACT)(params, X, y)
    assert len(traces) <= 1  # none where JAX remembers the first one


def pairs(p, x):
    """All pairs of examples are rows: as many as examples times examples."""
    n = x.shape[0]
    both = jnp.broadcast_to(x[:, None, 0], (n, n, D)) + jnp.broadcast_to(x[None, :, 1], (n, n, D))
    return dense(p, both.reshape(n * n, D)).reshape(n, n, D).mean(1) @ p["head"]


def shortened(p, x):
    """A flat axis of which an entry is dropped."""
    h = dense(p, x.reshape(-1, D)[:-1])
    return jnp.pad(h, [(1, 0), (0, 0)]).reshape(-1, T, D).mean(1) @ p["head"]


def sorted_rows(p, x):
    """Positions of all examples in another order, as when tokens are sent to experts."""
    flat = x.reshape(-1, D)
    order = jnp.argsort(flat[:, 0])
    h = dense(p, flat[order])[jnp.argsort(order)]
    return mix(h.reshape(-1, T, D), 1).mean(1) @ p["head"]


@pytest.mark.parametrize(
    "model", [pairs, shortened, sorted_rows, micro_batches], ids=lambda m: m.__name__
)
@pytest.mark.parametrize("n", [4, 6])
def test_what_is_no_whole_number_of_examples_in_their_order_is_pooled(model, n):
    x = normal(8, n, T, D)
    params = used(model, x)
    registry = registered(model, params, x)
    (layer,) = (layer for layer in registry.layers if layer.name in ("w", "b"))
    assert layer.examples == 1 and layer.pooled
    estimator = curvature.Estimator(registry, EXACT)
    keys = jax.random.split(jax.random.key(0), 300)
    draw = lambda key: estimator(params, x, key=key).diagonal()  # noqa: E731
    draws = jax.jit(lambda keys: jax.lax.map(draw, keys))(keys)
    expected = exact(model, params, x)["w"]
    error = draws["w"].std(0) / np.sqrt(len(keys))
    assert np.all(np.abs(draws["w"].mean(0) - expected) < 4.5 * error + 1e-12)


def test_a_loss_in_a_scan_over_single_examples_or_parts_of_the_batch():
    """The empirical Fisher draws signs for what the steps differ in."""
    x, y = normal(0, 4, 1), normal(1, 4, 1)
    p = {"w": jnp.ones((1, 1))}
    expected = jnp.sum(((x - y) * x) ** 2)

    def in_parts(count):
        def loss_fn(p, x, y):
            def step(total, part):
                return total + curvature.losses.l2_loss(part[0] @ p["w"], part[1]).sum(), None

            parts = (x.reshape(count, -1, 1), y.reshape(count, -1, 1))
            return jax.lax.scan(step, 0.0, parts)[0]

        return loss_fn

    for count in (2, 4):
        registry = curvature.register(in_parts(count), p, x, y).override("w", block="diagonal")
        estimator = curvature.Estimator(registry, curvature.EmpiricalFisher())
        draw = lambda key: estimator.statistics(p, x, y, key=key)["w"]["values"]  # noqa: B023, E731
        draws = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 400))
        error = draws.std() / 20
        assert abs(float(draws.mean() - expected)) < 4.5 * error


def test_a_batch_that_two_axes_of_one_array_have():
    def loss_fn(p, features, adjacency, y):
        z = dense(p, adjacency @ features) @ p["head"]
        return losses(curvature.losses, z + 0 * y).mean()

    adjacency = jnp.eye(5) + normal(6, 5, 5) / 5
    args = (normal(5, 5, D), adjacency, normal(7, 5, 3))
    params = {k: PARAMS[k] for k in ("w", "b", "head")}
    assert curvature.register(loss_fn, params, *args).batch_found


def test_weakly_typed_arguments():
    def loss_fn(p, x, weights):
        values = losses(curvature.losses, batch_major(PARAMS | p, x))
        return (values * weights.astype(jnp.float64)[:, None]).mean()

    params = used(batch_major, X)
    assert curvature.register(loss_fn, params, X, jnp.full((N,), 1.0)).batch_found


def test_the_exact_matrix_of_flat_logits_is_that_of_shaped_ones():
    """Positions of an example share the network: lit together, they would not come apart."""
    params = used(batch_major, X)

    def factors(model):
        loss_fn = lambda p, x: losses(curvature.losses, model(PARAMS | p, x)).mean()  # noqa: E731
        registry = curvature.register(loss_fn, params, X)
        return jax.jit(curvature.Estimator(registry, EXACT))(params, X).blocks

    flat, shaped = factors(flat_logits), factors(batch_major)
    for name, block in shaped.items():
        for a, b in zip(jax.tree.leaves(flat[name]), jax.tree.leaves(block), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9)


def test_the_batch_is_found_beside_model_state_of_many_sizes():
    """Running means of four widths, two arrays of each, are more common than inputs and labels."""
    widths = (3, 5, 6, 7)
    params = {f"w{a}": normal(a, a, b) for a, b in zip((D, *widths), widths, strict=False)}
    params |= {"head": normal(8, 7, 2), "token": normal(9, 1, 1, D)}
    state = {f"{name}{n}": jnp.zeros(n) for n in widths for name in ("mean", "var")}

    def loss(p, state, x, y):
        h = jnp.concatenate([jnp.broadcast_to(p["token"], (len(x), 1, D)), x], axis=1)
        new = {}
        for a, n in zip((D, *widths), widths, strict=False):
            h = jnp.tanh(h @ p[f"w{a}"])
            for name, now in (("mean", h.mean((0, 1))), ("var", h.var((0, 1)))):
                new[f"{name}{n}"] = 0.9 * state[f"{name}{n}"] + 0.1 * now
        z = h.mean(1) @ p["head"]
        return curvature.losses.softmax_cross_entropy_with_integer_labels(z, y).mean(), new

    args = (normal(10, N, T, D), jnp.arange(N) % 2)
    registry = curvature.register(loss, params, state, *args, has_aux=True)
    assert registry.batch_found
    kind = curvature.EmpiricalFisher()
    statistics = jax.jit(curvature.Estimator(registry, kind).statistics)
    found = statistics(params, state, *args)["token"]["values"]
    one = lambda x, y: jax.grad(loss, has_aux=True)(params, state, x[None], y[None])[0]  # noqa: E731
    each = jax.jit(jax.vmap(one))(*args)["token"]
    np.testing.assert_allclose(found, np.sum(each**2, axis=0).ravel() / N, rtol=1e-6)


def test_gains_and_offsets_of_nodes_that_have_no_batch_axis():
    """Graphs in one array of nodes: each draw squares the sum of gradients with signs in front."""
    params = {"w": PARAMS["w"], "gain": PARAMS["gain"], "shift": PARAMS["b"], "t": jnp.ones(())}
    nodes, sizes = normal(6, 5, D), jnp.array([2, 3])

    def per_graph(p, nodes, sizes):
        h = jnp.tanh(nodes @ p["w"]) * jnp.exp(p["gain"]) + p["shift"]
        graph = jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=len(nodes))
        z = jax.ops.segment_sum(jnp.sin(p["t"] * h), graph, len(sizes))
        return curvature.losses.squared_error(z, jnp.zeros_like(z)).sum(-1)

    registry = curvature.register(lambda *a: per_graph(*a).sum(), params, nodes, sizes)
    assert registry.coverage == 1 and registry.batch_found
    kinds = {layer.name: layer.kind for layer in registry.layers}
    assert kinds == {"w": "dense", "gain": "scale", "shift": "shift", "t": "scale"}
    assert all(layer.unbatched for layer in registry.layers)
    estimator = curvature.Estimator(registry, curvature.EmpiricalFisher())
    draw = jax.jit(lambda key: estimator.statistics(params, nodes, sizes, key=key))
    drawn = [draw(key) for key in jax.random.split(jax.random.key(0), 8)]
    of_graphs = jax.jit(jax.jacobian(per_graph))(params, nodes, sizes)
    for name in ("gain", "shift", "t"):
        one, two = of_graphs[name]
        squares = jnp.stack([(one + two) ** 2, (one - two) ** 2])
        found = jnp.stack([d[name]["values"] for d in drawn])
        which = jnp.isclose(found[:, None], squares, rtol=1e-10).reshape(8, 2, -1).all(-1)
        assert which.any(0).all() and which.any(1).all()


def test_sums_over_single_entries_only_move_a_parameter():
    """As the gradient of a sum leaves them."""

    def loss_fn(p, x):
        potential = lambda x: (x**2 * jax.nn.softplus(p["gain"])[None]).sum()  # noqa: E731
        y = jax.vmap(jax.grad(potential))(x[:, None])
        return losses(curvature.losses, y[:, 0]).mean()

    def by_hand(p, x):
        return losses(curvature.losses, 2 * x * jax.nn.softplus(p["gain"])).mean()

    params, x = {"gain": PARAMS["gain"]}, X[:, 0]
    found = []
    for f in (loss_fn, by_hand):
        registry = curvature.register(f, params, x)
        assert registry.coverage == 1, str(registry)
        statistics = jax.jit(curvature.Estimator(registry, EXACT).statistics)
        found.append(statistics(params, x)["gain"]["values"])
    np.testing.assert_allclose(*found, rtol=1e-12)
