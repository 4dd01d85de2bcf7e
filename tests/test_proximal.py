"""Proximal steps against closed forms, scipy and dense matrices, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from jax.flatten_util import ravel_pytree

from curvature import metrics, proximal
from curvature.proximal import newton


def rosenbrock(w):
    """Outputs whose loss `valley` is Rosenbrock's function; one to one."""
    return jnp.stack([w[0], w[1] - w[0] ** 2])


def valley(z):
    return (1 - z[0]) ** 2 + 100 * z[1] ** 2


def squares(z, z0):
    return 0.5 * ((z - z0) ** 2).sum()


def small_net():
    """Weights, f, loss and three kinds of rho: a tanh net with three classes, 4-3-3."""
    keys = jax.random.split(jax.random.key(0), 5)
    w = {
        "w1": 0.5 * jax.random.normal(keys[0], (4, 3)),
        "b1": 0.1 * jax.random.normal(keys[1], (3,)),
        "w2": 0.5 * jax.random.normal(keys[2], (3, 3)),
    }
    x = jax.random.normal(keys[3], (40, 4))
    labels = jax.random.randint(keys[4], (40,), 0, 3)

    def f(w):
        return jnp.tanh(x @ w["w1"] + w["b1"]) @ w["w2"]

    def loss(z):
        return optax.losses.softmax_cross_entropy_with_integer_labels(z, labels).mean()

    return w, f, loss


def kl(z, z0):
    """KL(p_z0 || p_z), the mean over examples; its Hessian at z = z0 is the Fisher information."""
    log_p, log_p0 = jax.nn.log_softmax(z), jax.nn.log_softmax(z0)
    return (jnp.exp(log_p0) * (log_p0 - log_p)).sum(-1).mean()


class Weighted:
    """An output metric and nothing else."""

    def mvp(self, z, v):
        return v * (1 + z**2) / z.size

    def root(self, z, v):
        return v * jnp.sqrt((1 + z**2) / z.size)


class BothWays(Weighted):
    """A metric that can be called, as a Bregman divergence: a value for every example."""

    def __call__(self, z, z0):
        d = z - z0
        return (0.5 * d**2 * (1 + z0**2) + d**4).sum(-1) / z.size


def mean_squares(z, z0):
    return squares(z, z0) / z.shape[0]


def value_of(rho, z, z0):
    if callable(rho):
        return rho(z, z0).sum()
    return 0.5 * ((z - z0) * rho.mvp(z0, z - z0)).sum()


def dense(w, f, loss, rho):
    """Gradient, Hessian, Gauss-Newton matrix and pullback of rho, by brute force."""
    x, unravel = ravel_pytree(w)
    z0 = f(w)

    def outputs(x):
        return f(unravel(x)).ravel()

    def of_outputs(function):
        return lambda z: function(z.reshape(z0.shape))

    @jax.jit
    def matrices(x):
        z = outputs(x)
        j = jax.jacobian(outputs)(x)
        metric = jax.hessian(of_outputs(lambda u: value_of(rho, u, z.reshape(z0.shape))))(z)
        composite = of_outputs(loss)
        g = jax.grad(lambda x: composite(outputs(x)))(x)
        h = jax.hessian(lambda x: composite(outputs(x)))(x)
        return g, h, j.T @ jax.hessian(composite)(z) @ j, j.T @ metric @ j

    return matrices(x)


def flat(tree):
    return ravel_pytree(tree)[0]


def difference(a, b):
    return flat(jax.tree.map(jnp.subtract, a, b))


# --- the proximal point ---------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [kl, Weighted(), BothWays()], ids=["kl", "metric", "both"])
def test_proximal_point_is_stationary(rho):
    lam = 10.0
    w0, f, loss = small_net()
    point, record = jax.jit(lambda w, lam: proximal.proximal_point(f, loss, rho, w, lam))(w0, lam)
    unravel = ravel(w0)

    @jax.jit
    def objective(x):
        return loss(f(unravel(x))) + lam * value_of(rho, f(unravel(x)), f(w0))

    x = flat(point)
    gradient = jax.jit(jax.grad(objective))(x)
    assert record.converged
    assert float(jnp.linalg.norm(gradient)) < 1e-8
    assert float(record.objective) == pytest.approx(float(objective(x)), abs=1e-14)
    assert float(record.objective) < float(loss(f(w0)))
    assert jax.tree.structure(point) == jax.tree.structure(w0)
    eigenvalues = jnp.linalg.eigvalsh(jax.jit(jax.hessian(objective))(x))
    assert eigenvalues[0] > -1e-8  # a minimum, not a saddle


