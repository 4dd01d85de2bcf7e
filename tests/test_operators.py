"""Exact operators against dense brute force in float64.

A case gives the same loss twice: `tagged(module)` is written as models are (scans, remat, jit,
cond, tied weights); `outputs` and `losses` are plain: all network outputs, and each head's values
with their weights. Dense Jacobians, Hessians and per-example gradients are taken of the plain one.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from jax.flatten_util import ravel_pytree

import curvature
from curvature import metrics, operators

N = 5
SOFTMAX = "softmax_cross_entropy_with_integer_labels"


@dataclasses.dataclass(frozen=True)
class Case:
    params: Any
    args: Callable[[int, int], tuple]  # (seed, number of examples) -> args
    tagged: Callable  # module of losses -> loss_fn(params, *args)
    outputs: Callable  # (params, *args) -> list of z, examples leading
    losses: Callable  # (list of z, *args) -> list of (values, weights), from optax

    def total(self, zs, *args):
        return sum(jnp.sum(values * weights) for values, weights in self.losses(zs, *args))


def mlp():
    """Dense layers; a weighted mean with some weights zero."""
    params = {"w": normal(0, 3, 4), "b": normal(1, 4), "v": normal(2, 4, 3)}

    def outputs(p, x, y, m):
        return [jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]]

    def args(seed, n):
        mask = jnp.where(jnp.arange(n) % 3 != 1, jnp.linspace(0.5, 2, n), 0)
        return normal(seed, n, 3), jnp.arange(n) % 3, mask

    def tagged(module):
        def loss_fn(p, x, y, m):
            return (m * getattr(module, SOFTMAX)(*outputs(p, x, y, m), y)).mean()

        return loss_fn

    def losses(zs, x, y, m):
        return [(getattr(optax.losses, SOFTMAX)(zs[0], y), m / len(m))]

    return Case(params, args, tagged, outputs, losses)


def conv():
    """A convolution with a squared error at every pixel and channel, summed over them."""
    params = {"k": normal(0, 3, 2, 2), "v": normal(1, 2, 1)}

    conv_dims = ("NWC", "WIO", "NWC")

    def outputs(p, x, y):
        h = jax.lax.conv_general_dilated(x, p["k"], (1,), "SAME", dimension_numbers=conv_dims)
        return [jax.nn.sigmoid(h) @ p["v"]]

    def tagged(module):
        def loss_fn(p, x, y):
            values = module.squared_error(*outputs(p, x, y), y)
            return values.sum(axis=(1, 2)).mean() + 0.1 * jnp.sum(p["v"] ** 2), {"aux": values}

        return loss_fn

    def losses(zs, x, y):
        return [(optax.losses.squared_error(zs[0], y), jnp.full((), 1 / len(x)))]

    def args(seed, n):
        return normal(seed, n, 4, 2), normal(seed + 1, n, 4, 1)

    return Case(params, args, tagged, outputs, losses)


def chunked():
    """A recurrent net with its loss in the scan, in remat, in jit; the head is tied."""
    params = {"w": normal(0, 3, 2), "u": normal(1, 2, 2)}
    length = 3

    def step(p, h, x):
        h = jnp.tanh(x @ p["w"] + h @ p["u"])
        return h, h @ p["w"].T

    def outputs(p, x, y):  # [n, t, 3]
        h, zs = jnp.zeros((len(x), 2)), []
        for t in range(length):
            h, z = step(p, h, x[:, t])
            zs.append(z)
        return [jnp.stack(zs, axis=1)]

    def tagged(module):
        def loss_fn(p, x, y):
            @jax.checkpoint
            def one(carry, xs):
                h, total = carry
                x, y = xs
                h, z = step(p, h, x)
                values = jax.jit(lambda z, y: getattr(module, SOFTMAX)(z, y))(z, y)
                return (h, total + values.sum()), None

            start = (jnp.zeros((len(x), 2)), jnp.zeros(()))
            (_, total), _ = jax.lax.scan(one, start, (x.swapaxes(0, 1), y.T))
            return total / len(x)

        return loss_fn

    def losses(zs, x, y):
        return [(getattr(optax.losses, SOFTMAX)(zs[0], y), jnp.full((), 1 / len(x)))]

    def args(seed, n):
        return normal(seed, n, length, 3), jnp.arange(n * length).reshape(n, length) % 3

    return Case(params, args, tagged, outputs, losses)


def heads():
    """Two heads with coefficients, one of them chosen by a cond, behind a shared trunk."""
    params = {"w": normal(0, 2, 3), "a": normal(1, 3, 2), "b": normal(2, 3)}

    def outputs(p, x, y, t, which):
        h = jnp.sin(x @ p["w"])
        return [h @ p["a"], h @ p["b"]]

    def tagged(module):
        def loss_fn(p, x, y, t, which):
            z, s = outputs(p, x, y, t, which)
            first = getattr(module, SOFTMAX)(z, y).mean()
            second = jax.lax.cond(
                which,
                lambda s: module.sigmoid_binary_cross_entropy(s, t).mean(),
                lambda s: module.l2_loss(s[:, None], t[:, None]).sum(),
                s,
            )
            return first + 0.3 * second

        return loss_fn

    def losses(zs, x, y, t, which):
        sigmoid = optax.losses.sigmoid_binary_cross_entropy(zs[1], t)
        second = jnp.where(which, sigmoid, optax.losses.l2_loss(zs[1], t))
        weight = jnp.where(which, 0.3 / len(x), 0.3)
        return [
            (getattr(optax.losses, SOFTMAX)(zs[0], y), jnp.full((), 1 / len(x))),
            (second, weight),
        ]

    def args(seed, n):
        return normal(seed, n, 2), jnp.arange(n) % 2, jnp.linspace(0, 1, n), jnp.array(seed % 2 > 0)

    return Case(params, args, tagged, outputs, losses)


CASES = {"mlp": mlp, "conv": conv, "chunked": chunked, "heads": heads}
AUX = ("conv",)


@functools.cache
def setup(name):
    case = CASES[name]()
    return case, case.tagged(curvature.losses), {"has_aux": name in AUX}


def pulled(function, params):
    """`function` of the flat parameters."""
    flat, unravel = ravel_pytree(params)
    return flat, lambda x: function(unravel(x))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """Brute force: J' H J of the plain total loss, sums over examples, the Hessian of the loss."""

    gauss_newton: Any
    empirical_fisher: Any
    hessian: Any


