"""Exact operators against dense brute force in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from jax.flatten_util import ravel_pytree
from operator_cases import CASES, SOFTMAX, N, brute_force, check, close, pulled, setup

import curvature
from curvature import metrics, operators


@pytest.mark.parametrize("name", CASES)
def test_every_operator_equals_brute_force(name):
    args = CASES[name]().args(3, N)
    check(name, [args], vars(brute_force(name)))


def test_the_exact_fisher_is_the_gauss_newton_matrix():
    args = CASES["heads"]().args(3, N)
    check("heads", [args], {"fisher": brute_force("heads").gauss_newton})


def test_a_dataset_is_the_mean_over_its_examples():
    """Two batches of different size: each counts by its share."""
    batches = [CASES["mlp"]().args(seed, n) for seed, n in ((3, N), (4, 3))]
    first, second = (brute_force("mlp", *at).gauss_newton for at in ((3, N), (4, 3)))
    check("mlp", batches, {"gauss_newton": (N * first + 3 * second) / (N + 3)})


def test_a_branch_that_is_not_taken_counts_for_nothing():
    args = CASES["heads"]().args(4, N)
    assert not args[-1]
    op = operators.gauss_newton(setup("heads")[1], setup("heads")[0].params, [args])
    close(operators.to_dense(op), brute_force("heads", 4).gauss_newton)


def test_the_matrices_differ():
    """A control: the comparisons above could not be passed by one matrix."""
    found = list(vars(brute_force("mlp")).values())
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert np.linalg.norm(found[i] - found[j]) > 0.1 * np.linalg.norm(found[i])


def test_a_registry_stands_for_its_loss():
    case, loss_fn, aux = setup("conv")
    args = case.args(3, N)
    registry = curvature.register(loss_fn, case.params, *args, **aux)
    op = operators.gauss_newton(registry, case.params, [args])
    close(operators.to_dense(op), brute_force("conv").gauss_newton)


@pytest.mark.parametrize("name", ["chunked", "heads"])
def test_the_sampled_fisher_converges_with_slope_one_half(name):
    """The mean of 64 independent matrices is 8 times nearer to the exact one than each of them."""
    case, loss_fn, _ = setup(name)
    args = case.args(3, N)
    exact = brute_force(name).gauss_newton

    def sampled(seed):
        key = jax.random.key(seed)
        op = operators.fisher(loss_fn, case.params, [args], samples=16, key=key)
        return operators.to_dense(op)

    def error(matrix):
        return np.linalg.norm(matrix - exact) / np.linalg.norm(exact)

    found = [sampled(seed) for seed in range(64, 128)]
    one, mean = np.mean([error(matrix) for matrix in found]), error(sum(found) / 64)
    assert mean < 0.06
    assert 4 < one / mean < 16


def test_the_sampled_fisher_is_one_matrix():
    """Products with the same key see the same samples, symmetric and semi-definite."""
    case, loss_fn, _ = setup("chunked")
    batches = [case.args(3, N), case.args(4, N)]

    def sampled(key):
        return operators.to_dense(
            operators.fisher(loss_fn, case.params, batches, samples=1, key=key)
        )

    one, again, other = (
        sampled(k) for k in (jax.random.key(0), jax.random.PRNGKey(0), jax.random.key(1))
    )
    np.testing.assert_array_equal(one, again)
    close(one, one.T, 1e-14)
    assert np.linalg.eigvalsh(one).min() > -1e-12
    assert np.linalg.norm(one - other) > 0.01 * np.linalg.norm(one)


def test_scores_of_one_unit_are_sampled():
    """One unit of elementwise loss: s s' at a sampled target has rank one, and scores vary."""
    x = jnp.array([[1.0, 2.0]])

    def loss_fn(w, x):
        return curvature.losses.l2_loss(x @ w, jnp.zeros(1)).sum()

    def factor(seed):
        op = operators.fisher(loss_fn, jnp.ones(2), [x], samples=1, key=jax.random.key(seed))
        matrix = operators.to_dense(op)
        close(matrix, matrix[0, 0] * x.T @ x)
        return float(matrix[0, 0])

    assert len({factor(seed) for seed in range(3)}) == 3


def test_negative_weights_count_by_magnitude():
    def loss_fn(w, x, m):
        return (m * curvature.losses.l2_loss(x @ w, jnp.zeros(len(x)))).sum()

    x, m = normal(0, N, 2), jnp.array([1.0, -2.0, 0.5, -1.0, 0.0])
    for operator in (operators.gauss_newton, operators.fisher):
        close(operators.to_dense(operator(loss_fn, jnp.ones(2), [(x, m)])), x.T * jnp.abs(m) @ x)