def ravel(w):
    return ravel_pytree(w)[1]


jitted_rosenbrock = jax.jit(
    lambda w, lam: proximal.proximal_point(rosenbrock, valley, squares, w, lam)
)


@pytest.mark.parametrize("lam", [1e-2, 1.0, 1e4])
def test_proximal_point_of_rosenbrock_is_that_of_its_outputs(lam):
    # f is one to one, so the point is f^-1 of the outputs' one: z = (h t + lam z0) / (h + lam)
    w0 = jnp.array([-1.2, 1.0])
    point, record = jitted_rosenbrock(w0, lam)
    z0, h, target = rosenbrock(w0), jnp.array([2.0, 200.0]), jnp.array([1.0, 0.0])
    assert record.converged
    expected = (h * target + lam * z0) / (h + lam)
    np.testing.assert_allclose(rosenbrock(point), expected, atol=1e-8)


def test_proximal_point_agrees_with_scipy():
    w0, f, loss = small_net()
    unravel = ravel(w0)

    def objective(x):
        return loss(f(unravel(x))) + 5.0 * kl(f(unravel(x)), f(w0))

    found = scipy.optimize.minimize(
        jax.jit(objective),
        flat(w0),
        jac=jax.jit(jax.grad(objective)),
        hess=jax.jit(jax.hessian(objective)),
        method="trust-ncg",
        options={"gtol": 1e-10},
    )
    point, record = jax.jit(lambda w: proximal.proximal_point(f, loss, kl, w, 5.0))(w0)
    assert float(record.objective) == pytest.approx(found.fun, abs=1e-9)
    np.testing.assert_allclose(f(point), f(unravel(jnp.asarray(found.x))), atol=1e-6)


def test_implicit_gradient_descent_of_a_quadratic_and_of_a_net():
    a = jnp.diag(jnp.array([1.0, 1e4])) + 0.5
    b, w0 = jnp.array([1.0, -2.0]), jnp.array([3.0, 4.0])
    v, record = jax.jit(
        lambda w: proximal.implicit_gradient_step(lambda w: w @ a @ w / 2 - b @ w, w, 0.1)
    )(w0)
    assert record.converged
    expected = jnp.linalg.solve(jnp.eye(2) + 0.1 * a, w0 + 0.1 * b) - w0
    np.testing.assert_allclose(v, expected, atol=1e-9)

    w, f, loss = small_net()

    def whole(w):
        return loss(f(w))

    v, _ = jax.jit(lambda w: proximal.implicit_gradient_step(whole, w, 3.0))(w)
    there = jax.jit(jax.grad(whole))(optax.apply_updates(w, v))
    np.testing.assert_allclose(flat(v), -3.0 * flat(there), atol=1e-8)


def test_a_solve_that_ends_early_says_so():
    w0 = jnp.array([-1.2, 1.0])
    _, record = jax.jit(
        lambda w: proximal.proximal_point(
            rosenbrock, valley, squares, w, 1e-2, max_iterations=1, tolerance=1e-12
        )
    )(w0)
    assert not record.converged
    assert record.iterations == 1

    def nan(z):
        return valley(z) * jnp.nan

    point, record = jax.jit(lambda w: proximal.proximal_point(rosenbrock, nan, squares, w, 1.0))(w0)
    assert not record.converged
    np.testing.assert_array_equal(point, w0)


def test_newton_leaves_a_region_of_negative_curvature():
    # a double well, started close to its hill
    def objective(x):
        return ((x**2 - 1) ** 2).sum() + 0.1 * (x[0] - x[1]) ** 2

    point, record = newton.minimise(objective, jnp.array([0.01, 0.02]), None, 100)
    assert record.converged
    np.testing.assert_allclose(point, jnp.ones(2), atol=1e-9)


