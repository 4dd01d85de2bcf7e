"""Every block kind: its statistics against brute force, its algebra against its dense matrix.

The references are NumPy on recorded inputs and output Jacobians (`reference.rows`), and functions
of dense float64 matrices through `numpy.linalg`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, N, normal, same
from reference import rows

import curvature
from curvature import _jax
from curvature.statistics.factors import factors_of

FACTORED = ("kronecker", "kronecker_reduce", "kronecker_weighted", "foof", "ekfac")
KINDS = (*FACTORED, "diagonal", "dense", "identity")
EXACT = curvature.GaussNewton()


def outer(x, y, weights=None):
    """The sum of x y' over all leading axes."""
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    return x.T @ (y if weights is None else y * weights.reshape(-1, 1))


def gradients(a, g):
    """The gradient of every example and output entry."""
    return np.einsum("nri,ncro->ncio", a, g)


def expected_factors(block, a, g):
    """A and B as the literature defines them, from rows (see `reference.rows`)."""
    count = len(a) * a.shape[1]
    if block == "kronecker_reduce":
        mean, total = a.mean(1), g.sum(2)
        return outer(mean, mean) / len(a), outer(total, total)
    if block == "kronecker_weighted":
        wide = np.broadcast_to(a[:, None], (*g.shape[:3], a.shape[-1]))
        norms_a, norms_g = (wide**2).sum(-1), (g**2).sum(-1)
        first, second = outer(wide, wide, norms_g), outer(g, g, norms_a)
        return first / norms_g.sum(), second * norms_g.sum() / np.trace(second)
    first, second = outer(a, a) / count, outer(g, g)
    if block == "foof":
        second = np.eye(len(second)) * np.trace(second) / len(second)
    return first, second


def agree(found, matrix, tolerance=1e-9):
    """A factor is the matrix, or its diagonal where the library keeps no more."""
    expected = matrix if found.ndim == 2 else np.diag(matrix)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * matrix.max())


STATISTICS = [
    "plain",
    "sequence",
    "stacked in the model",
    "shared",
    "recurrent",
    "experts",
    "conv 1d",
    "conv 2d grouped",
    "embedding",
]


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_equal_brute_force(name):
    params, x, model, reference, biased = CASES[name]()
    z = model(params, x)
    np.testing.assert_allclose(reference(params, x, same), z, rtol=1e-11, atol=1e-13)
    targets, weights = normal(9, *z.shape), jnp.arange(1.0, N + 1)

    def loss_of_z(z):
        errors = curvature.losses.l2_loss(z, targets).reshape(N, -1).sum(1)
        return (weights * errors).mean()

    registry = curvature.register(lambda p, x: loss_of_z(model(p, x)), params, x)
    registries = {block: registry.with_blocks(block) for block in KINDS}

    @jax.jit
    def all_kinds(params, x):
        return {
            block: curvature.Estimator(chosen, EXACT).statistics(params, x)
            for block, chosen in registries.items()
        }

    found = all_kinds(params, x)
    for block, chosen in registries.items():
        zeros = curvature.Estimator(chosen, EXACT).zeros()
        assert jax.tree.map(jnp.shape, zeros) == jax.tree.map(jnp.shape, found[block])
    recorded = jax.tree.map(np.asarray, rows(reference, loss_of_z, params, x, biased))
    for layer in registry.layers:
        copies = sorted(key for key in recorded if key.split("@")[0] == layer.name)
        assert layer.stack == ((len(copies),) if len(copies) > 1 else ())
        for i, copy in enumerate(copies):
            for block in KINDS:
                statistics = found[block][layer.name]
                if layer.stack:
                    statistics = {key: value[i] for key, value in statistics.items()}
                check(block, {k: np.asarray(v) for k, v in statistics.items()}, *recorded[copy])


def factors(block, statistics):
    """A and B from the sums of one copy of a layer."""
    a, b, rows = (statistics[name] for name in ("input", "output", "rows"))
    if block == "kronecker_weighted":
        b = b * rows / (np.trace(b) if b.ndim == 2 else b.sum())
    if block == "foof":
        b = np.full(len(b), b.mean())
    return {"input": a / rows, "output": b}