def heteroscedastic(p, x, t):
    z = x @ p
    return curvature.losses.heteroscedastic_gaussian_nll(z[:, 0], z[:, 1], t[:, 0]).mean()


def indefinite(p, x, t):
    unit = lambda z, t: z[0] * z[1] + jnp.sum((z - t) ** 4) / 60  # noqa: E731
    return curvature.losses.custom(unit, x @ p, t, event_ndim=1).mean()


def weighted_targets(p, x, t):
    return curvature.losses.softmax_cross_entropy(
        x @ p, jax.nn.one_hot([0, 1, 1, 0, 1], 2) * t
    ).sum()


@pytest.mark.parametrize("loss_fn", [heteroscedastic, indefinite, weighted_targets])
def test_the_gauss_newton_matrix_of_an_indefinite_loss_is_that_of_the_blocks(loss_fn):
    p, x, t = 0.5 * normal(0, 3, 2), normal(1, N, 3), 4 * normal(2, N, 2)
    found = operators.to_dense(operators.gauss_newton(loss_fn, p, [(x, t)]))
    hessian = operators.to_dense(operators.hessian(loss_fn, p, [(x, t)]))
    least = [np.linalg.eigvalsh(m)[0] for m in (found, hessian)]
    assert least[0] > -1e-12 and least[1] < -0.02
    registry = curvature.register(loss_fn, p, x, t).with_blocks("dense")
    estimator = curvature.Estimator(registry, curvature.GaussNewton())
    blocks = jax.jit(estimator)(p, x, t)
    close(jax.vmap(lambda v: ravel_pytree(blocks @ v.reshape(p.shape))[0])(jnp.eye(p.size)), found)


def test_masked_classes_and_units_without_any():
    """A linear model's Gauss-Newton matrix is its Hessian, whatever is masked."""
    mask = jnp.array([[1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 0]], bool)

    def loss_fn(module, p, x, rows):
        loss = getattr(module, SOFTMAX)
        return loss(x @ p, jnp.zeros(len(x), int), where=mask[jnp.array(rows)]).sum()

    p, x = normal(0, 3, 3), normal(1, 4, 3)
    tagged = functools.partial(loss_fn, curvature.losses, rows=(0, 1, 2, 3))
    whole = np.array([0, 1, 3])  # optax's Hessian is not a number for the unit without a class
    flat, plain = pulled(lambda p: loss_fn(optax.losses, p, x[whole], (0, 1, 3)), p)
    close(
        operators.to_dense(operators.gauss_newton(tagged, p, [x])),
        jax.jit(jax.hessian(plain))(flat),
    )


def test_the_pullback_of_a_metric():
    """J' G J with a G of z for a tree-valued f; batches are summed."""

    class Exponential:
        def mvp(self, z, v):
            return v * jnp.exp(z)

        def root(self, z, v):
            return v * jnp.exp(z / 2)

    rho = {"a": Exponential(), "b": metrics.Euclidean(2.0)}

    def f(p, x):
        return {"a": jnp.tanh(x @ p["w"]), "b": p["c"] * x}

    params = {"c": jnp.array(0.3), "w": normal(0, 2, 3)}
    batches = [normal(1, N, 2), normal(2, N, 2)]
    expected = 0.0
    for x in batches:
        flat, g = pulled(lambda p, x=x: ravel_pytree(f(p, x))[0], params)
        z = f(params, x)
        metric = ravel_pytree({"a": jnp.exp(z["a"]), "b": jnp.full_like(z["b"], 2)})[0]
        j = jax.jacrev(g)(flat)
        expected += j.T * metric @ j
    op = operators.pullback(f, rho, params, batches)
    close(operators.to_dense(op), expected)
    halves = operators.pullback(f, rho, params, batches, weights=[0.5, 0.5])
    close(operators.to_dense(halves), expected / 2)


def test_the_pullback_of_a_divergence_is_that_of_its_hessian():
    x, w = normal(0, N, 2), normal(1, 2, 3)
    f = lambda w, x: jnp.tanh(x @ w)  # noqa: E731
    found = operators.pullback(f, lambda z, z0: jnp.sum((z - z0) ** 2) / 2, w, [x])
    expected = operators.pullback(f, metrics.Euclidean(), w, [x])
    close(operators.to_dense(found), operators.to_dense(expected))


