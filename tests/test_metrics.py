"""Output metrics and pullback products against dense Jacobians and Hessians in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import curvature

L, M = curvature.losses, curvature.metrics


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def close(actual, expected, atol=1e-10):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), actual, expected)


def simplex_kl(z, other):
    """KL(p_other || p_z), written out."""
    p, q = jax.nn.softmax(other), jax.nn.softmax(z)
    return jnp.sum(p * (jnp.log(p) - jnp.log(q)))


def log_partition(z):
    return jax.nn.logsumexp(z)


Z = normal(4, 3)
LABELS = jnp.array([0, 2, 1, 1])
WEIGHTS = jnp.array([0.5, 0.0, 2.0, 1.0])


def softmax_metric(z):
    q = jax.nn.softmax(z)
    return jnp.diag(q) - jnp.outer(q, q)


# name -> (metric, dense matrix of one unit's z)
METRICS = {
    "euclidean": (M.Euclidean(), lambda z: jnp.eye(3)),
    "euclidean, scaled": (M.Euclidean(2.5), lambda z: 2.5 * jnp.eye(3)),
    "fisher": (M.FisherMetric(L.Categorical()), softmax_metric),
    "hessian": (M.HessianMetric(L.Categorical(), (LABELS,)), softmax_metric),
    "bregman, log-partition": (M.Bregman(log_partition), softmax_metric),
    "bregman, negative entropy": (
        M.Bregman(lambda z: jnp.sum(jnp.exp(z) * z)),
        lambda z: jnp.diag(jnp.exp(z) * (z + 2)),
    ),
    "bregman, elementwise": (M.Bregman(jnp.exp, event_ndim=0), lambda z: jnp.diag(jnp.exp(z))),
    "divergence": (M.Divergence(simplex_kl), softmax_metric),
    "divergence, not a bregman one": (
        M.Divergence(lambda z, y: jnp.sum((jnp.exp(z) - jnp.exp(y)) ** 2) / 2),
        lambda z: jnp.diag(jnp.exp(2 * z)),
    ),
}


def dense_metric(name, z=Z):
    """G_z of all of z, [z.size, z.size]: block-diagonal over the leading axis."""
    return jax.scipy.linalg.block_diag(*map(METRICS[name][1], z))


def matrix(product, z):
    basis = jnp.eye(z.size).reshape(z.size, *z.shape)
    return jax.jit(jax.vmap(product))(basis).reshape(z.size, z.size).T


@pytest.mark.parametrize("name", METRICS)
def test_mvp_is_the_dense_metric(name):
    metric, _ = METRICS[name]
    assert isinstance(metric, M.Metric)
    close(matrix(lambda v: metric.mvp(Z, v), Z), dense_metric(name))


@pytest.mark.parametrize("name", [n for n in METRICS if n != "bregman, negative entropy"])
def test_root_times_its_transpose_is_the_metric(name):
    metric, _ = METRICS[name]
    s = matrix(lambda v: metric.root(Z, v), Z)
    close(s @ s.T, dense_metric(name))


@pytest.mark.parametrize("which", [M.FisherMetric, M.HessianMetric])
def test_weights_scale_the_units(which):
    metric = which(L.Categorical(), (LABELS,), WEIGHTS)
    expected = jax.scipy.linalg.block_diag(
        *(w * softmax_metric(z) for w, z in zip(WEIGHTS, Z, strict=True))
    )
    s = matrix(lambda v: metric.root(Z, v), Z)
    close(matrix(lambda v: metric.mvp(Z, v), Z), expected)
    close(s @ s.T, expected)


def test_fisher_and_hessian_metrics_differ_where_the_family_says():
    z, t = normal(5), jnp.exp(normal(5, seed=1))
    close(M.FisherMetric(L.Exponential(), (t,)).mvp(z, jnp.ones(5)), jnp.ones(5))
    close(M.HessianMetric(L.Exponential(), (t,)).mvp(z, jnp.ones(5)), t * jnp.exp(z))


# Divergences --------------------------------------------------------------------------------------


def test_the_bregman_divergence_of_the_log_partition_function_is_the_kl_divergence():
    """D_A(z, z') = KL(p_z' || p_z): the arguments change places."""
    z, other = normal(6, 4), normal(6, 4, seed=1)
    p, q = jax.nn.softmax(other), jax.nn.softmax(z)
    expected = jnp.sum(p * jnp.log(p / q), -1)
    bregman = M.Bregman(log_partition)
    close(bregman(z, other), expected, 1e-14)
    close(M.kl(log_partition, other, z), expected, 1e-14)
    assert float(jnp.abs(bregman(other, z) - expected).max()) > 0.05
    close(optax.losses.kl_divergence(jnp.log(q), p), expected, 1e-6)


def test_kl_of_poisson_and_bernoulli_variables():
    a, b = normal(7), normal(7, seed=1)
    poisson = jnp.exp(a) * (a - b) - jnp.exp(a) + jnp.exp(b)
    close(M.kl(jnp.exp, a, b, event_ndim=0), poisson, 1e-13)
    p, q = jax.nn.sigmoid(a), jax.nn.sigmoid(b)
    bernoulli = p * jnp.log(p / q) + (1 - p) * jnp.log((1 - p) / (1 - q))
    close(M.kl(jax.nn.softplus, a, b, event_ndim=0), bernoulli, 1e-13)


def test_a_bregman_divergence_of_half_the_square_is_half_the_squared_distance():
    z, other = normal(6, 4), normal(6, 4, seed=1)
    bregman = M.Bregman(lambda z: z @ z / 2)
    close(bregman(z, other), ((z - other) ** 2).sum(-1) / 2, 1e-14)
    close(bregman(z, z), jnp.zeros(6), 0)


def test_the_metric_is_the_second_order_expansion_of_the_divergence():
    """rho(z + e v, z) = e^2/2 v' G v + O(e^3): the error falls by 8 where e is halved."""
    z, v = normal(3), normal(3, seed=1)
    divergence = M.Divergence(simplex_kl)
    quadratic = v @ divergence.mvp(z, v) / 2
    errors = [float(abs(divergence(z + e * v, z) - e**2 * quadratic)) for e in (0.02, 0.01)]
    assert 7 < errors[0] / errors[1] < 9