@functools.cache
def brute_force(name, seed=3, n=N):
    """The dense matrices of a case at `case.args(seed, n)`."""
    case, _, aux = setup(name)
    args = case.args(seed, n)

    def scores(p):
        """For each example, the sum of its units' losses times the root of their weights."""
        rows = 0.0
        for values, weights in case.losses(case.outputs(p, *args), *args):
            weighted = values * jax.lax.stop_gradient(jnp.sqrt(weights))
            rows += weighted.reshape(len(values), -1).sum(1)
        return rows

    def loss(p):
        out = case.tagged(optax.losses)(p, *args)
        return out[0] if aux["has_aux"] else out

    _, unravel = ravel_pytree(case.outputs(case.params, *args))
    flat, outputs = pulled(lambda p: ravel_pytree(case.outputs(p, *args))[0], case.params)
    _, rows = pulled(scores, case.params)
    _, value = pulled(loss, case.params)

    @jax.jit
    def all_of_them(flat):
        j, s = jax.jacrev(outputs)(flat), jax.jacrev(rows)(flat)
        h = jax.hessian(lambda z: case.total(unravel(z), *args))(outputs(flat))
        return Dense(j.T @ h @ j, s.T @ s, jax.hessian(value)(flat))

    return all_of_them(flat)


def close(found, expected, tolerance=1e-10):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# Matrices ----------------------------------------------------------------------------------------


def check(name, batches, expected):
    """Operators against {name: dense matrix}."""
    case, loss_fn, aux = setup(name)
    for matrix, want in expected.items():
        op = getattr(operators, matrix)(loss_fn, case.params, batches, **aux)
        close(operators.to_dense(op), want)


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


def test_weights_of_batches():
    case, loss_fn, _ = setup("mlp")
    batches = [case.args(3, N), case.args(4, N)]
    parts = [brute_force("mlp", seed).gauss_newton for seed in (3, 4)]
    op = operators.gauss_newton(loss_fn, case.params, batches, weights=[1, 0.25])
    close(operators.to_dense(op), parts[0] + 0.25 * parts[1])
    for weights in ([1.0], [1.0, 1.0, 1.0]):
        op = operators.gauss_newton(loss_fn, case.params, batches, weights=weights)
        with pytest.raises(ValueError, match=r"2 batches and \d weights"):
            op @ case.params