# Operators over datasets -------------------------------------------------------------------------


def test_products_by_several_vectors_are_the_stacked_products():
    case, loss_fn, _ = setup("mlp")
    batches = [case.args(3, N), case.args(4, N)]
    vectors = jax.tree.map(lambda p: normal(p.size, 3, *p.shape), case.params)
    key = jax.random.key(0)
    for op in (
        operators.hessian(loss_fn, case.params, batches),
        operators.fisher(loss_fn, case.params, batches, samples=2, key=key),
    ):
        together = op.mm(vectors)
        for i in range(3):
            single = op @ jax.tree.map(lambda v, i=i: v[i], vectors)
            jax.tree.map(lambda t, s, i=i: close(t[i], s, 1e-13), together, single)


def test_operators_are_lineax_operators():
    import lineax as lx

    case, loss_fn, _ = setup("mlp")
    args = case.args(3, N)
    op = operators.gauss_newton(loss_fn, case.params, [args])
    hessian = operators.hessian(loss_fn, case.params, [args])
    assert isinstance(op, lx.AbstractLinearOperator)
    assert lx.is_positive_semidefinite(op) and not lx.is_positive_semidefinite(hessian)
    assert lx.is_symmetric(op) and op.T is op
    v = case.params
    both = (2.0 * op + hessian / 4 - op) @ v
    expected = jax.tree.map(lambda a, b: a + b / 4, op @ v, hessian @ v)
    jax.tree.map(close, both, expected)
    jax.tree.map(
        close,
        (op + lx.IdentityLinearOperator(op.in_structure())).mv(v),
        jax.tree.map(jnp.add, op @ v, v),
    )
    definite = [lx.is_positive_semidefinite(x) for x in (2 * op + op, op + hessian, -op, op - op)]
    assert definite == [True, False, False, False]
    jax.tree.map(close, (op @ hessian).mv(v), op @ (hessian @ v))
    close(op.as_matrix(), brute_force("mlp").gauss_newton)


def test_bfloat16_parameters_and_mixed_trees():
    """Sums are float32; the result has the dtypes of the vector."""
    params = {"w": normal(0, 3, 2).astype(jnp.bfloat16), "c": normal(1, 2).astype(jnp.float32)}
    x = normal(2, N, 3).astype(jnp.bfloat16)

    def loss_fn(p, x):
        z = (x @ p["w"]).astype(jnp.float32) * p["c"]
        return curvature.losses.softmax_cross_entropy(z, jnp.full((2,), 0.5, jnp.float32)).mean()

    op = operators.gauss_newton(loss_fn, params, [x])
    out = op @ params
    assert jax.tree.map(lambda a: a.dtype, out) == jax.tree.map(lambda a: a.dtype, params)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    assert {a.dtype for a in jax.tree.leaves(op @ wide)} == {jnp.dtype(jnp.float32)}
    exact = operators.gauss_newton(
        loss_fn, jax.tree.map(lambda p: p.astype(jnp.float32), params), [x.astype(jnp.float32)]
    )
    expected = operators.to_dense(exact)
    np.testing.assert_allclose(
        operators.to_dense(op), expected, rtol=0, atol=0.05 * np.abs(expected).max()
    )


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "most"), [("gauss_newton", 4), ("empirical", 4), ("sampled", 12)])
def test_a_product_at_a_vocabulary_of_50000_holds_a_few_buffers_of_outputs(kind, most):
    """XLA's own account of temporary memory; a [vocabulary]^2 object would take 10 GB."""
    vocabulary, positions, width = 50_000, 16, 8
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)

    def loss_fn(p, x, y):
        return curvature.losses.softmax_cross_entropy_with_integer_labels(x @ p, y).mean()

    def product(p, v, x, y):
        operator = {
            "gauss_newton": operators.gauss_newton,
            "sampled": functools.partial(operators.fisher, samples=3, key=jax.random.key(0)),
            "empirical": operators.empirical_fisher,
        }[kind]
        return operator(loss_fn, p, [(x, y)]) @ v

    weights = shape((width, vocabulary))
    args = (weights, weights, shape((positions, width)), jax.ShapeDtypeStruct((positions,), int))
    options = {"xla_backend_optimization_level": 2}
    compiled = jax.jit(product).lower(*args).compile(options)
    outputs = 4 * positions * vocabulary
    assert compiled.memory_analysis().temp_size_in_bytes < most * outputs
