"""Theorems about K-FAC, as tests in float64 against dense matrices (letters as in the docs)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvature
from curvature import proximal


def deep_linear(dims=(5, 4, 4, 3), examples=12):
    keys = jax.random.split(jax.random.key(0), len(dims) + 1)
    params = [
        jax.random.normal(k, (i, o)) for k, i, o in zip(keys, dims[:-1], dims[1:], strict=False)
    ]
    x = jax.random.normal(keys[-2], (examples, dims[0]))
    y = jax.random.normal(keys[-1], (examples, dims[-1]))
    return params, x, y


def chain(params, x):
    for w in params:
        x = x @ w
    return x


def mean_squared(params, x, y):
    return curvature.losses.l2_loss(chain(params, x), y).sum(-1).mean()


def distance(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


@pytest.mark.parametrize("kind", [curvature.GaussNewton(), curvature.Fisher(samples=None)])
def test_a_kfac_of_a_deep_linear_net_is_the_block_diagonal_gauss_newton(kind):
    params, x, y = deep_linear()
    registry = curvature.register(mean_squared, params, x, y)
    operator = jax.jit(curvature.Estimator(registry, kind))(params, x, y)
    jacobians = jax.jit(jax.jacrev(lambda p: chain(p, x).reshape(-1)))(params)
    for layer, jacobian in zip(registry.layers, jacobians, strict=True):
        j = jacobian.reshape(x.shape[0] * 3, -1)
        assert distance(operator.blocks[layer.name].to_dense(), j.T @ j / x.shape[0]) < 1e-14


def test_a_control_kfac_is_not_the_empirical_fisher():
    params, x, y = deep_linear()
    registry = curvature.register(mean_squared, params, x, y)
    operator = jax.jit(curvature.Estimator(registry, curvature.EmpiricalFisher()))(params, x, y)

    def one(params, x, y):
        return optax.losses.l2_loss(chain(params, x[None])[0], y).sum()

    scores = jax.jit(jax.vmap(jax.grad(one), in_axes=(None, 0, 0)))(params, x, y)
    for layer, score in zip(registry.layers, scores, strict=True):
        s = score.reshape(x.shape[0], -1)
        far = distance(operator.blocks[layer.name].to_dense(), s.T @ s / x.shape[0])
        assert 0.3 < far < 0.7


def excess_of_block_natural_gradient(depth, rate, steps):
    """Excess loss over its start, after every step; each block's step is divided by the depth."""
    d, examples = 3, 60
    keys = jax.random.split(jax.random.key(0), depth + 3)
    params = [jnp.eye(d) + 0.3 / d**0.5 * jax.random.normal(k, (d, d)) for k in keys[:depth]]
    # A target that the product reaches without becoming singular on the way.
    x, target = jax.random.normal(keys[-3], (examples, d)), 2 * jnp.eye(d)
    target = target + 0.3 * jax.random.normal(keys[-2], (d, d))
    y = x @ target + jax.random.normal(keys[-1], (examples, d))
    least = ((x @ jnp.linalg.lstsq(x, y)[0] - y) ** 2).sum() / (2 * examples)

    def squares(z, z0=y):
        return ((z - z0) ** 2).sum() / (2 * examples)

    def block_step(params, i):
        def f(w):
            return chain([*params[:i], w, *params[i + 1 :]], x)

        return proximal.natural_gradient_step(
            f, squares, squares, params[i], depth / rate, solver="dense"
        )

    def step(params, _):
        new = [w + block_step(params, i) for i, w in enumerate(params)]
        return new, squares(chain(new, x)) - least

    _, excess = jax.jit(lambda p: jax.lax.scan(step, p, None, steps))(params)
    return np.asarray(excess / (squares(chain(params, x)) - least))


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_c_block_natural_gradient_converges_at_the_same_rate_at_every_depth(depth):
    # Bernacchia, Lengyel and Hennequin 2018: (1 - rate)^(2 t), as a flow; so for depth > 1 up to
    # the products of the layers' steps, which fall with the rate.
    worst = []
    for rate, steps in ((0.1, 40), (0.05, 80)):
        excess = excess_of_block_natural_gradient(depth, rate, steps)
        predicted = (1 - rate) ** (2 * np.arange(1, steps + 1))
        worst.append(np.abs(excess / predicted - 1).max())
    if depth == 1:
        assert max(worst) < 1e-10
    else:
        assert worst[0] < 0.11  # while the excess falls to 2e-4 of what it was
        assert worst[1] < 0.55 * worst[0]