def test_batches_whose_size_cannot_be_read_need_weights():
    def loss_fn(w, statistics, x):
        return curvature.losses.l2_loss((x - statistics) @ w, jnp.zeros(len(x))).mean()

    batches = [(jnp.ones(2), normal(0, n, 2)) for n in (4, 4, 3)]
    w = jnp.ones(2)
    close(*(operators.gauss_newton(loss_fn, w, batches[:k]) @ w for k in (2, 2)))
    op = operators.gauss_newton(loss_fn, w, batches)
    with pytest.raises(ValueError, match=r"different leading axes, \[2, 3\].*weights="):
        op @ w
    assert operators.gauss_newton(loss_fn, w, batches, weights=[1, 1, 1]) @ w is not None


class Loader:
    """Makes its batches anew each time, as NumPy arrays, and counts how often."""

    def __init__(self, batches):
        self.batches, self.read = batches, 0

    def __iter__(self):
        for batch in self.batches:
            self.read += 1
            yield tuple(np.asarray(x) for x in batch)


def test_a_loader_is_read_batch_by_batch_and_nothing_is_traced_anew():
    """Other vectors, batches, parameters or operators cost no trace; another shape costs one."""
    case, loss_fn, _ = setup("mlp")
    traces = []

    def counted(p, *args):
        traces.append(args[0].shape)
        return loss_fn(p, *args)

    loader = Loader([case.args(seed, n) for seed, n in ((0, 4), (1, 4), (2, 4), (3, 2))])
    op = operators.gauss_newton(counted, case.params, loader)
    assert loader.read == 1
    op @ case.params
    op @ jax.tree.map(jnp.ones_like, case.params)
    assert loader.read == 1 + 2 * 4
    first = len(traces)
    assert first <= 4
    other = jax.tree.map(lambda p: p + 1, case.params)
    operators.gauss_newton(counted, other, loader) @ case.params
    assert len(traces) == first


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
    both = (2.0 * op + hessian).mv(v)
    expected = jax.tree.map(lambda a, b: 2 * a + b, op @ v, hessian @ v)
    jax.tree.map(close, both, expected)
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


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "batches is empty"),
        ((b for b in [(1,)]), TypeError, "generator, which can be iterated only once"),
        (iter([(1,)]), TypeError, "list_iterator, which can be iterated only once"),
        ({"x": 1}, TypeError, "type dict, expected an iterable of batches"),
        (np.ones((2, 2)), TypeError, "type ndarray, expected an iterable"),
        (3, TypeError, "type int, expected an iterable"),
    ],
    ids=["empty", "generator", "iterator", "dict", "array", "number"],
)
def test_what_is_no_dataset_is_refused(batches, error, message):
    with pytest.raises(error, match=message):
        operators.hessian(lambda p, x: jnp.sum(p), jnp.ones(2), batches)


def test_trees_that_are_not_like_the_parameters_are_refused():
    op = operators.hessian(lambda p, x: jnp.sum(p["a"] ** 2), {"a": jnp.ones(2)}, [jnp.ones(1)])
    with pytest.raises(ValueError, match=r"structure: found \['b'\], expected \['a'\]"):
        op @ {"b": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"\['a'\] has shape \[3\], expected .*\[2\]"):
        op @ {"a": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"leading axes \[\(\)\]. Use mv"):
        op.mm({"a": jnp.ones(())})
    with pytest.raises(ValueError, match=r"\['a'\] has shape \[\], expected"):
        op.mm({"a": jnp.ones(2)})


def test_losses_that_cannot_be_seen_are_refused():
    loss = curvature.losses.l2_loss
    data = [normal(0, N)]

    def untagged(p, x):
        return jnp.mean((x * p) ** 2)

    def hidden(p, x):
        return jax.lax.while_loop(
            lambda c: c[0] < 1, lambda c: (c[0] + 1, loss(x * p).mean()), (0, jnp.zeros(()))
        )[1]

    def chained(p, x):
        first = loss(x * p).mean()
        return loss(x * first).mean()

    def vector(p, x):
        return loss(x * p)

    p = jnp.ones(())
    with pytest.raises(ValueError, match=r"no tagged loss.*optax\.losses"):
        operators.gauss_newton(untagged, p, data)
    with pytest.raises(ValueError, match="tagged inside while at test_operators"):
        operators.gauss_newton(hidden, p, data)
    with pytest.raises(ValueError, match=r"l2_loss at test_operators.*depend on .* another"):
        operators.gauss_newton(chained, p, data)
    with pytest.raises(TypeError, match="expected a scalar"):
        operators.gauss_newton(vector, p, data)