def test_a_concave_divergence_has_a_root_of_its_positive_part():
    metric = M.Divergence(lambda z, y: (z[0] - y[0]) ** 2 - (z[1] - y[1]) ** 2)
    s = matrix(lambda v: metric.root(jnp.zeros(2), v), jnp.zeros(2))
    close(s @ s.T, jnp.diag(jnp.array([2.0, 0.0])))


# Pulling back and pushing forward -----------------------------------------------------------------

X = normal(4, 2, seed=2)
W = {"b": normal(3, seed=4), "w": normal(2, 3, seed=3)}
V = {"b": normal(3, seed=6), "w": normal(2, 3, seed=5)}
FLAT_W, UNRAVEL = ravel_pytree(W)
FLAT_V = ravel_pytree(V)[0]


def f(w):
    return jnp.tanh(X @ w["w"]) + w["b"]


JACOBIAN = jax.jit(jax.jacobian(lambda flat: f(UNRAVEL(flat)).reshape(-1)))(FLAT_W)


def test_pushforward_and_pullback_are_the_jacobian_and_its_transpose():
    covector = normal(4, 3, seed=7)
    close(M.pushforward(f, W, V), (JACOBIAN @ FLAT_V).reshape(4, 3))
    close(M.pullback(f, W, covector), UNRAVEL(JACOBIAN.T @ covector.reshape(-1)))


@pytest.mark.parametrize("name", METRICS)
def test_pullback_mvp_is_the_dense_pullback(name):
    metric, _ = METRICS[name]
    g = JACOBIAN.T @ dense_metric(name, f(W)) @ JACOBIAN
    close(jax.jit(lambda v: M.pullback_mvp(f, metric, W, v))(V), UNRAVEL(g @ FLAT_V))


