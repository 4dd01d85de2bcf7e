"""Everything on a mesh, with automatic and explicit axes, is what it is on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import half, normal
from jax.sharding import NamedSharding, PartitionSpec
from meshes import CASES, MODES, entered, make_mesh, put

import curvature
from curvature import operators

KINDS = (
    "kronecker",
    "kronecker_reduce",
    "kronecker_weighted",
    "foof",
    "ekfac",
    "diagonal",
    "dense",
    "identity",
)
EMPIRICAL = curvature.EmpiricalFisher()


def on_mesh(case, mode):
    """The case on a mesh, `(loss_fn, params, args)`, and the mesh."""
    mesh = make_mesh(mode)
    loss_fn, params, args, specs = CASES[case](mesh)
    return (loss_fn, *put(mesh, (params, args), specs)), mesh


def close(found, expected, tolerance=1e-9):
    """Both trees, entry by entry, up to rounding."""

    def one(a, b):
        b = np.asarray(b)
        scale = np.abs(b).max(initial=1e-300)
        np.testing.assert_allclose(np.asarray(a), b, rtol=tolerance, atol=tolerance * scale)

    jax.tree.map(one, found, expected)


def can_have(layer, block):
    return block if block in curvature.blocks.blocks_for(layer.kind) else None


def statistics(loss_fn, params, args, blocks, kind):
    registry = curvature.register(loss_fn, params, *args)

    @jax.jit
    def run(params, args, key):
        found = {}
        for block in blocks:
            chosen = registry.with_blocks(lambda layer, block=block: can_have(layer, block))
            estimator = curvature.Estimator(chosen, kind)
            found[block] = estimator.statistics(params, *args, key=key)
        return found

    return run(params, args, jax.random.key(3))


@functools.cache
def statistics_of_one(case, blocks, kind):
    return statistics(*CASES[case](None)[:3], blocks, kind)


def compare_statistics(case, mode, blocks, kind):
    many, mesh = on_mesh(case, mode)
    expected = statistics_of_one(case, blocks, kind)
    with entered(mode, mesh):
        found = statistics(*many, blocks, kind)
    for block in blocks:
        for name, arrays in expected[block].items():
            if "input_basis" in arrays:  # eigenvectors are known up to their signs
                arrays, there = (
                    {k: v for k, v in s.items() if not k.endswith("basis")}
                    for s in (arrays, found[block][name])
                )
            else:
                there = found[block][name]
            close(there, arrays, 1e-7)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_statistics_are_those_of_one_device(case, mode):
    compare_statistics(case, mode, ("kronecker", "diagonal"), EMPIRICAL)


def rotated(others):
    """Every case with every one of the others, in turns in the modes; a quarter in every run."""
    modes = list(MODES)
    rest = pytest.mark.exhaustive
    return [
        pytest.param(*(case, modes[(i + j) % len(modes)], other), marks=rest if (i - j) % 4 else ())
        for i, case in enumerate(CASES)
        for j, other in enumerate(others)
    ]


SOURCES = (
    EMPIRICAL,
    curvature.GaussNewton(),
    curvature.GaussNewton(probes=2),
    curvature.Fisher(samples=2),
    curvature.Fisher(samples=None),
)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "mode", "kind"), rotated(SOURCES), ids=str)
def test_statistics_of_all_blocks_are_those_of_one_device(case, mode, kind):
    """With one key: the draws do not depend on how the batch is divided."""
    compare_statistics(case, mode, KINDS, kind)


def in_eigenbasis(registry, kind, **options):
    """As `eigen_adam`, without optax's Adam, which cannot stand strict promotion."""
    inner = optax.chain(optax.trace(0.9), optax.scale_by_rms(eps=1e-3))
    tx = curvature.in_eigenbasis(registry, inner, kind, refresh_every=2, **options)
    return optax.chain(tx, optax.scale(-0.1))