def test_heads_with_different_numbers_of_examples_have_no_empirical_fisher():
    def loss_fn(p, x):
        loss = curvature.losses.l2_loss
        return loss(x * p).mean() + loss(x[:2] * p).mean()

    with pytest.raises(ValueError, match=r"have \[2, 5\] examples"):
        operators.empirical_fisher(loss_fn, jnp.ones(()), [normal(0, N)])


def test_settings_that_make_no_sense_are_refused(key):
    case, loss_fn, _ = setup("mlp")
    data = [case.args(3, N)]
    with pytest.raises(ValueError, match="samples is 0"):
        operators.fisher(loss_fn, case.params, data, samples=0, key=key)
    with pytest.raises(ValueError, match="need a random key"):
        operators.fisher(loss_fn, case.params, data, samples=1)
    op = operators.gauss_newton(loss_fn, case.params, data)
    with pytest.raises(ValueError, match="at least 2"):
        operators.trace(op, key, 1)
    with pytest.raises(ValueError, match="k is 0"):
        operators.top_eigenpairs(op, 0, key)
    with pytest.raises(ValueError, match="k is 100"):
        operators.top_eigenpairs(op, 100, key)
    with pytest.raises(ValueError, match="samples=1"):
        operators.spectral_density(op, key, samples=1)


# Estimates and solves ----------------------------------------------------------------------------


@functools.cache
def spectrum():
    """The Gauss-Newton operator of the dense net over two batches, and its dense matrix."""
    case, loss_fn, _ = setup("mlp")
    batches = [case.args(3, 30), case.args(4, 30)]
    op = operators.gauss_newton(loss_fn, case.params, batches)
    return op, np.asarray(operators.to_dense(op)), case


def test_the_stated_error_of_the_trace_covers_the_truth():
    op, matrix, _ = spectrum()
    hits, errors = 0, []
    for seed in range(8):
        estimate, error = operators.trace(op, jax.random.key(seed), samples=20, at_once=10)
        hits += abs(float(estimate) - np.trace(matrix)) < 2 * float(error)
        errors.append(error)
    assert hits >= 6
    # The variance of Hutchinson's estimator with signs is twice the squares off the diagonal.
    off = matrix - np.diag(np.diag(matrix))
    expected = np.sqrt(2 * np.sum(off**2) / 20)
    assert 0.7 * expected < np.mean(errors) < 1.4 * expected


def test_the_stated_error_of_the_diagonal_covers_the_truth(key):
    op, matrix, _ = spectrum()
    estimate, error = (
        ravel_pytree(tree)[0] for tree in operators.diagonal(op, key, samples=200, at_once=10)
    )
    deviation = np.abs(estimate - np.diag(matrix))
    assert np.mean(deviation < 2 * error) > 0.85
    assert np.all(error < 0.3 * np.abs(matrix).max())


def test_groups_do_not_change_the_pooled_error(key):
    """Mean and error of groups pooled: of a diagonal matrix, exact with no error."""
    params = normal(0, 7)
    op = operators.hessian(lambda p, x: jnp.sum(p**4) * x.mean(), params, [jnp.ones(1)])
    for at_once in (1, 3, 10):
        estimate, error = operators.trace(op, key, samples=10, at_once=at_once)
        np.testing.assert_allclose(estimate, 12 * jnp.sum(params**2), rtol=1e-13)
        assert error < 1e-13 * estimate


def test_eigenpairs_equal_the_dense_ones(key):
    op, matrix, _ = spectrum()
    values, vectors = np.linalg.eigh(matrix)
    found = operators.top_eigenpairs(op, 4, key, products=len(matrix))
    np.testing.assert_allclose(found.values, values[::-1][:4], rtol=1e-6)
    flat = jax.vmap(lambda t: ravel_pytree(t)[0])(found.vectors)
    overlap = np.abs(np.sum(flat * vectors[:, ::-1][:, :4].T, axis=1))
    np.testing.assert_allclose(overlap, 1, rtol=1e-6)
    assert np.all(found.residuals < 1e-6)