def check(block, statistics, a, g):
    """One copy of one layer against its rows."""
    p = gradients(a, g)
    if block in FACTORED:
        statistics = statistics | factors(block, statistics)
        for side, expected in zip(("input", "output"), expected_factors(block, a, g), strict=True):
            agree(statistics[side], expected)
    if block == "kronecker_weighted":
        full = np.sum((a[:, None] ** 2).sum(-1) * (g**2).sum(-1))
        traces = [
            np.trace(f) if f.ndim == 2 else f.sum()
            for f in (statistics["input"], statistics["output"])
        ]
        np.testing.assert_allclose(np.prod(traces), full, rtol=1e-10)
    if block == "ekfac":
        bases = [statistics[side] for side in ("input_basis", "output_basis")]
        qa, qb = (np.diag(q) if q.ndim == 1 else q for q in bases)
        for q, side in ((qa, "input"), (qb, "output")):
            np.testing.assert_allclose(q.T @ q, np.eye(len(q)), atol=1e-12)
            factor = statistics[side] if statistics[side].ndim == 2 else np.diag(statistics[side])
            turned = q.T @ factor @ q
            np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=1e-12 * factor.max())
        agree(statistics["values"], ((qa.T @ p @ qb) ** 2).sum((0, 1)))
    if block == "diagonal":
        agree(statistics["values"], (p**2).sum((0, 1)))
    if block == "identity":
        np.testing.assert_allclose(statistics["values"], (p**2).sum() / p[0, 0].size, rtol=1e-10)
    if block == "dense":
        flat = p.reshape(-1, p[0, 0].size)
        agree(statistics["values"], flat.T @ flat)


# Algebra ------------------------------------------------------------------------------------------