SHARING = {"expand": lambda z: z, "reduce": lambda z: z.mean(1)}


@pytest.mark.parametrize("setting", SHARING)
def test_b_expand_and_reduce_are_exact_each_in_its_own_setting(setting):
    """Eschenhagen et al. 2023: a loss at every position, or one of the mean over positions."""
    params, _, _ = deep_linear()
    x = jax.random.normal(jax.random.key(5), (12, 6, 5))

    def network(params):
        return SHARING[setting](chain(params, x))

    def loss_fn(params, x):
        return curvature.losses.l2_loss(SHARING[setting](chain(params, x))).sum(-1).mean()

    registry = curvature.register(loss_fn, params, x)
    expand, reduce = (
        jax.jit(curvature.Estimator(registry.with_blocks(block), curvature.GaussNewton()))(
            params, x
        )
        for block in ("kronecker", "kronecker_reduce")
    )
    right, wrong = (expand, reduce) if setting == "expand" else (reduce, expand)
    z = network(params)
    jacobians = jax.jit(jax.jacrev(lambda p: network(p).reshape(-1)))(params)
    for layer, jacobian in zip(registry.layers, jacobians, strict=True):
        j = jacobian.reshape(z.size, -1)
        exact = j.T @ j / (z.size // 3)
        assert distance(right.blocks[layer.name].to_dense(), exact) < 1e-14
        assert distance(wrong.blocks[layer.name].to_dense(), exact) > 0.1


def attention(params, x):
    """A small net with nonlinear weight sharing: attention over positions, then a mean."""
    q, k = x @ params["q"], x @ params["k"]
    weights = jax.nn.softmax(q @ k.mT)
    return jnp.tanh(weights @ x @ params["v"]).mean(1) @ params["head"]


NETS = {
    "tanh": (
        {"u": (4, 5), "v": (5, 4), "w": (4, 3)},
        (10, 4),
        lambda p, x: jnp.tanh(jnp.tanh(x @ p["u"]) @ p["v"]) @ p["w"],
    ),
    "relu per position": (
        {"u": (3, 6), "v": (6, 2)},
        (6, 4, 3),
        lambda p, x: jax.nn.relu(x @ p["u"]) @ p["v"],
    ),
    "attention": (
        {"q": (3, 2), "k": (3, 2), "v": (3, 4), "head": (4, 3)},
        (6, 5, 3),
        attention,
    ),
    "recurrent": (
        {"u": (2, 3), "w": (3, 3)},
        (7, 4, 2),
        lambda p, x: jax.lax.scan(
            lambda h, a: (jnp.tanh(h @ p["w"] + a @ p["u"]), None),
            jnp.zeros((7, 3)),
            x.swapaxes(0, 1),
        )[0],
    ),
}


@pytest.mark.parametrize("net", NETS)
def test_f_ekfac_is_never_farther_than_kfac_from_the_block(net):
    """A theorem (George et al. 2018), and more: a right angle at EKFAC, in Frobenius norm."""
    shapes, shape, network = NETS[net]

    def data(seed):
        keys = jax.random.split(jax.random.key(seed), len(shapes) + 1)
        pairs = zip(shapes.items(), keys, strict=False)
        return {n: jax.random.normal(k, s) for (n, s), k in pairs}, jax.random.normal(
            keys[-1], shape
        )

    def loss_of_z(z, module):
        labels = jnp.arange(z[..., 0].size).reshape(z.shape[:-1]) % z.shape[-1]
        return module.softmax_cross_entropy_with_integer_labels(z, labels).mean()

    def loss_fn(params, x):
        return loss_of_z(network(params, x), curvature.losses)

    registry = curvature.register(loss_fn, *data(0))

    @jax.jit
    def matrices(params, x):
        kfac, ekfac = (
            curvature.Estimator(registry.with_blocks(block), curvature.GaussNewton())(params, x)
            for block in ("kronecker", "ekfac")
        )
        z = network(params, x)
        hessian = jax.hessian(lambda z: loss_of_z(z, optax.losses))(z).reshape(z.size, z.size)
        jacobians = jax.jacrev(lambda p: network(p, x))(params)
        out = {}
        for layer in registry.layers:
            j = jacobians[layer.name].reshape(z.size, -1)
            block = ekfac.blocks[layer.name]
            basis = jnp.kron(block.input_basis, block.output_basis)
            exact = j.T @ hessian @ j
            out[layer.name] = (
                exact,
                kfac.blocks[layer.name].to_dense(),
                block.to_dense(),
                jnp.diagonal(basis.T @ exact @ basis) - block.values.ravel(),
            )
        return out

    for seed in range(4):
        for exact, kfac, ekfac, difference in matrices(*data(seed)).values():
            scale = jnp.linalg.norm(exact)
            assert float(jnp.abs(difference).max()) < 1e-12 * scale
            far, near = (float(jnp.linalg.norm(m - exact) / scale) for m in (kfac, ekfac))
            between = float(jnp.linalg.norm(kfac - ekfac) / scale)
            assert near <= far
            np.testing.assert_allclose(far**2, near**2 + between**2, rtol=1e-9)
            assert far > 1e-3  # it is no vacuous statement


def test_f_without_sharing_ekfac_of_a_deep_linear_net_is_exact():
    params, x, y = deep_linear()
    registry = curvature.register(mean_squared, params, x, y).with_blocks("ekfac")
    operator = jax.jit(curvature.Estimator(registry, curvature.GaussNewton()))(params, x, y)
    jacobians = jax.jit(jax.jacrev(lambda p: chain(p, x).reshape(-1)))(params)
    for layer, jacobian in zip(registry.layers, jacobians, strict=True):
        j = jacobian.reshape(x.shape[0] * 3, -1)
        assert distance(operator.blocks[layer.name].to_dense(), j.T @ j / x.shape[0]) < 1e-13


def squashed_nets():
    """One function in two parametrisations: tanh(u) = 2 sigmoid(2 u) - 1."""
    dims = (4, 5, 4, 3)
    keys = jax.random.split(jax.random.key(1), 8)
    tanh = [
        (jax.random.normal(k, (i, o)) / np.sqrt(i), 0.1 * jax.random.normal(k, (o,)))
        for k, i, o in zip(keys, dims[:-1], dims[1:], strict=False)
    ]
    # s = sigmoid(2 u), h = 2 s - 1: the next layer sees h W + b = s (2 W) + (b - sum_i W_i).
    logistic = []
    for i, (w, b) in enumerate(tanh):
        if i > 0:
            w, b = 2 * w, b - w.sum(0)
        if i < len(tanh) - 1:
            w, b = 2 * w, 2 * b
        logistic.append((w, b))
    x = jax.random.normal(keys[-2], (40, dims[0]))
    y = jax.random.normal(keys[-1], (40, dims[-1]))
    return (tanh, jnp.tanh), (logistic, jax.nn.sigmoid), x, y


def forward(params, squash, x):
    for w, b in params[:-1]:
        x = squash(x @ w + b)
    w, b = params[-1]
    return x @ w + b


def train(params, squash, x, y, make_optimizer, steps):
    """The network's outputs after every step."""

    def loss_fn(params, x, y):
        return curvature.losses.l2_loss(forward(params, squash, x), y).sum(-1).mean()

    tx = make_optimizer(curvature.register(loss_fn, params, x, y))

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params, loss_args=(x, y))
        params = optax.apply_updates(params, updates)
        return params, state, forward(params, squash, x)

    state, outputs = tx.init(params), []
    for _ in range(steps):
        params, state, z = step(params, state)
        outputs.append(z)
    return jnp.stack(outputs)


