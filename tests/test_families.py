"""Every family of output losses against dense matrices and densities it shares no code with.

Values come from optax and from `jax.scipy.stats`; H_z is the Hessian of those by automatic
differentiation; F_z is the exact expectation of the scores' outer products over the family's
targets, by enumeration or quadrature.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from jax.scipy import stats

import curvature
from curvature.losses import Custom

L = curvature.losses
KNOWN = 0.5 * np.log(2 * np.pi)  # what the Gaussian losses leave out


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def uniform(*shape, low=0.2, high=2.0, seed=1):
    return np.random.default_rng(seed).uniform(low, high, shape)


def labels(*shape, classes, seed=1):
    return np.random.default_rng(seed).integers(0, classes, shape, dtype=np.int32)


def mask(*shape, empty=None):
    """A mask that leaves out about a third; class 0 always counts, but in the unit `empty`."""
    kept = np.random.default_rng(2).uniform(size=shape) > 0.35
    kept[..., 0] = True
    if empty is not None:
        kept[empty] = False
    assert not kept.all()
    return kept


@dataclasses.dataclass
class Case:
    """One family at one output.

    call: the public function, of z in the family's own layout and the targets.
    nll: the loss of one unit, from elsewhere.
    draws: all targets (or the nodes of a quadrature) of one unit and their probabilities.
    """

    call: Callable
    nll: Callable
    draws: Callable | None
    z: np.ndarray
    targets: tuple


# Enumeration and quadrature ---------------------------------------------------------------------


def classes(z, target, where=None):
    """All classes that count. A target of mass m is m draws, so the probabilities sum to m."""
    where = np.ones(len(z), bool) if where is None else where
    kept = np.flatnonzero(where)
    probabilities, which = np.zeros(len(z)), np.zeros(len(z), np.int32)  # padded: compiled once
    if len(kept):
        probabilities[: len(kept)] = scipy.special.softmax(z[kept])
        which[: len(kept)] = kept
    if target.ndim == 0:
        return which, probabilities
    return np.eye(len(z))[which], np.where(where, target, 0).sum() * probabilities


def coin(z, target):
    q = scipy.special.expit(z)
    return np.array([0.0, 1.0]), np.array([1 - q, q])


def gauss(variance):
    nodes, weights = scipy.special.roots_hermite(20)
    weights = weights / np.sqrt(np.pi)

    def draws(z, *targets):
        mean = z if z.ndim == 0 else z[0]
        return mean + np.sqrt(2 * variance(z, *targets)) * nodes, weights

    return draws


def counts(z, target):
    t = np.arange(200.0)
    return t, np.exp(t * z - np.exp(z) - scipy.special.gammaln(t + 1))


def times(z, target, shape=1.0):
    nodes, weights = scipy.special.roots_genlaguerre(20, shape - 1)
    return nodes * np.exp(-z), weights / scipy.special.gamma(shape)


def two_sided(z, target):
    nodes, weights = scipy.special.roots_laguerre(20)
    return z + np.concatenate([nodes, -nodes]), np.concatenate([weights, weights]) / 2


def huber_draws(z, target, delta):
    core, core_weights = np.polynomial.legendre.leggauss(60)
    core, core_weights = delta * core, delta * core_weights * np.exp(-((delta * core) ** 2) / 2)
    tail, tail_weights = scipy.special.roots_laguerre(20)
    tail, tail_weights = delta + tail / delta, np.exp(-(delta**2) / 2) * tail_weights / delta
    weights = np.concatenate([core_weights, tail_weights, tail_weights])
    return z + np.concatenate([core, tail, -tail]), weights / weights.sum()


# The table ----------------------------------------------------------------------------------------


def integer(z, target, *where):
    kwargs = {"where": where[0]} if where else {}
    return optax.losses.softmax_cross_entropy_with_integer_labels(z, target, **kwargs)


def soft(z, target, *where):
    kwargs = {"where": where[0]} if where else {}
    return optax.losses.softmax_cross_entropy(z, target, **kwargs)


def call_integer(z, target, where=None):
    return L.softmax_cross_entropy_with_integer_labels(z, target, where=where)


def call_soft(z, target, where=None):
    return L.softmax_cross_entropy(z, target, where=where)


def gaussian(z, t, variance):
    return -stats.norm.logpdf(t, z, jnp.sqrt(variance)) - KNOWN


def heteroscedastic(z, t):
    return -stats.norm.logpdf(t, z[0], jnp.exp(z[1] / 2)) - KNOWN


def poisson(z, t):
    return -stats.poisson.logpmf(t, jnp.exp(z)) - jax.scipy.special.gammaln(t + 1)


def gamma(z, t, k):
    left_out = (1 - k) * jnp.log(t) + jax.scipy.special.gammaln(k)
    return -stats.gamma.logpdf(t, k, scale=jnp.exp(-z)) - left_out


def user_softmax(z, t):
    return jax.nn.logsumexp(z) - z @ t


def user_sampler(key, z, t):
    return jax.nn.one_hot(jax.random.categorical(key, z), len(z), dtype=z.dtype)


def saddle(z, t):
    return jnp.sum(t * z**2) + z[0] * z[1] ** 2


def von_mises(z, t, strength):
    return strength * (1 - jnp.cos(z - t))


SMOOTH = np.asarray(optax.smooth_labels(np.eye(5)[labels(4, classes=5)], 0.1))

CASES = {
    "integer": Case(call_integer, integer, classes, 2 * normal(4, 5), (labels(4, classes=5),)),
    "integer, two unit axes": Case(
        call_integer, integer, classes, 2 * normal(2, 3, 4), (labels(2, 3, classes=4),)
    ),
    "integer, mask": Case(
        call_integer, integer, classes, 2 * normal(4, 5), (np.zeros(4, np.int32), mask(4, 5))
    ),
    "integer, empty unit": Case(
        call_integer, integer, classes, normal(4, 5), (np.zeros(4, np.int32), mask(4, 5, empty=2))
    ),
    "soft": Case(call_soft, soft, classes, 2 * normal(4, 5), (uniform(4, 5),)),
    "soft, smoothed labels": Case(call_soft, soft, classes, 2 * normal(4, 5), (SMOOTH,)),
    "soft, mask": Case(
        call_soft, soft, classes, normal(4, 5), (uniform(4, 5) * mask(4, 5), mask(4, 5))
    ),
    "soft, labels on masked classes": Case(
        call_soft, soft, classes, normal(4, 5), (uniform(4, 5), mask(4, 5))
    ),
    "soft, empty unit": Case(
        call_soft, soft, classes, normal(4, 5), (uniform(4, 5), mask(4, 5, empty=2))
    ),
    "sigmoid": Case(
        L.sigmoid_binary_cross_entropy,
        optax.losses.sigmoid_binary_cross_entropy,
        coin,
        2 * normal(4, 3),
        (uniform(4, 3, low=0, high=1),),
    ),
    "l2": Case(
        L.l2_loss,
        optax.losses.l2_loss,
        gauss(lambda z, t: 1.0),
        normal(4, 3),
        (normal(4, 3, seed=1),),
    ),
    "squared": Case(
        L.squared_error,
        optax.losses.squared_error,
        gauss(lambda z, t: 0.5),
        normal(4, 3),
        (normal(4, 3, seed=1),),
    ),
    "gaussian": Case(
        lambda z, t, v: L.gaussian_nll(z, t, variance=v),
        gaussian,
        gauss(lambda z, t, v: v),
        normal(4, 3),
        (normal(4, 3, seed=1), uniform(4, 3)),
    ),
    "heteroscedastic": Case(
        lambda z, t: L.heteroscedastic_gaussian_nll(z[..., 0], z[..., 1], t),
        heteroscedastic,
        gauss(lambda z, t: np.exp(z[1])),
        normal(4, 3, 2),
        (normal(4, 3, seed=1),),
    ),
    "poisson": Case(
        L.poisson_nll, poisson, counts, normal(4, 3), (np.floor(uniform(4, 3, high=5)),)
    ),
    "exponential": Case(
        L.exponential_nll,
        lambda z, t: -stats.expon.logpdf(t, scale=jnp.exp(-z)),
        times,
        normal(4, 3),
        (uniform(4, 3),),
    ),
    "gamma": Case(
        lambda z, t, k: L.gamma_nll(z, t, shape=k),
        gamma,
        times,
        normal(4, 3),
        (uniform(4, 3), uniform(4, 3, low=0.5, high=4.0, seed=2)),
    ),
    "laplace": Case(
        L.absolute_error,
        lambda z, t: -stats.laplace.logpdf(t, z) - np.log(2),
        two_sided,
        normal(4, 3),
        (normal(4, 3, seed=1),),
    ),
    "huber": Case(
        lambda z, t, d: L.huber_loss(z, t, delta=d),
        lambda z, t, d: optax.losses.huber_loss(z, t, delta=d),
        huber_draws,
        normal(4, 3),
        (3 * normal(4, 3, seed=1), uniform(4, 3)),
    ),
    "custom": Case(
        lambda z, t: L.custom(user_softmax, z, t, event_ndim=1, sampler=user_sampler),
        user_softmax,
        lambda z, t: (np.eye(5), scipy.special.softmax(z)),
        normal(4, 5),
        (np.eye(5)[labels(4, classes=5)],),
    ),
    "custom, indefinite": Case(
        lambda z, t: L.custom(saddle, z, t, event_ndim=1),
        saddle,
        None,
        normal(3, 2, 3),
        (normal(3, 2, 3, seed=1),),
    ),
    "custom, elementwise": Case(
        lambda z, t, k: L.custom(von_mises, z, t, k, event_ndim=0),
        von_mises,
        None,
        normal(4, 3),
        (normal(4, 3, seed=1), uniform(4, 3)),
    ),
}
EQUAL = [
    *(name for name in CASES if name.startswith(("integer", "soft"))),
    *("sigmoid", "l2", "squared", "gaussian", "poisson"),
]
IN_EXPECTATION = ["heteroscedastic", "exponential", "gamma", "huber"]
INDEFINITE = ["heteroscedastic", "custom, indefinite", "custom, elementwise"]
EXACT_FISHER = [*EQUAL, *IN_EXPECTATION, "laplace"]
SAMPLED = [name for name in CASES if CASES[name].draws is not None and "two unit" not in name]


def family(name):
    """(the family, z, targets); the family as the registry finds it."""
    case = CASES[name]
    z, targets = jnp.asarray(case.z), tuple(map(jnp.asarray, case.targets))
    (tag,) = curvature.register(lambda p: case.call(p["z"], *targets).sum(), {"z": z}).losses
    assert tag.z.shape == z.shape
    return tag.loss, z, targets


def units(name):
    """The case's z and targets, unit by unit."""
    case = CASES[name]
    count = case.z.ndim - family(name)[0].event_ndim
    arrays = [np.asarray(x) for x in (case.z, *case.targets)]
    return zip(*(x.reshape((-1, *x.shape[count:])) for x in arrays), strict=True)