def several(params, tokens):
    """An embedding, a convolution, stacked layers with biases, a scale and a head without one."""
    h = params["table"][tokens]
    h = jax.lax.conv_general_dilated(
        h, params["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    h, _ = jax.lax.scan(lambda h, p: (jnp.tanh(h @ p["w"] + p["b"]), None), h, params["stack"])
    return (h * params["scale"]) @ params["head"]


def several_loss(params, tokens):
    return curvature.losses.l2_loss(several(params, tokens)).mean()


@functools.cache
def several_setup():
    params = {
        "head": normal(0, 3, 2),
        "kernel": normal(1, 2, 4, 3) / 2,
        "scale": normal(2, 3),
        "stack": {"b": normal(3, 2, 3), "w": normal(4, 2, 3, 3) / 2},
        "table": normal(5, 6, 4),
    }
    tokens = jax.random.randint(jax.random.key(6), (N, 4), 0, 5)
    return params, tokens, curvature.register(several_loss, params, tokens)


@functools.cache
def operators():
    params, tokens, registry = several_setup()

    @jax.jit
    def all_kinds(params, tokens):
        kind = curvature.EmpiricalFisher()
        return {
            block: curvature.Estimator(registry.with_blocks(block), kind)(params, tokens)
            for block in KINDS
        }

    return all_kinds(params, tokens)


def power(matrix, p, damping):
    values, vectors = np.linalg.eigh(matrix)
    # Between what rounding leaves of zero, 1e-15, and the smallest products of the factors', 5e-12.
    values = np.where(values > 1e-13 * values.max(), values, 0) + damping
    return (vectors * np.where(values > 0, np.where(values > 0, values, 1) ** p, 0)) @ vectors.T


def close(found, expected, tolerance=1e-8):
    scale = np.abs(expected).max(initial=1e-300)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * scale)


@jax.jit  # compiled once for all blocks of one class and shape
def computed(block, v, damping):
    return (
        block.to_dense(),
        block @ v,
        block.solve(v, damping),
        block.power(v, 0.5),
        block.power(v, -0.5, damping),
        (block.trace(), block.logdet(damping), block.eigenvalues(), block.diagonal()),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["head", "kernel", "scale", "stack", "table"])
def test_algebra_is_that_of_the_dense_matrix(name, kind):
    block = operators()[kind].blocks[name]
    damping = 0.1 * float(block.eigenvalues().max())

    shape = block.diagonal().shape
    v = np.random.default_rng(0).normal(size=shape)
    dense, product, solved, root, whitened, scalars = computed(block, jnp.asarray(v), damping)
    trace, logdet, eigenvalues, diagonal = scalars
    copies = int(np.prod(shape[: block.stack_ndim]))
    matrices = np.asarray(dense).reshape(copies, *dense.shape[-2:])

    def applied(function):
        flat = v.reshape(copies, -1)
        parts = [function(m) @ x for m, x in zip(matrices, flat, strict=True)]
        return np.stack(parts).reshape(shape)

    np.testing.assert_allclose(matrices, matrices.swapaxes(1, 2), atol=1e-12 * matrices.max())
    close(product, applied(lambda m: m))
    close(solved, applied(lambda m: np.linalg.inv(m + damping * np.eye(len(m)))))
    close(root, applied(lambda m: power(m, 0.5, 0)), 1e-6)
    close(whitened, applied(lambda m: power(m, -0.5, damping)))
    close(trace, sum(np.trace(m) for m in matrices))
    close(logdet, sum(np.linalg.slogdet(m + damping * np.eye(len(m)))[1] for m in matrices))
    close(eigenvalues.reshape(copies, -1), np.maximum(np.linalg.eigvalsh(matrices), 0))
    assert (np.diff(eigenvalues, axis=-1) >= 0).all()
    close(diagonal.ravel(), np.concatenate([np.diag(m) for m in matrices]))


def test_ekfac_and_identity_matrices_are_their_definitions():
    """What the algebra above is compared with, made by NumPy from the blocks' arrays."""
    blocks = operators()["ekfac"].blocks
    for name in ("head", "kernel", "table"):
        block = blocks[name]
        bases = [np.asarray(q) for q in (block.input_basis, block.output_basis)]
        q = np.kron(*(np.diag(q) if q.ndim == 1 else q for q in bases))
        close(block.to_dense(), (q * np.asarray(block.values).ravel()) @ q.T, 1e-12)
    block = operators()["identity"].blocks["stack"]
    assert block.values.shape == (2,)
    close(block.to_dense()[1], float(block.values[1]) * np.eye(12), 1e-15)


def test_singular_blocks_have_pseudo_inverses_and_no_determinant():
    q = jnp.linalg.qr(normal(0, 3, 3))[0]
    values = jnp.array([[2.0, 0.0], [1.0, 3.0], [0.0, 1e-40]])
    corrected = curvature.EigenKronecker(q, jnp.ones(2), values)
    v = normal(1, 3, 2)
    pseudo = np.linalg.pinv(np.asarray(corrected.to_dense()), rcond=1e-12)
    close(corrected.solve(v), (pseudo @ np.asarray(v).ravel()).reshape(3, 2))
    close(corrected.damped_inverse(0.0) @ v, corrected.solve(v))
    assert corrected.logdet() == -jnp.inf
    nothing = curvature.Identity(jnp.zeros(()), (3, 2))
    np.testing.assert_array_equal(nothing.solve(v), 0)
    assert nothing.logdet() == -jnp.inf


@pytest.mark.parametrize("kind", ["ekfac", "identity"])
def test_single_precision_is_kept_under_damping_of_another(kind):
    block = jax.tree.map(lambda x: x.astype(jnp.float32), operators()[kind].blocks["head"])
    v, damping = normal(0, 3, 2).astype(jnp.float32), jnp.asarray(0.1, jnp.float64)
    results = (
        block.solve(v, damping),
        block.power(v, 0.5, damping),
        block.logdet(damping),
        block.damped_inverse(damping) @ v,
    )
    assert {x.dtype for x in results} == {jnp.dtype(jnp.float32)}
    close(results[3], results[0], 1e-5)


# What each kind gets right ------------------------------------------------------------------------


def test_traces():
    """EKFAC, diagonal, identity and dense blocks have the exact trace, FOOF has K-FAC's."""
    ops = operators()
    for name in ("head", "kernel", "stack", "table"):
        exact = ops["dense"].blocks[name].trace()
        for kind in ("ekfac", "diagonal", "identity"):
            close(ops[kind].blocks[name].trace(), exact)
        close(ops["foof"].blocks[name].trace(), ops["kronecker"].blocks[name].trace())
    assert ops["identity"].blocks["scale"].values.shape == ()
    close(ops["identity"].blocks["scale"].trace(), ops["diagonal"].blocks["scale"].trace())


def test_identity_blocks_of_generic_parameters_have_the_diagonals_trace():
    params, x, key = {"u": normal(0, 3), "v": normal(1, 3)}, normal(2, N, 3), jax.random.key(3)

    def loss_fn(p, x):
        return curvature.losses.l2_loss(x * jnp.cumsum(p["u"] * jnp.sin(p["v"]))).mean()

    registry = curvature.register(loss_fn, params, x)
    assert {layer.kind for layer in registry.layers} == {"generic"}
    one, each = (
        jax.jit(curvature.Estimator(registry.with_blocks(block), EXACT))(params, x, key=key)
        for block in ("identity", "diagonal")
    )
    for name, block in one.blocks.items():
        close(block.trace(), each.blocks[name].trace())


def test_tied_weights():
    """Both orientations of one weight: factors by partial traces, corrections exact."""
    params = {"w": normal(0, 5, 3), "v": normal(1, 3, 3)}
    x = jax.random.randint(jax.random.key(2), (N, 4), 0, 5)

    def loss_fn(p, x):
        z = jnp.tanh(p["w"][x] @ p["v"]) @ p["w"].T
        return curvature.losses.l2_loss(z).mean()

    registry = curvature.register(loss_fn, params, x)
    dense, ekfac, plain, foof, reduced = (
        jax.jit(curvature.Estimator(registry.with_blocks(block), EXACT).statistics)(params, x)["w"]
        for block in ("dense", "ekfac", "kronecker", "foof", "kronecker_reduce")
    )
    exact = np.asarray(dense["values"])
    assert ekfac["input_basis"].shape == (5,)  # one-hot in the first use
    q = np.kron(np.eye(5), ekfac["output_basis"])
    close(ekfac["values"].ravel(), np.diag(q.T @ exact @ q))
    (layer,) = (x for x in registry.layers if x.name == "w")
    foof = factors_of(dataclasses.replace(layer, block="foof"), foof)
    ekfac, plain, reduced = (factors_of(layer, x) for x in (ekfac, plain, reduced))
    close(ekfac["output"], plain["output"], 1e-12)
    close(foof["input"], plain["input"], 1e-12)
    close(foof["output"], np.full(3, np.trace(plain["output"]) / 3), 1e-12)
    for x in reduced.values():
        assert np.isfinite(x).all() and float(x.max()) > 0


def test_wide_sides_are_diagonal():
    params, x, model, *_ = CASES["plain"]()

    def loss_fn(p, x):
        return curvature.losses.l2_loss(model(p, x)).mean()

    registry = curvature.register(loss_fn, params, x)
    run = {
        block: jax.jit(
            curvature.Estimator(registry.with_blocks(block), EXACT, max_factor_dim=3).statistics
        )(params, x)["v"]  # (4, 2): its input side is too wide
        for block in ("dense", "kronecker_reduce", "kronecker_weighted", "foof", "ekfac")
    }
    exact = np.asarray(run["dense"]["values"])
    assert all(run[block]["input"].shape == (4,) for block in run if block != "dense")
    corrected = run["ekfac"]
    np.testing.assert_array_equal(corrected["input_basis"], 1)
    q = np.kron(np.eye(4), corrected["output_basis"])
    close(corrected["values"].ravel(), np.diag(q.T @ exact @ q))


def test_masked_positions_count_for_nothing():
    """Reduced inputs are means over positions that have a loss; empty examples do not count."""
    params, x = {"w": normal(0, 3, 2)}, normal(1, N, 5, 3)
    lengths = np.array([5, 3, 0, 1, 4, 2])
    mask = jnp.asarray(np.arange(5) < lengths[:, None], float)

    def loss_fn(p, x, mask):
        losses = curvature.losses.l2_loss(x @ p["w"]).sum(-1)
        return (losses * mask).sum()

    registry = curvature.register(loss_fn, params, x, mask).with_blocks("kronecker_reduce")
    found = jax.jit(curvature.Estimator(registry, EXACT).statistics)(params, x, mask)["w"]
    kept = [np.asarray(x[n, :length]).mean(0) for n, length in enumerate(lengths) if length]
    close(found["input"] / found["rows"], np.einsum("ni,nj->ij", kept, kept) / len(kept), 1e-12)


# Bases, keys, cost --------------------------------------------------------------------------------


def test_sampled_corrections_are_those_of_the_same_draws():
    """One call is a sweep for factors, then one in their basis with the same samples."""
    params, tokens, registry = several_setup()
    estimator = curvature.Estimator(registry.with_blocks("ekfac"), curvature.Fisher(samples=3))
    run = jax.jit(estimator.statistics)
    key = jax.random.key(4)
    found = run(params, tokens, key=key)
    again = run(params, tokens, key=key, bases=found)
    jax.tree.map(functools.partial(close, tolerance=1e-10), again, found)
    other = run(params, tokens, key=jax.random.key(5), bases=found)
    np.testing.assert_array_equal(other["head"]["input_basis"], found["head"]["input_basis"])
    assert float(jnp.abs(other["head"]["values"] - found["head"]["values"]).max()) > 0


def test_bases_of_other_layers_or_shapes_are_errors():
    params, tokens, registry = several_setup()
    estimator = curvature.Estimator(registry.with_blocks("ekfac"), EXACT)
    zeros = estimator.zeros()
    with pytest.raises(ValueError, match=r"bases\['head'\]\['input_basis'\]: found none"):
        estimator.statistics(params, tokens, bases={})
    wrong = zeros | {"head": zeros["table"]}
    with pytest.raises(ValueError, match=r"found shape \[6\], expected .* shape \[3, 3\]"):
        estimator.statistics(params, tokens, bases=wrong)


def test_rebased_corrections_are_the_operators_diagonal_in_the_new_basis():
    params, tokens, registry = several_setup()
    estimator = curvature.Estimator(registry.with_blocks("ekfac"), EXACT)
    zeros = estimator.zeros()
    found = jax.jit(estimator.statistics)(params, tokens, bases=zeros)
    rebased = jax.jit(estimator.rebased, static_argnames="restart")
    moved, fresh = rebased(found), rebased(found, restart=True)
    for name in ("head", "kernel", "table"):
        old, new = (estimator.operator(s).blocks[name] for s in (found, moved))
        bases = [np.asarray(q) for q in (new.input_basis, new.output_basis)]
        q = np.kron(*(np.diag(q) if q.ndim == 1 else q for q in bases))
        close(new.values.ravel(), np.diag(q.T @ np.asarray(old.to_dense()) @ q), 1e-11)
        a, b, rows = (found[name][key] for key in ("input", "output", "rows"))
        kronecker = curvature.Kronecker(a / rows, b)
        restarted = estimator.operator(fresh).blocks[name]
        close(restarted.to_dense() * kronecker.trace() / old.trace(), kronecker.to_dense(), 1e-11)
    again = rebased(moved)
    close(again["stack"]["values"], moved["stack"]["values"], 1e-11)


def shapes_in(jaxpr):
    """The shapes of all values in a jaxpr, at any depth."""
    for equation in jaxpr.equations:
        yield from (tuple(v.aval.shape) for v in equation.outvars)
        for inner in _jax.nested(equation):
            yield from shapes_in(inner)


@pytest.mark.parametrize("block", ["ekfac", "diagonal", "identity", "kronecker_reduce"])
def test_no_per_example_gradients_where_an_example_is_one_row(block):
    """No array holds an example axis and both sides of a kernel; with positions EKFAC needs one."""
    params = {"w": jnp.ones((11, 13)), "v": jnp.ones((13, 3))}

    def loss_fn(p, x):
        return curvature.losses.l2_loss(jnp.tanh(x @ p["w"]) @ p["v"]).mean()

    def sizes(*shape):
        x = jnp.ones(shape)
        registry = curvature.register(loss_fn, params, x).with_blocks(block)
        run = curvature.Estimator(registry, curvature.EmpiricalFisher()).statistics
        jaxpr, _ = _jax.trace(run, params, x)
        return [s for s in shapes_in(jaxpr) if {11, 13} < set(s) and 7 in s]

    assert not sizes(7, 11)
    assert bool(sizes(7, 5, 11)) == (block != "kronecker_reduce")


def test_ekfac_trains_through_kfac():
    """The preconditioner, computed by hand: averages in the basis of the latest refresh."""
    params, x, model, *_ = CASES["plain"]()
    decay, damping = 0.8, 0.1

    def loss_fn(p, x):
        return curvature.losses.l2_loss(model(p, x)).sum(-1).mean()

    registry = curvature.register(loss_fn, params, x).with_blocks("ekfac")
    estimator = curvature.Estimator(registry, EXACT)
    tx = curvature.scale_by_curvature(
        registry,
        EXACT,
        damping=damping,
        decay=decay,
        refresh_every=2,
        refresh=curvature.Eigh(factored=False),
        warmup_steps=0,
        spread=False,
    )
    update, run = jax.jit(tx.update), jax.jit(estimator.statistics)
    state, averages, weight = tx.init(params), estimator.zeros(), 0.0
    bases = averages
    for t in range(4):
        p = jax.tree.map(lambda leaf, t=t: leaf * (1 + t / 5), params)
        grads = jax.grad(loss_fn)(p, x)
        updates, state = update(grads, state, p, loss_args=(x,))
        fresh = run(p, x, bases=bases)
        first, weight = weight == 0, decay * weight + 1 - decay
        mixed = jax.tree.map(lambda m, s: decay * m + (1 - decay) * s, averages, fresh)
        averages = {n: mixed[n] | _bases(bases[n]) for n in mixed}
        if t % 2 == 0:
            averages = bases = estimator.rebased(averages, restart=first)
            debiased = {
                n: {k: v / weight for k, v in s.items()} | _bases(s) for n, s in averages.items()
            }
            operator = estimator.operator(debiased)
        jax.tree.map(
            functools.partial(close, tolerance=1e-7), updates, operator.solve(grads, damping)
        )
        found, expected = curvature.averages(registry, state), estimator.operator(averages)
        found = estimator.operator(found) @ grads
        expected = jax.tree.map(lambda x, w=weight: x / w, expected @ grads)
        jax.tree.map(functools.partial(close, tolerance=1e-7), found, expected)


def _bases(statistics):
    return {name: x for name, x in statistics.items() if name.endswith("_basis")}


# Choosing -----------------------------------------------------------------------------------------


def test_a_rule_by_name_goes_to_every_layer_that_can_have_it():
    _, _, registry = several_setup()
    blocks = {x.name: x.block for x in registry.with_blocks("ekfac").layers}
    assert blocks == {
        "head": "ekfac",
        "kernel": "ekfac",
        "scale": "diagonal",
        "stack": "ekfac",
        "table": "ekfac",
    }
    everywhere = registry.override("head", exclude=True).with_blocks("identity")
    assert {x.name: x.block for x in everywhere.layers}["head"] == "excluded"
    assert {x.block for x in everywhere.layers} == {"excluded", "identity"}
    assert "ekfac" in str(registry.with_blocks("ekfac"))


def test_a_rule_by_layer_keeps_what_it_does_not_name():
    _, _, registry = several_setup()
    rule = lambda layer: {"conv": "kronecker_reduce", "embedding": "foof"}.get(layer.kind)  # noqa: E731
    chosen = registry.with_blocks(rule).override("head", block="dense")
    assert [x.block for x in chosen.layers] == [
        "dense",
        "kronecker_reduce",
        "diagonal",
        "kronecker",
        "foof",
    ]


def test_impossible_choices_are_errors():
    _, _, registry = several_setup()
    with pytest.raises(ValueError, match=r"Layer 'scale' .*is scale and cannot have .*'ekfac'"):
        registry.with_blocks(lambda layer: "ekfac")
    with pytest.raises(ValueError, match=r"No layer can have the block 'kfac'.*kronecker, .*ekfac"):
        registry.with_blocks("kfac")

    def on_constants(p, x):  # learned queries: a layer that sees no data
        return curvature.losses.l2_loss(x * jnp.tanh(jnp.ones((4, 3)) @ p["w"])).mean()

    lone = curvature.register(on_constants, {"w": jnp.ones((3, 3))}, jnp.ones((N, 4, 3)))
    with pytest.raises(ValueError, match=r"'w' .*kronecker_reduce.*cannot be\s+told apart"):
        lone.override("w", block="kronecker_reduce")


def test_a_registered_choice_holds_for_batches_of_any_size():
    """Reduce needs examples told apart when it is chosen, not at every call."""
    params, tokens, registry = several_setup()
    analysis = registry.with_blocks("kronecker_reduce").analyse(params, (tokens[:1],))
    assert {x.examples for x in analysis.layers if x.kind != "scale"} == {1}
    assert {x.block for x in analysis.layers if x.kind != "scale"} == {"kronecker_reduce"}


def test_ekfac_of_fewer_examples_than_dimensions_has_a_pseudo_inverse():
    """Null vectors are known to eps only: second moments along them are no curvature."""
    x = jax.random.normal(jax.random.key(7), (3, 8))
    params = {"w": jax.random.normal(jax.random.key(8), (8, 4)) / 3, "v": jnp.ones((4, 2))}

    def loss_fn(p, x):
        return curvature.losses.l2_loss(jnp.tanh(x @ p["w"]) @ p["v"], jnp.ones((3, 2))).mean()

    registry = curvature.register(loss_fn, params, x).with_blocks("ekfac")
    op = jax.jit(curvature.Estimator(registry, curvature.GaussNewton()))(params, x)
    solve = jax.jit(lambda op, v: op.solve(v))
    solved = solve(op, jax.jit(jax.grad(loss_fn))(params, x))
    largest = max(float(jnp.abs(s).max()) for s in jax.tree.leaves(solved))
    assert largest < 1e5
    # It is in the range of the operator: applied again, the gradient's part in it comes back.
    again = solve(op, op @ solved)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), again, solved)