VARIANTS = {
    "kfac": lambda r: curvature.kfac(r, 0.1, kind=EMPIRICAL, damping=0.1),
    "ekfac": lambda r: curvature.ekfac(r, 0.1, kind=EMPIRICAL, damping=0.1),
    "foof": lambda r: curvature.foof(r, 0.1, damping=0.1),
    "half of the batch": lambda r: curvature.kfac(r, 0.1, damping=0.1, statistics_batch=0.5),
    "sampled, newton-schulz": lambda r: curvature.kfac(
        r, 0.1, damping=0.1, refresh=curvature.NewtonSchulz(), kl_clip=1e-3, weight_decay=0.1
    ),
    "eigh, graft": lambda r: curvature.kfac(
        r, 0.1, kind=EMPIRICAL, damping=0.1, refresh=curvature.Eigh(), graft=optax.trace(0.9)
    ),
    "qr, accumulate": lambda r: curvature.kfac(
        r, 0.1, kind=EMPIRICAL, damping=0.1, refresh=curvature.QR(), accumulate=2, burn_in=1
    ),
    "fallback": lambda r: curvature.kfac(
        r,
        0.1,
        kind=EMPIRICAL,
        damping=0.1,
        fallback=optax.trace(0.9),
        relative_damping=True,
        max_factor_dim=4,
        statistics_every=1,
        refresh_every=1,
    ),
    "quadratic model": lambda r: curvature.kfac(
        r,
        curvature.QuadraticModel(),
        damping=curvature.LevenbergMarquardt(),
        l2=1e-3,
        kind=curvature.GaussNewton(probes=2),
    ),
    "in eigenbasis": lambda r: in_eigenbasis(r, EMPIRICAL, accumulate=2),
    # Not QR: a gradient's outer products are singular, and where it begins there is anybody's.
    "in eigenbasis of gradients": lambda r: in_eigenbasis(
        r, curvature.Shampoo(), refresh=curvature.Eigh()
    ),
    "chained": lambda r: optax.chain(
        curvature.scale_by_curvature(r, EMPIRICAL, damping=0.1), optax.scale(-0.1)
    ),
}


def trained(tx, loss_fn, params, args, steps=3):
    """The parameters after some steps of a jitted step, its state, and how often it was traced."""
    traces = []

    @jax.jit
    def step(params, state, args, key):
        traces.append(None)
        grads = jax.grad(loss_fn)(params, *args)
        updates, state = tx.update(grads, state, params, loss_args=args, key=key)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(steps):
        params, state = step(params, state, args, jax.random.key(i))
    return params, state, len(traces)


def check_differentiable(mode, mesh, loss_fn, params, args):
    """Skips what JAX itself has no gradient of: a weight in a loop, in 0.12 without `set_mesh`."""
    try:
        with entered(mode, mesh):
            jax.jit(jax.grad(loss_fn)).lower(params, *args)
    except Exception as error:
        if type(error).__name__ != "ShardingTypeError":
            raise
        pytest.skip("JAX has no gradient of this loss without set_mesh")


@functools.cache
def trained_on_one(case, variant):
    loss_fn, params, args, _ = CASES[case](None)
    tx = VARIANTS[variant](curvature.register(loss_fn, params, *args))
    return trained(tx, loss_fn, params, args)[0]


def types(tree):
    return jax.tree.map(jax.typeof, tree)


def compare_training(case, mode, variant):
    many, mesh = on_mesh(case, mode)
    check_differentiable(mode, mesh, *many)
    expected = trained_on_one(case, variant)
    with entered(mode, mesh):
        tx = VARIANTS[variant](curvature.register(many[0], many[1], *many[2]))
        found, state, traces = trained(tx, *many)
        if mode != "auto":  # there the first state is on one device, as that of any optimizer
            assert traces == 1
            assert types(found) == types(many[1])
            assert types(state) == types(tx.init(many[1]))
    close(found, expected, 1e-6)
    _, start, *_ = CASES[case](None)
    jax.tree.map(lambda a, b: np.testing.assert_array_less(0, np.abs(a - b).max()), found, start)