def test_d_undamped_kfac_does_not_see_the_parametrisation():
    (tanh, squash), (logistic, sigmoid), x, y = squashed_nets()
    np.testing.assert_allclose(
        forward(tanh, squash, x), forward(logistic, sigmoid, x), rtol=1e-12, atol=1e-13
    )

    def kfac(registry):
        kind = curvature.GaussNewton()
        always = {"statistics_every": 1, "refresh_every": 1}
        return curvature.kfac(
            registry, 0.1, momentum=0.5, damping=0.0, kind=kind, decay=0.9, **always
        )

    one = train(tanh, squash, x, y, kfac, steps=20)
    two = train(logistic, sigmoid, x, y, kfac, steps=20)
    assert float(jnp.abs(one[-1] - one[0]).max()) > 0.1  # it moved
    np.testing.assert_allclose(one, two, atol=1e-11)


def test_d_control_gradient_descent_does():
    (tanh, squash), (logistic, sigmoid), x, y = squashed_nets()

    def sgd(registry):
        return optax.with_extra_args_support(optax.sgd(0.1))

    one = train(tanh, squash, x, y, sgd, steps=1)
    two = train(logistic, sigmoid, x, y, sgd, steps=1)
    assert float(jnp.abs(one - two).max()) > 1e-2


def test_e_sampled_fisher_converges_with_slope_minus_one_half():
    params, x, _ = deep_linear(dims=(5, 4, 3))
    labels = jnp.arange(12) % 3

    def loss_fn(params, x, labels):
        logits = jnp.tanh(x @ params[0]) @ params[1]
        loss = curvature.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        return loss.mean()

    registry = curvature.register(loss_fn, params, x, labels)

    def dense(kind, key=None):
        operator = curvature.Estimator(registry, kind)(params, x, labels, key=key)
        return jnp.concatenate([b.to_dense().ravel() for b in operator.blocks.values()])

    exact = dense(curvature.Fisher(samples=None))
    # The exact Fisher by brute force: the last layer's block is sum_n (a a') (x) (diag q - q q').
    hidden = jnp.tanh(x @ params[0])
    q = jax.nn.softmax(hidden @ params[1])
    output = (jax.vmap(jnp.diag)(q) - q[:, :, None] * q[:, None, :]).mean(0)
    last = jnp.kron(hidden.T @ hidden / 12, output)
    np.testing.assert_allclose(exact[-last.size :], last.ravel(), atol=1e-14)

    counts, errors = [1, 4, 16, 64, 256, 1024], []
    for count in counts:
        sampled = jax.jit(lambda key, count=count: dense(curvature.Fisher(samples=count), key))
        keys = jax.random.split(jax.random.key(2), 8)
        errors.append(np.mean([np.linalg.norm(sampled(k) - exact) ** 2 for k in keys]) ** 0.5)
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert -0.6 < slope < -0.4
    assert errors[-1] < 0.1 * np.linalg.norm(exact)