@functools.cache
def unit_hessians(name):
    """H_z of every unit, [units, event, event]."""
    hessian = jax.jit(jax.hessian(CASES[name].nll))
    dense = np.stack([hessian(*args) for args in units(name)])
    size = dense.shape[-1] if dense.ndim > 1 else 1
    return dense.reshape(-1, size, size)


@functools.cache
def unit_fishers(name):
    """F_z of every unit, [units, event, event]: the mean of s s' over the draws."""
    case, out = CASES[name], []
    rest = (None,) * (len(case.targets) - 1)
    scores = jax.jit(jax.vmap(jax.grad(case.nll), (None, 0, *rest)))
    for z, target, *rest in units(name):
        nodes, weights = case.draws(z, target, *rest)
        s = np.asarray(scores(z, nodes, *rest)).reshape(-1, z.size)
        s = np.where(weights[:, None] > 0, s, 0)  # where no class is left, optax's gradient is nan
        out.append(s.T @ (weights[:, None] * s))
    return np.stack(out)


def columns(product, loss, z, targets):
    """The matrix of a linear map on z, unit by unit: [units, event, event]."""
    event = z.shape[z.ndim - loss.event_ndim :]
    size = int(np.prod(event))
    basis = jnp.eye(size, dtype=z.dtype).reshape(size, *(1,) * (z.ndim - len(event)), *event)
    basis = jnp.broadcast_to(basis, (size, *z.shape))
    out = jax.jit(jax.vmap(product, (0, None, None)))(basis, z, targets)
    return np.moveaxis(np.asarray(out).reshape(size, -1, size), 0, -1)