# --- its approximations ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rho", "solver"),
    [(kl, "cg"), (kl, "dense"), (Weighted(), "cg"), (BothWays(), "dense")],
    ids=["kl-cg", "kl-dense", "metric-cg", "both-dense"],
)
def test_steps_equal_dense_matrices(rho, solver):
    w, f, loss = small_net()
    g, h, gn, metric = dense(w, f, loss, rho)
    # G is singular for some: outputs may have directions of no consequence. Then the shortest.
    natural, newton, gauss_newton = jax.jit(
        lambda w, lam: (
            proximal.natural_gradient_step(f, loss, rho, w, lam, damping=1e-2, solver=solver),
            proximal.damped_newton_step(f, loss, rho, w, lam, solver=solver),
            proximal.damped_newton_step(f, loss, rho, w, lam, model="gauss_newton", solver=solver),
        )
    )(w, 20.0)
    expected = -jnp.linalg.solve(metric + 1e-2 * jnp.eye(g.size), g) / 20
    np.testing.assert_allclose(flat(natural), expected, atol=1e-9)
    inverse = jnp.linalg.pinv(gn + 20 * metric, rtol=1e-10, hermitian=True)
    np.testing.assert_allclose(flat(gauss_newton), -inverse @ g, atol=1e-8)
    if rho is not kl:
        inverse = jnp.linalg.inv(h + 20 * metric)
        np.testing.assert_allclose(flat(newton), -inverse @ g, atol=1e-8)


@pytest.mark.parametrize("rho", [kl, BothWays()], ids=["kl", "both"])
def test_damped_newton_is_one_newton_step_of_the_proximal_problem(rho):
    w0, f, loss = small_net()
    unravel = ravel(w0)

    def objective(x):
        return loss(f(unravel(x))) + 30.0 * value_of(rho, f(unravel(x)), f(w0))

    gradient, hessian, step = jax.jit(
        lambda w: (
            jax.grad(objective)(flat(w)),
            jax.hessian(objective)(flat(w)),
            proximal.damped_newton_step(f, loss, rho, w, 30.0, solver="dense"),
        )
    )(w0)
    np.testing.assert_allclose(hessian @ flat(step), -gradient, atol=1e-10)


def regression_net():
    """A net with a metric of full rank, so that natural gradients are unique: 2-3-1."""
    keys = jax.random.split(jax.random.key(1), 4)
    w = {"w1": jax.random.normal(keys[0], (2, 3)), "w2": jax.random.normal(keys[1], (3, 1))}
    x, y = jax.random.normal(keys[2], (30, 2)), jax.random.normal(keys[3], (30, 1))
    return w, (lambda w: jnp.tanh(x @ w["w1"]) @ w["w2"]), lambda z: ((z - y) ** 2).sum() / 60


def test_the_proximal_step_tends_to_the_natural_gradient_step():
    w, f, loss = regression_net()
    both = jax.jit(
        lambda lam: (
            difference(proximal.proximal_point(f, loss, mean_squares, w, lam)[0], w),
            flat(proximal.natural_gradient_step(f, loss, mean_squares, w, lam, solver="dense")),
        )
    )
    lams, errors = [1e4, 1e5, 1e6], []
    for lam in lams:
        exact, natural = both(lam)
        errors.append(float(jnp.linalg.norm(exact - natural) / jnp.linalg.norm(natural)))
    # to first order in 1/lam: ten times closer with ten times the penalty
    ratios = np.array(errors[:-1]) / np.array(errors[1:])
    np.testing.assert_allclose(ratios, 10.0, rtol=0.1)
    assert errors[-1] < 1e-3


def test_scale_by_natural_gradient_is_the_step_for_a_given_gradient():
    w, f, loss = small_net()
    del f
    x = jax.random.normal(jax.random.key(7), (40, 4))

    def outputs(w, x):
        return jnp.tanh(x @ w["w1"] + w["b1"]) @ w["w2"]

    tx = optax.chain(
        proximal.scale_by_natural_gradient(outputs, kl, damping=1e-3, solver="dense"),
        optax.scale_by_learning_rate(0.25),
    )

    @jax.jit
    def both(w):
        grads = jax.grad(lambda w: loss(outputs(w, x)))(w)
        updates, _ = tx.update(grads, tx.init(w), w, f_args=(x,))
        return updates, proximal.natural_gradient_step(
            lambda w: outputs(w, x), loss, kl, w, 4.0, damping=1e-3, solver="dense"
        )

    updates, expected = both(w)
    np.testing.assert_allclose(flat(updates), flat(expected), atol=1e-12)