def lognormal_regression():
    """Kunstner, Balles and Hennig 2019, figure 1: y = 2 x + 2 + noise, one feature and a bias."""
    random = np.random.RandomState(0)
    x = random.lognormal(0.0, 0.75, (1000, 1))
    y = 2.0 * x + 2.0 + random.standard_normal((1000, 1))
    return jnp.asarray(x), jnp.asarray(y)


@pytest.mark.parametrize("start", [(0.0, 0.0), (4.5, 3.0), (1.0, 3.0), (3.0, 1.0)])
def test_h_one_natural_gradient_step_lands_on_the_optimum_and_no_empirical_one_does(start):
    x, y = lognormal_regression()
    design = np.concatenate([x, np.ones_like(x)], axis=1)
    optimum = np.linalg.lstsq(design, y, rcond=None)[0].ravel()
    np.testing.assert_allclose(optimum, [1.9804, 2.0386], atol=1e-4)

    def loss_fn(params, x, y):
        return curvature.losses.l2_loss(x @ params["w"] + params["b"], y).mean()

    params = {"w": jnp.full((1, 1), start[0]), "b": jnp.full((1,), start[1])}
    registry = curvature.register(loss_fn, params, x, y).override("*", block="dense")
    gradient = jax.grad(loss_fn)(params, x, y)

    def distance_after_a_step(kind):
        operator = jax.jit(curvature.Estimator(registry, kind))(params, x, y)
        after = jax.tree.map(jnp.subtract, params, operator.solve(gradient, damping=0.0))
        landed = np.array([after["w"].item(), after["b"].item()])
        return np.linalg.norm(landed - optimum) / np.linalg.norm(np.array(start) - optimum)

    assert distance_after_a_step(curvature.Fisher(samples=None)) < 1e-12
    # The empirical Fisher is larger by about the squared residuals: it hardly moves.
    assert 0.85 < distance_after_a_step(curvature.EmpiricalFisher()) < 1.05