def squared(s):
    return s @ s.swapaxes(-1, -2)


def close(actual, expected, atol=1e-10):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


# Values, scores, matrices -------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_value_and_score_are_those_of_the_density(name):
    loss, z, targets = family(name)
    reference = jax.jit(jax.value_and_grad(CASES[name].nll))
    expected = [reference(*args) for args in units(name)]
    values, scores = (np.stack(x) for x in zip(*expected, strict=True))
    shape = z.shape[: z.ndim - loss.event_ndim]
    close(loss.value(z, targets), values.reshape(shape))
    close(CASES[name].call(z, *targets), values.reshape(shape))
    close(jax.jit(loss.score)(z, targets), scores.reshape(z.shape))


@pytest.mark.parametrize("name", CASES)
def test_hessian_products_are_the_dense_hessian(name):
    loss, z, targets = family(name)
    expected = unit_hessians(name)
    assert np.abs(expected).max() > 0.05 or name == "laplace"
    close(columns(loss.hessian_mvp, loss, z, targets), expected)


@pytest.mark.parametrize("name", [n for n in CASES if n not in INDEFINITE])
def test_root_times_its_transpose_is_the_hessian(name):
    loss, z, targets = family(name)
    close(squared(columns(loss.root, loss, z, targets)), unit_hessians(name))