def test_outputs_may_be_a_tree():
    w, f, loss = small_net()

    def split(w):
        return {"first": f(w)[:5], "rest": f(w)[5:]}

    def joined(z):
        return jnp.concatenate([z["first"], z["rest"]])

    whole = (f, loss, kl)
    parts = (split, lambda z: loss(joined(z)), lambda z, z0: kl(joined(z), joined(z0)))
    one, two = (
        jax.jit(lambda w, p=p: proximal.damped_newton_step(*p, w, 5.0, solver="dense"))(w)
        for p in (whole, parts)
    )
    np.testing.assert_allclose(flat(one), flat(two), atol=1e-10)


def test_single_precision_stays_so_and_lam_may_be_of_another():
    w, f, loss = regression_net()
    del f, loss
    w = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), w)
    x, y = jnp.ones((5, 2), jnp.float32), jnp.zeros((5, 1), jnp.float32)

    @jax.jit
    def steps(w, lam):
        parts = (lambda w: jnp.tanh(x @ w["w1"]) @ w["w2"], lambda z: squares(z, y), mean_squares)
        step, _ = proximal.trust_region_step(*parts, w, lam)
        point, record = proximal.proximal_point(*parts, w, lam)
        return point, step, proximal.damped_newton_step(*parts, w, lam), record.converged

    *found, converged = steps(w, jnp.asarray(2.0, jnp.float64))
    assert converged
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {"float32"}


# --- the trust region -----------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [kl, BothWays()], ids=["kl", "both"])
@pytest.mark.parametrize("model", ["hessian", "gauss_newton"])
def test_trust_region_satisfies_the_optimality_conditions(rho, model):
    w, f, loss = small_net()
    g, h, gn, metric = dense(w, f, loss, rho)
    matrix = h if model == "hessian" else gn
    step = jax.jit(
        lambda w, radius: proximal.trust_region_step(f, loss, rho, w, radius, model=model)
    )
    # Everything within the range of the metric, where the problem is posed.
    values, vectors = jnp.linalg.eigh(metric)
    basis = vectors[:, values > 1e-10 * values[-1]]
    for radius in (1e-3, 0.1, 100.0):
        tree, record = step(w, radius)
        v, mu = flat(tree), float(record.multiplier)
        length = float(jnp.sqrt(v @ metric @ v))
        shifted = matrix + mu * metric
        np.testing.assert_allclose(v, basis @ (basis.T @ v), atol=1e-8 * float(jnp.abs(v).max()))
        np.testing.assert_allclose(basis.T @ (shifted @ v + g), 0.0, atol=1e-8)
        assert length <= radius * (1 + 1e-9)
        assert mu == 0 or (mu > 0 and length == pytest.approx(radius, rel=1e-9))
        reduced = basis.T @ shifted @ basis
        assert jnp.linalg.eigvalsh(reduced)[0] > -1e-9 * jnp.abs(reduced).max()
        assert float(record.radius) == pytest.approx(length, rel=1e-9)
        decrease = float(-(g @ v + v @ matrix @ v / 2))
        assert float(record.decrease) == pytest.approx(decrease, rel=1e-9)
        assert decrease > 0
    assert mu == 0 or model == "hessian"  # the widest region holds a convex model's minimum


def region(loss, radius):
    """The step from the origin of a plane, with f(w) = w."""
    return jax.jit(lambda w: proximal.trust_region_step(lambda w: w, loss, squares, w, radius))(
        jnp.zeros(2)
    )


def test_trust_region_in_the_hard_case():
    # The gradient has no part in the direction of negative curvature: the step goes there all the
    # same, up to the bound (Nocedal and Wright 2006, section 4.3).
    def loss(z):
        return z[0] + z[0] ** 2 - 0.5 * z[1] ** 2

    v, record = region(loss, 2.0)
    assert float(record.multiplier) == pytest.approx(1.0)
    np.testing.assert_allclose(v[0], -1 / 3, atol=1e-12)
    np.testing.assert_allclose(v[1] ** 2, 4 - 1 / 9, atol=1e-12)