@pytest.mark.parametrize(
    ("case", "mode", "variant"),
    [
        ("convolution", "explicit", "kfac"),
        ("tensor_parallel", "explicit, set", "quadratic model"),
        ("tensor_parallel", "explicit", "in eigenbasis"),
    ],
)
def test_training_is_that_of_one_device(case, mode, variant):
    compare_training(case, mode, variant)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "mode", "variant"), rotated(VARIANTS))
def test_training_of_every_variant_is_that_of_one_device(case, mode, variant):
    compare_training(case, mode, variant)


# Operators ----------------------------------------------------------------------------------------


def exact(loss_fn, params, args, vector):
    """Products of every exact operator, and what is made of one of them."""
    batches, key = [args], jax.random.key(0)
    gauss_newton = operators.gauss_newton(loss_fn, params, batches)
    two = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), vector)
    return {
        "hessian": operators.hessian(loss_fn, params, [args, args]) @ vector,
        "gauss_newton": gauss_newton @ vector,
        "fisher": operators.fisher(loss_fn, params, batches, samples=2, key=key) @ vector,
        "empirical": operators.empirical_fisher(loss_fn, params, batches) @ vector,
        "two": gauss_newton.mm(two),
        "dense": operators.to_dense(gauss_newton),
        "diagonal": operators.diagonal(gauss_newton, key, 4)[0],
        "top": operators.top_eigenpairs(gauss_newton, 1, key, products=4).values,
        "solution": operators.solve(gauss_newton, vector, 1.0, tolerance=1e-9).value,
    }


def blockwise(loss_fn, params, args, vector):
    """What the operator of the estimator can do, without `jit`."""
    registry = curvature.register(loss_fn, params, *args)
    op = curvature.Estimator(registry, EMPIRICAL)(params, *args, key=jax.random.key(0))
    damping = jnp.asarray(0.1)
    return {
        "product": op @ vector,
        "solution": op.solve(vector, damping),
        "root": op.power(vector, 0.5, 0.1),
        "inverse": op.damped_inverse(damping) @ vector,
        "numbers": [op.trace(), op.logdet(damping), op.eigenvalues()],
        "diagonal": op.diagonal(),
    }


def compare_operators(case, mode, make):
    many, mesh = on_mesh(case, mode)
    loss_fn, params, args, _ = CASES[case](None)
    expected = make(loss_fn, params, args, jax.tree.map(lambda x: x / 2 + 1, params))
    with entered(mode, mesh):
        found = make(*many, jax.tree.map(lambda x: x / 2 + 1, many[1]))
    close(found, expected, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["explicit", "explicit, set"])
@pytest.mark.parametrize("case", ["tensor_parallel"])
def test_the_estimators_operator_is_that_of_one_device(case, mode):
    compare_operators(case, mode, blockwise)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "case"), half(list(MODES), ["mlp", "scanned", "convolution", "tensor_parallel"])
)
def test_exact_operators_are_those_of_one_device(case, mode):
    compare_operators(case, mode, exact)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "case"), half(list(MODES), ["mlp", "sharded_parameters"]))
def test_the_comparison_is_that_of_one_device(case, mode):
    def table(loss_fn, params, args):
        registry = curvature.register(loss_fn, params, *args)
        key = jax.random.key(0)
        return curvature.compare(
            registry, params, [args, args], key=key, limit=12, progress=False
        ).table()

    many, mesh = on_mesh(case, mode)
    with entered(mode, mesh):
        found = table(*many)
    assert found == table(*CASES[case](None)[:3])