@pytest.mark.parametrize("name", EXACT_FISHER)
def test_fisher_products_and_root_are_the_expected_outer_product_of_scores(name):
    loss, z, targets = family(name)
    expected = unit_fishers(name)
    assert np.abs(expected).max() > 0.05
    close(columns(loss.fisher_mvp, loss, z, targets), expected)
    close(squared(columns(loss.fisher_root, loss, z, targets)), expected)


@pytest.mark.parametrize("name", CASES)
def test_the_fisher_is_the_hessian_where_claimed_and_differs_where_not(name):
    loss, _, _ = family(name)
    assert loss.fisher_is_hessian == (name in EQUAL)
    if name in EXACT_FISHER:
        difference = np.abs(unit_fishers(name) - unit_hessians(name)).max()
        assert difference < 1e-10 if name in EQUAL else difference > 0.1


@pytest.mark.parametrize("name", IN_EXPECTATION)
def test_there_the_fisher_is_the_expected_hessian(name):
    loss, _, _ = family(name)
    dense = []
    for z, target, *rest in units(name):
        nodes, weights = CASES[name].draws(z, target, *rest)
        fixed = tuple(jnp.broadcast_to(x, nodes.shape) for x in rest)
        many = jnp.broadcast_to(z, nodes.shape + z.shape)
        h = columns(loss.hessian_mvp, loss, many, (jnp.asarray(nodes), *fixed))
        dense.append(np.einsum("t,tij->ij", weights, h))
    close(np.stack(dense), unit_fishers(name))


@pytest.mark.parametrize("name", CASES)
def test_gauss_newton_products_are_those_of_the_root(name):
    loss, z, targets = family(name)
    root = columns(loss.root, loss, z, targets)
    close(columns(loss.gauss_newton_mvp, loss, z, targets), squared(root))


@pytest.mark.parametrize("name", CASES)
def test_the_excess_of_squared_errors_is_above_their_least_value(name):
    loss, z, targets = family(name)
    found = loss.excess(z, targets)
    if not name.startswith(("l2", "squared", "gaussian")):
        assert not np.any(found) and found.shape == loss.value(z, targets).shape
        return
    close(found, loss.value(z, targets) - loss.value(targets[0], targets))


def test_a_target_of_negative_mass_is_a_weight():
    """It counts by magnitude, as every weight does; the Hessian itself is what it is."""
    loss, z, (labels, *rest) = family(next(n for n in CASES if n.startswith("soft")))
    found = {sign: (sign * labels, *rest) for sign in (1.0, -1.0)}
    for product in (loss.gauss_newton_mvp, loss.fisher_mvp, loss.root, loss.fisher_root):
        expected, turned = (columns(product, loss, z, found[sign]) for sign in (1.0, -1.0))
        assert np.abs(expected).max() > 0.05
        close(turned, expected)
    v = jnp.broadcast_to(jnp.arange(z.shape[-1], dtype=z.dtype), z.shape)
    product = jax.jvp(lambda z: loss.score(z, found[-1.0]), (z,), (v,))[1]
    close(loss.hessian_mvp(v, z, found[-1.0]), product)
    draws = [loss.sampled_score(jax.random.key(0), z, found[sign]) for sign in (1.0, -1.0)]
    close(*draws)