def test_trust_region_inside_is_newtons_step_even_where_the_loss_is_flat():
    def loss(z):
        return (z[0] - 1) ** 2  # flat along z[1]

    v, record = region(loss, 5.0)
    np.testing.assert_allclose(v, [1.0, 0.0], atol=1e-12)
    assert record.multiplier == 0

    def slope(z):
        return (z[0] - 1) ** 2 + z[1]  # and now it slopes there

    v, record = region(slope, 5.0)
    assert float(v @ v) == pytest.approx(25.0)
    assert float(record.multiplier * v[1]) == pytest.approx(-1.0)


def test_trust_region_at_a_maximum_finds_a_way_down():
    v, record = region(lambda z: -(z[0] ** 2) + z[1] ** 2, 0.5)
    np.testing.assert_allclose(jnp.abs(v), [0.5, 0.0], atol=1e-12)
    assert float(record.decrease) == pytest.approx(0.25)


# --- mirror descent -------------------------------------------------------------------------------

PHIS = {
    "euclidean": lambda z: 0.5 * (z**2).sum(),
    "log_sum_exp": lambda z: jax.nn.logsumexp(z, axis=-1).sum() + 0.5 * (z.mean(-1) ** 2).sum(),
    "softplus": lambda z: jax.nn.softplus(z).sum(),
}


@functools.cache
def closed_form(potential):
    return jax.jit(lambda z, g, rate: proximal.mirror_descent_step(potential, z, g, rate))


def points(potential):
    keys = jax.random.split(jax.random.key(3), 2)
    z, g = jax.random.normal(keys[0], (2, 4)), 0.1 * jax.random.normal(keys[1], (2, 4))
    if potential == "entropy":
        z = jax.nn.softmax(z)
    if potential == "log_sum_exp":  # the gradient of a loss of distributions
        g = g - g.mean(-1, keepdims=True)
    return z, g


@pytest.mark.parametrize("potential", PHIS)
def test_mirror_descent_closed_forms_agree_with_the_solver(potential):
    # log-sum-exp is flat along a shift of all logits: the square of their mean, which has no
    # gradient in other directions, makes the solver's minimiser unique, and the same.
    z, g = points(potential)
    closed, record = closed_form(potential)(z, g, 0.3)
    assert record.converged and record.iterations == 0
    solve = jax.jit(lambda z, g: proximal.mirror_descent_step(PHIS[potential], z, g, 0.3))
    solved, record = solve(z, g)
    assert record.converged
    np.testing.assert_allclose(closed, solved, atol=1e-9)


def test_the_entropic_step_is_the_minimum_on_the_simplex():
    z, g = points("entropy")
    step, _ = closed_form("entropy")(z, g, 0.7)
    u = z + step
    np.testing.assert_allclose(u.sum(-1), 1.0, atol=1e-14)
    # stationary on the simplex: the gradient of <g, u> + KL(u || z)/0.7 is one number in each row
    gradient = jax.grad(lambda u: (g * u).sum() + (u * jnp.log(u / z)).sum() / 0.7)(u)
    gradient = gradient - gradient.mean(-1, keepdims=True)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-13)

    # and agrees with Newton's method on the entropy, in coordinates that leave out the last entry
    def inner(y):
        return (lambda p: (p * jnp.log(p)).sum())(jnp.append(y, 1 - y.sum()))

    solved, record = proximal.mirror_descent_step(inner, z[0, :-1], g[0, :-1] - g[0, -1], 0.7)
    assert record.converged
    np.testing.assert_allclose(solved, step[0, :-1], atol=1e-9)


@pytest.mark.parametrize("potential", ["log_sum_exp", "softplus"])
def test_mirror_descent_in_natural_parameters_moves_the_means(potential):
    z, g = points(potential)
    mean = jax.nn.softmax if potential == "log_sum_exp" else jax.nn.sigmoid
    step, _ = closed_form(potential)(z, g, 0.3)
    np.testing.assert_allclose(mean(z + step), mean(z) - 0.3 * g, atol=1e-14)
    too_far, record = closed_form(potential)(z, 1e3 * g, 1.0)
    assert not record.converged
    assert jnp.isnan(too_far).any()