def test_residuals_of_few_products_are_those_of_the_matrix(key):
    op, matrix, _ = spectrum()
    found = operators.top_eigenpairs(op, 2, key, products=5)
    flat = jax.vmap(lambda t: ravel_pytree(t)[0])(found.vectors)
    residuals = np.linalg.norm(flat @ matrix - found.values[:, None] * flat, axis=1)
    np.testing.assert_allclose(found.residuals, residuals, rtol=1e-6)
    assert residuals[1] > 1e-4  # a control: not converged


def test_lanczos_ends_where_the_krylov_space_does(key):
    """Multiples of the identity and the zero matrix: one eigenpair, no division by zero."""
    for scale in (0.0, 2.0):
        op = operators.hessian(
            lambda p, x, s=scale: s / 2 * jnp.sum(p**2), jnp.ones(6), [jnp.ones(1)]
        )
        found = operators.top_eigenpairs(op, 3, key)
        np.testing.assert_allclose(found.values, scale, atol=1e-12)
        assert len(found.values) >= 1
        mean, _ = operators.spectral_density(op, key, samples=2).expectation(lambda x: x)
        np.testing.assert_allclose(mean, scale, atol=1e-12)


def test_the_spectral_density(key):
    """Its mass is one; its mean, and that of the square, are those of the eigenvalues."""
    op, matrix, _ = spectrum()
    values = np.linalg.eigvalsh(matrix)
    density = operators.spectral_density(op, key, samples=20, products=12)
    np.testing.assert_allclose(density.weights.sum(axis=1), 1, rtol=1e-12)
    for function in (lambda x: x, lambda x: x**2, lambda x: jnp.log(x + 0.1)):
        mean, error = density.expectation(function)
        assert abs(mean - function(values).mean()) < 3 * error
    width = 0.02 * values[-1]
    grid = np.linspace(-8 * width, values[-1] + 8 * width, 2000)
    found = density(grid, width)
    assert found.shape == grid.shape
    np.testing.assert_allclose(np.sum(found) * (grid[1] - grid[0]), 1, rtol=1e-6)
    # As a distribution it is near the true one, in units of the largest eigenvalue.
    true = np.mean([np.exp(-(((grid - v) / width) ** 2) / 2) for v in values], axis=0)
    true /= true.sum()
    distance = np.abs(np.cumsum(found / found.sum()) - np.cumsum(true)).mean()
    assert distance < 0.05


def test_damped_solves_and_preconditioning():
    """The solution of the dense system; the blockwise estimate makes it need fewer iterations."""
    params = {"w": 0.3 * normal(0, 8, 3), "v": normal(1, 3, 1)}
    args = normal(2, 100, 8) * jnp.logspace(-1, 1, 8), normal(3, 100, 1)  # badly conditioned

    def loss_fn(p, x, y):
        return curvature.losses.l2_loss(jnp.tanh(x @ p["w"]) @ p["v"], y).sum(-1).mean()

    op = operators.gauss_newton(loss_fn, params, [args])
    v = jax.tree.map(lambda p: normal(p.size, *p.shape), params)
    damping = 1e-3
    matrix = operators.to_dense(op) + damping * jnp.eye(27)
    expected = np.linalg.solve(matrix, ravel_pytree(v)[0])
    registry = curvature.register(loss_fn, params, *args)
    block = jax.jit(curvature.Estimator(registry, curvature.GaussNewton()))(params, *args)
    preconditioners = (None, block.damped_inverse(damping), lambda v: block.solve(v, damping))
    steps = []
    for preconditioner in preconditioners:
        found = operators.solve(op, v, damping, preconditioner=preconditioner, tolerance=1e-9)
        close(ravel_pytree(found.value)[0], expected, 1e-8)
        steps.append(int(found.stats["num_steps"]))
    assert max(steps[1:]) < 0.8 * steps[0], steps

    zero = operators.solve(op, jax.tree.map(jnp.zeros_like, v), damping)
    assert not np.any(ravel_pytree(zero.value)[0])


def test_a_solve_that_fails_says_so():
    op = operators.hessian(lambda p, x: p[0] ** 2 - p[1] ** 2, jnp.ones(2), [jnp.ones(1)])
    with pytest.raises(RuntimeError, match="positive definite"):
        operators.solve(op, jnp.ones(2))
    operator, _, case = spectrum()
    with pytest.raises(RuntimeError, match="after 2 iterations"):
        operators.solve(operator, case.params, 1e-3, max_steps=2)
    partial = operators.solve(operator, case.params, 1e-3, max_steps=2, throw=False)
    assert int(partial.stats["num_steps"]) == 2


# Memory ------------------------------------------------------------------------------------------


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