def test_the_root_of_a_predicted_variance_is_the_fishers():
    loss, z, targets = family("heteroscedastic")
    assert np.linalg.eigvalsh(unit_hessians("heteroscedastic")).min() < -0.1
    close(squared(columns(loss.root, loss, z, targets)), unit_fishers("heteroscedastic"))


@pytest.mark.parametrize("name", ["custom, indefinite", "custom, elementwise"])
def test_the_root_of_a_custom_loss_leaves_negative_curvature_out(name):
    loss, z, targets = family(name)
    eigenvalues, q = np.linalg.eigh(unit_hessians(name))
    assert eigenvalues.min() < -0.1
    positive = np.einsum("uij,uj,ukj->uik", q, np.maximum(eigenvalues, 0), q)
    s = columns(loss.root, loss, z, targets)
    close(squared(s), positive)
    close(s, s.swapaxes(-1, -2))


@pytest.mark.parametrize("name", CASES)
def test_families_keep_the_dtype(name, key):
    loss, z, targets = family(name)
    z = z.astype(jnp.float32)
    targets = tuple(
        t.astype(jnp.float32) if jnp.issubdtype(t.dtype, jnp.floating) else t for t in targets
    )
    products = [loss.hessian_mvp, loss.root]
    products += [loss.fisher_mvp, loss.fisher_root] if name in EXACT_FISHER else []
    outs = [jax.eval_shape(loss.score, z, targets)]
    outs += [jax.eval_shape(product, z, z, targets) for product in products]
    if name in SAMPLED:
        outs.append(jax.eval_shape(loss.sampled_score, key, z, targets))
    assert {(out.shape, out.dtype) for out in outs} == {(z.shape, jnp.dtype("float32"))}


def test_a_saturated_sigmoid_does_not_cancel():
    loss, _, targets = family("sigmoid")
    z = jnp.array([[-700.0, -40.0, 40.0]])
    expected = np.exp([[-700.0, -40.0, -40.0]])
    for square in (
        loss.root(jnp.ones_like(z), z, targets) ** 2,
        loss.hessian_mvp(jnp.ones_like(z), z, targets),
    ):
        np.testing.assert_allclose(square, expected, rtol=1e-12)


def test_huber_reaches_the_gaussian_and_vanishes_with_delta():
    information = L.Huber().fisher_information
    delta = jnp.array([1e-6, 1e-3, 50.0])
    expected = [1e-12, 1e-6, 1.0]  # delta^2 (1 + ...) where delta is small
    np.testing.assert_allclose(
        information(jnp.zeros(3), (jnp.zeros(3), delta)), expected, rtol=1e-5
    )


def test_the_fisher_needs_no_labels():
    z = jnp.asarray(normal(4, 2))
    for loss in (L.Categorical(), L.Bernoulli(), L.SquaredError(2), L.HeteroscedasticGaussian(),
                 L.Poisson(), L.Exponential(), L.Laplace()):  # fmt: skip
        assert loss.fisher_mvp(z, z, ()).shape == loss.fisher_root(z, z, ()).shape == z.shape


def test_two_names_of_one_loss():
    mean, t = jnp.asarray(normal(4, 3)), jnp.asarray(normal(4, 3, seed=1))
    close(L.gaussian_nll(mean, t), L.l2_loss(mean, t), 1e-15)
    known = L.gaussian_nll(mean, t, variance=0.7)
    predicted = L.heteroscedastic_gaussian_nll(mean, jnp.full((4, 3), np.log(0.7)), t)
    close(known, predicted, 1e-14)
    close(L.exponential_nll(mean, jnp.abs(t)), L.gamma_nll(mean, jnp.abs(t)), 1e-15)


# Sampling -----------------------------------------------------------------------------------------

SIZES = 32 * 4 ** np.arange(4)
REPEATS = 16