def test_pullback_mvp_of_a_divergence_between_whole_outputs():
    def rho(z, y):
        return jax.vmap(simplex_kl)(z, y).mean()

    g = JACOBIAN.T @ dense_metric("fisher", f(W)) @ JACOBIAN / 4
    close(M.pullback_mvp(f, rho, W, V), UNRAVEL(g @ FLAT_V))
    close(M.pullback_metric(f, rho, W), g)


def test_the_pullback_metric_is_the_dense_matrix():
    metric, _ = METRICS["hessian"]
    close(M.pullback_metric(f, metric, W), JACOBIAN.T @ dense_metric("hessian", f(W)) @ JACOBIAN)


def mean_loss(z):
    return optax.losses.softmax_cross_entropy_with_integer_labels(z, LABELS).mean()


def test_gauss_newton_and_hessian_products():
    gauss_newton = JACOBIAN.T @ dense_metric("hessian", f(W)) @ JACOBIAN / 4
    hessian = jax.hessian(lambda flat: mean_loss(f(UNRAVEL(flat))))(FLAT_W)
    weighted = M.HessianMetric(L.Categorical(), (LABELS,), jnp.full(4, 0.25))
    for loss in (mean_loss, weighted):
        close(M.gauss_newton_mvp(f, loss, W, V), UNRAVEL(gauss_newton @ FLAT_V))
    close(M.hessian_mvp(lambda w: mean_loss(f(w)), W, V), UNRAVEL(hessian @ FLAT_V))
    assert float(jnp.abs((hessian - gauss_newton) @ FLAT_V).max()) > 1e-2


def test_outputs_that_are_trees_take_one_metric_each_or_one_for_all():
    def heads(w):
        return {"class": f(w), "value": (X @ w["w"]).sum(-1), "constant": jnp.ones(2)}

    metrics = {
        "class": M.HessianMetric(L.Categorical(), (LABELS,)),
        "value": M.Euclidean(0.5),
        "constant": M.Euclidean(),
    }
    value = jax.jacobian(lambda flat: heads(UNRAVEL(flat))["value"])(FLAT_W)
    g = JACOBIAN.T @ dense_metric("hessian", f(W)) @ JACOBIAN + 0.5 * value.T @ value
    close(M.pullback_mvp(heads, metrics, W, V), UNRAVEL(g @ FLAT_V))
    one = JACOBIAN.T @ JACOBIAN + value.T @ value
    close(M.pullback_mvp(heads, M.Euclidean(), W, V), UNRAVEL(one @ FLAT_V))

    def rho(z, y):
        return sum(((z[k] - y[k]) ** 2).sum() / 2 for k in z)

    close(M.pullback_mvp(heads, rho, W, V), UNRAVEL(one @ FLAT_V))
    assert M.pullback_metric(heads, M.Euclidean(), W).shape == (9, 9)