@pytest.mark.parametrize("mode", ["explicit", "explicit, set"])
def test_a_part_of_the_loss_may_be_automatic(mode):
    """A scan over layers in `auto_axes`, with the tagged loss inside and a layer outside."""
    mesh = make_mesh(mode)
    loss_fn, params, args, specs = CASES["mlp"](mesh)
    params, args = put(mesh, (params, args), specs)

    def partly(p, x, y):
        whole = NamedSharding(mesh, PartitionSpec())
        return jax.sharding.auto_axes(loss_fn, out_sharding=whole)(p, jnp.sin(x), y)

    def all_of_it(p, x, y):
        return loss_fn(p, jnp.sin(x), y)

    vector = jax.tree.map(lambda x: x / 2 + 1, params)

    def run(loss_fn, params, args):
        op = operators.gauss_newton(loss_fn, params, [args])
        return statistics(loss_fn, params, args, ("kronecker",), EMPIRICAL), op @ vector

    with entered(mode, mesh):
        found = run(partly, params, args)
    _, params, args, _ = CASES["mlp"](None)
    vector = jax.tree.map(lambda x: x / 2 + 1, params)
    close(found, run(all_of_it, params, args), 1e-7)


def test_a_weight_spelled_anew_meets_the_data_in_an_automatic_part():
    """With parameters of few bits that are cast there, as attention sinks are."""
    mesh = make_mesh("explicit, set")

    def loss_fn(p, x, y, attend):
        z = attend(x @ (p["w"] * p["g"]), p["sinks"])
        return curvature.losses.l2_loss(z, y).mean()

    def attend(z, sinks):
        return z / (1 + jnp.exp(sinks.astype(z.dtype) - z))

    params = {"w": normal(0, 3, 4), "g": normal(1, 4), "sinks": jnp.ones(4, jnp.bfloat16)}
    args = normal(2, 8, 3), normal(3, 8, 4)
    expected = statistics(lambda *a: loss_fn(*a, attend), params, args, ("kronecker",), EMPIRICAL)
    with entered("explicit, set", mesh):
        partly = jax.sharding.auto_axes(attend, out_sharding=PartitionSpec("data", None))
        params, args = put(mesh, (params, args), (PartitionSpec(), PartitionSpec("data")))
        found = statistics(lambda *a: loss_fn(*a, partly), params, args, ("kronecker",), EMPIRICAL)
    assert set(found) == set(expected)
    close(found, expected, 1e-7)


# Steps and shapes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["explicit", "explicit, set"])
def test_steps_can_be_scanned_over(mode):
    """The types of parameters and state stay the same, whether statistics are due or not."""
    (loss_fn, params, args), mesh = on_mesh("sharded_parameters", mode)
    with entered(mode, mesh):
        registry = curvature.register(loss_fn, params, *args)
        tx = curvature.kfac(registry, 0.1, kind=EMPIRICAL, statistics_every=2, refresh_every=2)

        def step(carry, key):
            params, state = carry
            grads = jax.grad(loss_fn)(params, *args)
            updates, state = tx.update(grads, state, params, loss_args=args, key=key)
            return (optax.apply_updates(params, updates), state), None

        @jax.jit
        def run(carry, args, keys):
            return jax.lax.scan(step, carry, keys)[0]

        found, state = run((params, tx.init(params)), args, jax.random.split(jax.random.key(0), 3))
    assert types(found) == types(params)
    assert int(state.stats.skipped) == 0
    assert all(
        bool(jnp.any(a != b)) for a, b in zip(*map(jax.tree.leaves, (found, params)), strict=True)
    )


@pytest.mark.parametrize("mode", ["explicit", "explicit, set"])
@pytest.mark.parametrize("case", CASES)
def test_shapes_with_shardings_register_as_arrays_do(case, mode):
    """The batch is found by a trace with twice as many examples: one more does not divide."""
    (loss_fn, params, args), mesh = on_mesh(case, mode)
    expected = curvature.register(*CASES[case](None)[:2], *CASES[case](None)[2])
    with entered(mode, mesh):
        arrays = curvature.register(loss_fn, params, *args)
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (params, args)
        )
        from_shapes = curvature.register(loss_fn, shapes[0], *shapes[1])
    described = [
        [(x.name, x.kind, x.examples, x.stack) for x in r.layers]
        for r in (expected, arrays, from_shapes)
    ]
    assert described[0] == described[1] == described[2]
    assert arrays.batch_found and from_shapes.batch_found