@functools.cache
def sampled(name):
    """Independent draws for every size, [units, repeats, size, event], and the units' Fishers."""
    loss, z, targets = family(name)
    fisher = unit_fishers(name).reshape(*z.shape[: z.ndim - loss.event_ndim], -1)
    z, targets, fisher = z[:3], tuple(t[:3] for t in targets), fisher[:3]
    if loss.event_ndim < z.ndim - 1:
        z, targets, fisher = z[:, 0], tuple(t[:, 0] for t in targets), fisher[:, 0]
    size = int(np.sqrt(fisher.shape[-1]))
    lead = (REPEATS, int(SIZES.sum()))
    many = [jnp.broadcast_to(x, lead + x.shape) for x in (z, *targets)]
    s = jax.jit(loss.sampled_score)(jax.random.key(0), many[0], tuple(many[1:]))
    s = np.asarray(s).reshape(*lead, 3, size)
    draws = np.split(np.moveaxis(s, 2, 0), np.cumsum(SIZES)[:-1], axis=2)
    return draws, fisher.reshape(3, size, size)


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_scores_have_mean_zero_and_the_fisher_as_second_moment(name):
    """Within five standard errors, entry by entry, of 32,768 draws a unit."""
    draws, fisher = sampled(name)
    s = draws[-1].reshape(len(fisher), -1, fisher.shape[-1])
    count = s.shape[1]
    assert (np.abs(s.mean(1)) <= 5 * s.std(1) / np.sqrt(count)).all()
    second = s.swapaxes(1, 2) @ s / count
    fourth = (s**2).swapaxes(1, 2) @ s**2 / count
    spread = np.sqrt(np.maximum(fourth - second**2, 0))
    assert (np.abs(second - fisher) <= 5 * spread / np.sqrt(count) + 1e-12).all()


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_scores_converge_with_the_square_root_of_the_samples(name):
    """Root-mean-square errors of 16 repetitions at 32, 128, 512 and 2,048 samples: slope -1/2.

    A bias would flatten the slope. Laplace scores are +-1: their square has no error.
    """
    draws, fisher = sampled(name)
    means = [np.sqrt((s.mean(2) ** 2).mean()) for s in draws]
    seconds = [s.swapaxes(-1, -2) @ s / s.shape[2] - fisher[:, None] for s in draws]
    spreads = [np.sqrt((e**2).mean()) for e in seconds]
    if name == "laplace":
        assert max(spreads) < 1e-12
    for errors in (means, spreads)[: 1 if name == "laplace" else 2]:
        slope = np.polyfit(np.log(SIZES), np.log(errors), 1)[0]
        assert -0.62 < slope < -0.38


@pytest.mark.parametrize("name", SAMPLED)
def test_targets_are_drawn_from_the_model_not_the_data(name):
    loss, z, targets = family(name)
    first, *rest = targets
    other = jnp.zeros_like(first)
    if name.startswith("soft"):  # the same mass
        other = first if rest else first[:, ::-1]
    keys = jax.random.split(jax.random.key(0), 8)
    drawn = jax.jit(jax.vmap(loss.sampled_score, (0, None, None)))
    fixed = drawn(keys, z, (other, *rest))
    close(drawn(keys, z, targets), fixed, 1e-12)
    assert np.ptp(fixed, axis=0).max() > 0.1


# Custom losses ------------------------------------------------------------------------------------


def test_a_custom_fisher_without_a_sampler_says_what_to_do(key):
    loss, z, targets = family("custom, elementwise")
    with pytest.raises(ValueError, match=r"(?s)Fisher of this custom loss.*sampler=.*GaussNewton"):
        loss.sampled_score(key, z, targets)
    for exact in (loss.fisher_mvp, loss.fisher_root):
        with pytest.raises(ValueError, match=r"exact Fisher.*samples=k.*sampler=.*GaussNewton"):
            exact(z, z, targets)


def test_a_custom_sampler_with_several_targets(key):
    def sampler(key, z, t, scale):
        return z + scale * jax.random.normal(key, z.shape, z.dtype), scale

    loss = Custom(lambda z, t, scale: ((z - t) / scale) ** 2 / 2, 0, sampler)
    z, scale = jnp.zeros(4000), jnp.full(4000, 2.0)
    s = loss.sampled_score(key, z, (z, scale))
    close((s**2).mean(), 0.25, 0.03)
    short = dataclasses.replace(loss, sampler=lambda key, z, t, scale: t)
    with pytest.raises(ValueError, match="returned 1 targets, expected 2"):
        short.sampled_score(key, z, (z, scale))