@pytest.mark.parametrize("potential", ["log_sum_exp", "softplus", "entropy"])
def test_small_mirror_steps_are_natural_gradient_steps_of_the_divergence(potential):
    z, g = points(potential)
    phi = PHIS.get(potential, lambda u: (u * jnp.log(u)).sum())
    rate, errors = 1e-3, []
    for eta in (rate, rate / 10):
        step, _ = closed_form(potential)(z, g, eta)
        hessian = jax.jit(jax.hessian(lambda u: phi(u.reshape(z.shape))))(z.ravel())
        gradient = g.ravel()
        if potential == "entropy":  # the constraint's multiplier, a number a row
            gradient = (g - (z * g).sum(-1, keepdims=True)).ravel()
        natural = -eta * jnp.linalg.solve(hessian, gradient)
        errors.append(float(jnp.linalg.norm(step.ravel() - natural) / jnp.linalg.norm(natural)))
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.05)


def test_mirror_descent_as_a_transformation():
    schedule = optax.exponential_decay(0.5, 10, 0.5)
    tx = proximal.mirror_descent(schedule, "softplus")
    z, target = jnp.array([-1.0, 2.0]), jnp.array([0.3, 0.6])

    def loss(z):
        return optax.losses.sigmoid_binary_cross_entropy(z, target).sum()

    @jax.jit
    def step(z, state):
        updates, state = tx.update(jax.grad(loss)(z), state, z)
        return optax.apply_updates(z, updates), state

    state, expected = tx.init(z), jax.nn.sigmoid(z)
    for i in range(5):  # the means go to the target in a straight line
        z, state = step(z, state)
        expected = expected - schedule(i) * (expected - target)
    np.testing.assert_allclose(jax.nn.sigmoid(z), expected, atol=1e-12)


# --- what is refused ------------------------------------------------------------------------------