BAD = {
    "a negative scale": (lambda: M.Euclidean(-1.0), ValueError, "scale is -1.0, expected"),
    "too few axes": (lambda: M.Bregman(log_partition).mvp(jnp.ones(()), jnp.ones(())), ValueError,
                     r"z has shape \(\), expected at least 1"),
    "weights of another shape": (
        lambda: M.FisherMetric(L.Categorical(), (), jnp.ones(3)).mvp(Z, Z), ValueError,
        r"weights have shape \(3,\), expected \(4,\)"),
    "neither metric nor function": (lambda: M.pullback_mvp(f, 3.0, W, V), TypeError,
                                    "float.*expected a metric.*or a function"),
    "a kind's metric": (lambda: curvature.GaussNewton(metric=3.0), TypeError,
                        "metric is 3.0, expected.*root"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs_raise_and_name_what_was_found(name):
    call, exception, words = BAD[name]
    with pytest.raises(exception, match=f"(?s){words}"):
        call()


# Estimators ---------------------------------------------------------------------------------------


def blocks(loss_fn, kind, params, *args, key=None, block="dense"):
    """Every layer's dense matrix, by the parameter it belongs to."""
    registry = curvature.register(loss_fn, params, *args).override("*", block=block)

    @jax.jit
    def dense(key):
        operator = curvature.Estimator(registry, kind)(params, *args, key=key)
        return {n: b.to_dense() for n, b in operator.blocks.items()}

    found = dense(key)
    return {layer.parameters[0]: found[layer.name] for layer in registry.layers}


def net(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


NET = {"first": normal(2, 3, seed=8), "second": normal(3, 3, seed=9)}


def brute_force(function, metric, params):
    """Blocks of J' G J, G a dense matrix on the flat output."""
    out = {}
    for name in params:
        flat, unravel = ravel_pytree(params[name])
        j = jax.jacobian(lambda w: function({**params, name: unravel(w)}).reshape(-1))(flat)  # noqa: B023
        out[f"['{name}']"] = j.T @ metric @ j
    return out


def test_an_estimator_takes_any_metric():
    """The metric replaces the loss's Hessian; the weights of the units, 1/4, stay."""

    def loss_fn(params, x, y):
        return L.softmax_cross_entropy_with_integer_labels(net(params, x), y).mean()

    for metric in (M.Euclidean(2.0), M.Divergence(simplex_kl), M.FisherMetric(L.Categorical())):
        kind = curvature.GaussNewton(metric=metric)
        z = net(NET, X)
        dense = matrix(lambda v, m=metric, z=z: m.mvp(z, v), z) / 4
        close(blocks(loss_fn, kind, NET, X, LABELS), brute_force(lambda p: net(p, X), dense, NET))


def test_kronecker_blocks_of_a_deep_linear_net_under_the_euclidean_metric():
    def loss_fn(params, x, y):
        z = x @ params["first"] @ params["second"]
        return L.softmax_cross_entropy_with_integer_labels(z, y).sum()

    actual = blocks(
        loss_fn, curvature.GaussNewton(metric=M.Euclidean()), NET, X, LABELS, block="kronecker"
    )
    expected = brute_force(lambda p: X @ p["first"] @ p["second"], jnp.eye(12), NET)
    close(actual, expected)


def test_probes_of_a_metric_are_unbiased(key):
    def loss_fn(params, x, y):
        return L.l2_loss(net(params, x), y).sum()

    metric, y = M.Bregman(log_partition), jnp.zeros((4, 3))
    exact = blocks(loss_fn, curvature.GaussNewton(metric=metric), NET, X, y)
    probes = curvature.GaussNewton(metric=metric, probes=512)
    probed = blocks(loss_fn, probes, NET, X, y, key=key)
    for name, dense in exact.items():
        assert 0 < float(jnp.linalg.norm(probed[name] - dense) / jnp.linalg.norm(dense)) < 0.2


KEPT = jnp.array([1.0, 0.0, 1.0, 1.0])
REDUCTIONS = {
    "masked sum": (lambda loss: jnp.where(KEPT > 0, loss, 0).sum(), KEPT),
    "mean": (lambda loss: loss.mean(), jnp.full(4, 0.25)),
    "masked mean": (lambda loss: (KEPT * loss).sum() / KEPT.sum(), KEPT / 3),
    "weighted mean": (lambda loss: jnp.average(loss, weights=WEIGHTS), WEIGHTS / WEIGHTS.sum()),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_give_the_gauss_newton_matrix_of_the_total_loss(name):
    """An ignored label may be any number: its unit has weight zero."""
    reduce, weights = REDUCTIONS[name]
    ignored = jnp.where(weights > 0, LABELS, -100)

    def loss_fn(params, x, y):
        return reduce(L.softmax_cross_entropy_with_integer_labels(net(params, x), y))

    dense = jax.scipy.linalg.block_diag(
        *(w * softmax_metric(z) for w, z in zip(weights, net(NET, X), strict=True))
    )
    expected = brute_force(lambda p: net(p, X), dense, NET)
    for kind in (curvature.GaussNewton(), curvature.Fisher(samples=None)):
        close(blocks(loss_fn, kind, NET, X, ignored), expected)
    metric = M.HessianMetric(L.Categorical(), (LABELS,), weights)
    whole = M.pullback_metric(lambda p: net(p, X), metric, NET)
    close({"['first']": whole[:6, :6], "['second']": whole[6:, 6:]}, expected)


def test_two_heads_with_coefficients_give_the_gauss_newton_matrix_of_the_total_loss():
    params = {**NET, "value": normal(3, 2, seed=10)}
    times = jnp.exp(normal(4, 2, seed=11))

    def heads(params):
        h = jnp.tanh(X @ params["first"])
        return h @ params["second"], h @ params["value"]

    def loss_fn(params, x, y):
        h = jnp.tanh(x @ params["first"])
        classes = L.softmax_cross_entropy_with_integer_labels(h @ params["second"], y)
        return 0.7 * classes.mean() + 0.3 * L.exponential_nll(h @ params["value"], times).sum()

    logits, log_rates = heads(params)
    classes = jax.scipy.linalg.block_diag(*map(softmax_metric, logits)) * 0.7 / 4
    hessian, fisher = times * jnp.exp(log_rates), jnp.ones_like(times)
    for kind, second in ((curvature.GaussNewton(), hessian), (curvature.Fisher(None), fisher)):
        dense = jax.scipy.linalg.block_diag(classes, jnp.diag(0.3 * second.reshape(-1)))
        expected = brute_force(
            lambda p: jnp.concatenate([z.reshape(-1) for z in heads(p)]), dense, params
        )
        close(blocks(loss_fn, kind, params, X, LABELS), expected)


def test_a_predicted_variance_has_the_fisher_as_its_gauss_newton_matrix():
    def outputs(params, x):
        z = net(params, x)
        return z[:, :1], z[:, 1:2]

    def loss_fn(params, x, y):
        return L.heteroscedastic_gaussian_nll(*outputs(params, x), y).mean()

    def flat(params):
        return jnp.concatenate(outputs(params, X))

    precision = jnp.exp(-outputs(NET, X)[1][:, 0])
    fisher = jnp.diag(jnp.concatenate([precision, jnp.full(4, 0.5)])) / 4
    expected = brute_force(lambda p: flat(p).reshape(-1), fisher, NET)
    for kind in (curvature.GaussNewton(), curvature.Fisher(samples=None)):
        close(blocks(loss_fn, kind, NET, X, normal(4, 1, seed=12)), expected)


# Memory -------------------------------------------------------------------------------------------


def test_a_product_at_a_large_vocabulary_holds_a_few_arrays_of_positions_by_vocabulary():
    """Two by XLA's own account of its temporaries; a dense H_z as the control."""
    positions, d, vocabulary = 16, 8, 50_000
    x = jax.ShapeDtypeStruct((positions, d), jnp.float32)
    w = jax.ShapeDtypeStruct((d, vocabulary), jnp.float32)
    labels = jax.ShapeDtypeStruct((positions,), jnp.int32)
    logits = positions * vocabulary * 4

    def temporaries(function):
        compiled = jax.jit(function).lower(x, w, w, labels).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def analytic(x, w, v, labels):
        metric = M.HessianMetric(L.Categorical(), (labels,))
        return M.gauss_newton_mvp(lambda w: x @ w, metric, w, v)

    def automatic(x, w, v, labels):
        def loss(z):
            return L.softmax_cross_entropy_with_integer_labels(z, labels).sum()

        return M.gauss_newton_mvp(lambda w: x @ w, loss, w, v)

    def dense(x, w, v, labels):
        h = jax.vmap(lambda z: jnp.diag(jax.nn.softmax(z)) - jnp.outer(z, z))(x @ w)
        return x.T @ jnp.einsum("nij,nj->ni", h, x @ v)

    assert temporaries(analytic) < 3 * logits
    assert temporaries(automatic) < 3 * logits
    assert temporaries(dense) > vocabulary * logits / 2