def test_a_custom_loss_in_a_net(key):
    """Gradient and Gauss-Newton block as optax has them, and a sampled Fisher near it."""
    x, t = jnp.asarray(normal(6, 3)), jnp.asarray(np.eye(5)[labels(6, classes=5)])
    params = {"w": jnp.asarray(normal(3, 5, seed=3))}

    def loss_fn(params, x, t):
        z = x @ params["w"]
        return L.custom(user_softmax, z, t, event_ndim=1, sampler=user_sampler).mean()

    def optax_loss(params):
        return optax.losses.softmax_cross_entropy(x @ params["w"], t).mean()

    close(jax.grad(loss_fn)(params, x, t)["w"], jax.grad(optax_loss)(params)["w"])
    registry = curvature.register(loss_fn, params, x, t).override("*", block="dense")

    @jax.jit
    def dense(key):
        kinds = curvature.GaussNewton(), curvature.Fisher(samples=64)
        operators = [curvature.Estimator(registry, k)(params, x, t, key=key) for k in kinds]
        return [block.to_dense() for op in operators for block in op.blocks.values()]

    exact, sampled = dense(key)
    # The net is linear, so the Gauss-Newton matrix is the Hessian.
    close(exact, jax.jit(jax.hessian(optax_loss))(params)["w"]["w"].reshape(15, 15))
    assert 0.7 < np.trace(sampled) / np.trace(exact) < 1.3


def test_a_vmapped_custom_loss_has_the_mapped_axis_in_front():
    case = CASES["custom, elementwise"]
    z, t, k = (jnp.asarray(x) for x in (case.z, *case.targets))
    mapped = jax.vmap(case.call, (1, 1, 1), 1)
    close(mapped(z, t, k), von_mises(z, t, k))
    close(jax.grad(lambda z: mapped(z, t, k).sum())(z), k * jnp.sin(z - t))


z, t = np.zeros((4, 5)), np.zeros((4, 5))

BAD = {
    "targets of another shape": (lambda: L.poisson_nll(z, t[0]), ValueError,
                                 r"targets .*\(5,\).* expected \(4, 5\).*log_rate"),
    "integer log rates": (lambda: L.gamma_nll(np.zeros(4, int), t), TypeError,
                          "log_rate .*int.* expected floating"),
    "a shape that is not positive": (lambda: L.gamma_nll(z, t, shape=0.0), ValueError,
                                     r"shape is 0.0, expected a positive"),
    "a variance that is negative": (lambda: L.gaussian_nll(z, t, variance=-1), ValueError,
                                    "variance is -1, expected a positive"),
    "a variance of another shape": (lambda: L.gaussian_nll(z, t, variance=np.ones(4)), ValueError,
                                    r"variance has shape \(4,\), expected .*\(4, 5\)"),
    "a log variance of another shape": (
        lambda: L.heteroscedastic_gaussian_nll(z, t[0], t), ValueError,
        r"log_variance has shape \(5,\), expected \(4, 5\)"),
    "a delta that is not positive": (lambda: L.huber_loss(z, t, delta=0), ValueError,
                                     "delta is 0, expected a positive"),
    "an event_ndim too large": (lambda: L.custom(von_mises, z, t, t, event_ndim=3), ValueError,
                                r"event_ndim is 3, expected 0 to 2.*\(4, 5\)"),
    "a custom target without unit axes": (
        lambda: L.custom(user_softmax, z, t[:3], event_ndim=1), ValueError,
        r"target 0 has shape \(3, 5\), expected leading axes \(4,\)"),
    "a custom loss that is no scalar": (
        lambda: L.custom(lambda z, t: z - t, z, t, event_ndim=1), ValueError,
        r"one unit has shape \(5,\), expected a scalar"),
    "a precision optax has not": (lambda: L.SquaredError(3), ValueError, "precision is 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs_raise_and_name_what_was_found(name):
    call, exception, words = BAD[name]
    with pytest.raises(exception, match=f"(?s){words}"):
        call()