W = np.array([-1.2, 1.0])
REFUSED = {
    "lam is 0.0, expected a positive": lambda: proximal.proximal_point(
        rosenbrock, valley, squares, jnp.asarray(W), 0.0
    ),
    "lam is inf": lambda: proximal.damped_newton_step(
        rosenbrock, valley, squares, jnp.asarray(W), np.inf
    ),
    "learning_rate is -1": lambda: proximal.implicit_gradient_step(
        lambda w: (w**2).sum(), jnp.asarray(W), -1.0
    ),
    "radius is nan": lambda: proximal.trust_region_step(
        rosenbrock, valley, squares, jnp.asarray(W), np.nan
    ),
    "damping is -0.1": lambda: proximal.scale_by_natural_gradient(
        rosenbrock, squares, damping=-0.1
    ),
    "tolerance is 2": lambda: proximal.proximal_point(
        rosenbrock, valley, squares, jnp.asarray(W), 1.0, tolerance=2.0
    ),
    "weights: found no arrays": lambda: proximal.proximal_point(
        lambda w: jnp.ones(2), valley, squares, {}, 1.0
    ),
    "max_iterations is 0": lambda: proximal.proximal_point(
        rosenbrock, valley, squares, jnp.asarray(W), 1.0, max_iterations=0
    ),
    r"loss returns shape \(2,\), expected a scalar": lambda: proximal.natural_gradient_step(
        rosenbrock, lambda z: z, squares, jnp.asarray(W), 1.0
    ),
    r"rho returns shape \(2,\)": lambda: proximal.natural_gradient_step(
        rosenbrock, valley, lambda z, z0: z - z0, jnp.asarray(W), 1.0
    ),
    "solver is 'lu'": lambda: proximal.natural_gradient_step(
        rosenbrock, valley, squares, jnp.asarray(W), 1.0, solver="lu"
    ),
    "model is 'fisher'": lambda: proximal.trust_region_step(
        rosenbrock, valley, squares, jnp.asarray(W), 1.0, model="fisher"
    ),
    "potential is 'kl', expected one of": lambda: proximal.mirror_descent_step(
        "kl", jnp.asarray(W), jnp.asarray(W), 1.0
    ),
    "gradient has shapes": lambda: proximal.mirror_descent_step(
        "euclidean", jnp.asarray(W), jnp.ones(3), 1.0
    ),
    "updates has shapes": lambda: proximal.scale_by_natural_gradient(rosenbrock, squares).update(
        {"w": jnp.asarray(W)}, optax.EmptyState(), jnp.asarray(W)
    ),
    "natural.* without params": lambda: proximal.scale_by_natural_gradient(
        rosenbrock, squares
    ).update(jnp.asarray(W), optax.EmptyState()),
    "mirror.* without params": lambda: proximal.mirror_descent(0.1, "euclidean").update(
        jnp.asarray(W), optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_refused(message):
    with pytest.raises(ValueError, match=message.split(".* ")[-1]):
        REFUSED[message]()


def test_bad_types_are_refused():
    with pytest.raises(TypeError, match=r"expected a metric .*or a function"):
        proximal.proximal_point(rosenbrock, valley, 3, jnp.asarray(W), 1.0)
    with pytest.raises(TypeError, match="weights: found dtype int64, expected floating"):
        proximal.proximal_point(rosenbrock, valley, squares, jnp.array([1, 2]), 1.0)
    with pytest.raises(TypeError, match="weights: found dtype bfloat16, expected float32"):
        proximal.trust_region_step(rosenbrock, valley, squares, jnp.ones(2, jnp.bfloat16), 1.0)


@pytest.mark.parametrize("solver", ["cg", "dense"])
@pytest.mark.parametrize("what", ["loss", "matrix"])
def test_what_is_not_finite_is_no_step_of_zero(solver, what):
    """Conjugate gradients end at once where the residual is NaN."""
    bad = {what: jnp.nan}
    loss = lambda z: bad.get("loss", 1.0) * valley(z)  # noqa: E731
    rho = lambda z, z0: bad.get("matrix", 1.0) * squares(z, z0)  # noqa: E731
    w = jnp.asarray(W)
    step = proximal.natural_gradient_step(rosenbrock, loss, rho, w, 1.0, solver=solver)
    assert np.isnan(step).all()
    step = proximal.damped_newton_step(rosenbrock, loss, rho, w, 1.0, solver=solver)
    assert np.isnan(step).all()


def test_a_schedule_may_start_from_zero():
    tx = proximal.mirror_descent(optax.linear_schedule(0.0, 1.0, 10), "entropy")
    p, gradient = jnp.ones(3) / 3, jnp.arange(3.0)
    updates, state = tx.update(gradient, tx.init(p), p)
    np.testing.assert_allclose(updates, 0, atol=1e-15)
    updates, _ = tx.update(gradient, state, p)
    assert updates[0] > 0 > updates[2]


@pytest.mark.parametrize("rho", [metrics.Euclidean(), metrics.Bregman(lambda z: jnp.sum(z**2) / 2)])
def test_metrics_of_outputs_that_are_trees(rho):
    def f(w):
        return {"a": 2 * w, "b": w**2}

    def loss(z):
        return jnp.sum((z["a"] - 1) ** 2) + jnp.sum(z["b"] ** 2)

    def squares(z, z0):
        return sum(jnp.sum((z[k] - z0[k]) ** 2) / 2 for k in z)

    w = jnp.array([0.3, 0.7])
    expected, _ = proximal.proximal_point(f, loss, squares, w, 1.0)
    for each in (rho, {"a": rho, "b": rho}):
        found, record = proximal.proximal_point(f, loss, each, w, 1.0)
        np.testing.assert_allclose(found, expected, rtol=1e-8)
        assert record.converged


@pytest.mark.parametrize("lam", [1e4, 1e8])
def test_a_strong_proximal_term_converges(lam):
    w = jnp.array([0.3, 0.7], jnp.float32)
    loss = lambda z: jnp.sum((z - 1) ** 4)  # noqa: E731
    found, record = proximal.proximal_point(
        jnp.tanh, loss, metrics.Euclidean(), w, jnp.float32(lam)
    )
    assert record.converged and record.iterations < 20
    np.testing.assert_allclose(found, w, atol=10 / lam)


@pytest.mark.parametrize("potential", ["log_sum_exp", "softplus"])
def test_no_gradient_is_no_step_even_where_a_probability_underflows(potential):
    z = jnp.array([0.0, -120.0], jnp.float32)
    step, _ = proximal.mirror_descent_step(potential, z, jnp.zeros_like(z), 0.1)
    np.testing.assert_array_equal(step, 0)
