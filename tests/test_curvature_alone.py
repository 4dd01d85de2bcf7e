"""The curvature of one function for the gradient of another: wave functions, policies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal

import curvature
import curvature.operators
from curvature import _jax

X = normal(0, 40, 3)
PARAMS = {"w": normal(1, 3, 4) / 2, "b": normal(2, 4), "v": normal(3, 4, 2) / 2}


def amplitude(p, x):
    """log|psi| and a phase."""
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


def log_psi(p, x):
    return amplitude(p, x)[:, 0]


def complex_log_psi(p, x):
    z = amplitude(p, x)
    return jax.lax.complex(z[:, 0], z[:, 1])


def deviations(real=True):
    d = normal(5, 40)
    d = d - d.mean()
    return d if real else jax.lax.complex(d, normal(6, 40))


def jacobian(f):
    flat = jax.jacrev(f)(PARAMS, X)
    return np.concatenate([flat[name].reshape(len(X), -1) for name in sorted(PARAMS)], axis=1)


def second_moment(j):
    return 4 * (j.T @ j) / len(j)


def test_the_curvature_is_four_times_the_second_moment_of_log_derivatives():
    loss_fn = lambda p, x: curvature.losses.log_amplitude(log_psi(p, x)).mean()  # noqa: E731
    expected = second_moment(jacobian(log_psi))
    operator = curvature.operators.fisher(loss_fn, PARAMS, [(X,)])
    np.testing.assert_allclose(
        curvature.operators.to_dense(operator), expected, rtol=1e-10, atol=1e-13
    )


def test_centered_it_is_the_covariance():
    """The normalised density's Fisher information, by an operator, and by blocks on average."""
    loss_fn = lambda p, x: curvature.losses.log_amplitude(  # noqa: E731
        log_psi(p, x), centered=True
    ).mean()
    j = jacobian(log_psi)
    expected = second_moment(j - j.mean(0))
    operator = curvature.operators.fisher(loss_fn, PARAMS, [(X,)])
    np.testing.assert_allclose(
        curvature.operators.to_dense(operator), expected, rtol=1e-10, atol=1e-13
    )
    registry = curvature.register(loss_fn, PARAMS, X).with_blocks("dense")
    estimator = curvature.Estimator(registry, curvature.EmpiricalFisher())
    draws = jax.vmap(lambda key: estimator.statistics(PARAMS, X, key=key)["w"]["values"])(
        jax.random.split(jax.random.key(0), 2000)
    )
    layer = next(x for x in registry.layers if x.name == "w")
    flat = jax.jacrev(log_psi)(PARAMS, X)
    rows = jax.vmap(lambda w, b: layer.gather([b, jnp.zeros((4, 2)), w]).ravel())(
        flat["w"], flat["b"]
    )
    expected = second_moment(rows - rows.mean(0))
    error = draws.std(0) / np.sqrt(len(draws)) + 1e-12
    assert (np.abs(draws.mean(0) - expected) < 5 * error).all()


def test_the_phase_counts_as_the_modulus_does():
    loss_fn = lambda p, x: curvature.losses.log_amplitude(complex_log_psi(p, x)).mean()  # noqa: E731
    phase = jacobian(lambda p, x: amplitude(p, x)[:, 1])
    expected = second_moment(jacobian(log_psi)) + second_moment(phase)
    operator = curvature.operators.fisher(loss_fn, PARAMS, [(X,)])
    np.testing.assert_allclose(
        curvature.operators.to_dense(operator), expected, rtol=1e-10, atol=1e-13
    )


@pytest.mark.parametrize("real", [True, False])
def test_the_gradient_is_that_of_the_energy(real):
    """2 E[Re(conj(E_L - E) grad log psi)]."""
    d = deviations(real)
    psi = log_psi if real else complex_log_psi
    loss_fn = lambda p, x: curvature.losses.log_amplitude(psi(p, x), d).mean()  # noqa: E731
    j = jacobian(log_psi)
    expected = 2 * (d.real[:, None] * j).mean(0)
    if not real:
        phase = jacobian(lambda p, x: amplitude(p, x)[:, 1])
        expected = expected + 2 * (d.imag[:, None] * phase).mean(0)
    found = jax.grad(loss_fn)(PARAMS, X)
    flat = np.concatenate([found[name].ravel() for name in sorted(PARAMS)])
    np.testing.assert_allclose(flat, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", [curvature.Fisher(), curvature.EmpiricalFisher()])
def test_samples_are_the_models_own(kind):
    """One pass gives all of it: no target is left to draw."""
    loss_fn = lambda p, x: curvature.losses.log_amplitude(log_psi(p, x)).mean()  # noqa: E731
    registry = curvature.register(loss_fn, PARAMS, X).with_blocks("dense")
    op = curvature.Estimator(registry, kind)(PARAMS, X, key=jax.random.key(0))
    exact = curvature.Estimator(registry, curvature.GaussNewton())(PARAMS, X)
    for name, block in op.blocks.items():
        np.testing.assert_allclose(block.to_dense(), exact.blocks[name].to_dense(), rtol=1e-10)


# What evaluates the loss ------------------------------------------------------------------------


def policy(p, x):
    """The curvature of a policy; what is minimised is another function."""
    logits = jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]
    labels = jnp.zeros(len(x), int)
    return curvature.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def clipped(p, x):
    """A surrogate as of PPO."""
    logits = jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]
    ratio = jnp.exp(jax.nn.log_softmax(logits)[:, 0] - jnp.log(0.5))
    return -jnp.minimum(ratio * deviations(), jnp.clip(ratio, 0.8, 1.2) * deviations()).mean()


@pytest.mark.parametrize("recipe", [curvature.kfac, curvature.ekfac, curvature.foof])
def test_levenberg_marquardt_refuses_a_loss_that_is_no_objective(recipe):
    alone = curvature.register(policy, PARAMS, X, objective=False)
    wave = curvature.register(
        lambda p, x: curvature.losses.log_amplitude(log_psi(p, x), deviations()).mean(), PARAMS, X
    )
    for registry in (alone, wave):
        with pytest.raises(ValueError, match=r"curvature alone.*damping as a number"):
            recipe(registry, curvature.QuadraticModel(), damping=curvature.LevenbergMarquardt())
        recipe(registry, curvature.QuadraticModel(), damping=1e-2)
        recipe(registry, 0.1)


def stepping(tx):
    """A step of the surrogate's gradient."""

    @jax.jit
    def step(params, state, key):
        grads = jax.grad(clipped)(params, X)
        updates, state = tx.update(grads, state, params, loss_args=(X,), key=key)
        return optax.apply_updates(params, updates), state

    return step


def test_adapters_say_it_as_well(standard_promotion):
    """Neither framework's register keeps it to itself."""
    import haiku as hk
    from flax import nnx

    import curvature_flax.nnx
    import curvature_haiku

    x, labels = normal(0, 8, 3), jnp.zeros(8, int)
    loss = curvature.losses.softmax_cross_entropy_with_integer_labels
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    transformed = hk.transform(lambda x: loss(hk.Linear(2)(x), labels).mean())
    params = transformed.init(jax.random.key(0), x)
    for objective in (True, False):
        one = curvature_flax.nnx.register(
            lambda model, x: loss(model(x), labels).mean(), model, x, objective=objective
        )
        other = curvature_haiku.register(
            transformed, params, jax.random.key(0), x, objective=objective
        )
        assert one.objective == other.objective == objective


@pytest.mark.parametrize("rate", [0.3, curvature.QuadraticModel()])
def test_other_gradients_are_what_is_followed(rate, standard_promotion):
    """The surrogate goes down by steps that are preconditioned by the policy's curvature."""
    registry = curvature.register(policy, PARAMS, X, objective=False)
    tx = curvature.kfac(registry, rate, damping=1e-2)
    step = stepping(tx)
    params, state = PARAMS, tx.init(PARAMS)
    for i in range(30):
        params, state = step(params, state, jax.random.key(i))
    curvature.check_progress(state)
    assert clipped(params, X) < clipped(PARAMS, X) - 0.05


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_a_loss_that_never_changes_is_noticed(constant):
    """Where nobody said that it is no objective: damping stays, and the loop is told."""

    def loss_fn(p, x):
        loss = policy(p, x)
        return loss - jax.lax.stop_gradient(loss) + constant

    registry = curvature.register(loss_fn, PARAMS, X)
    tx = curvature.kfac(registry, 0.1, damping=curvature.LevenbergMarquardt(0.1, every=1))
    step = stepping(tx)
    params, state = PARAMS, tx.init(PARAMS)
    with pytest.raises(RuntimeError, match="changed by nothing"):
        for i in range(20):
            params, state = step(params, state, jax.random.key(i))
            curvature.check_progress(state, limit=10)
    assert int(state.stats.unchanged) == 11
    assert float(state.next_damping) < 1


# Tags of others -----------------------------------------------------------------------------------


def test_tags_of_kfac_jax_are_the_identity():
    """A network that still carries them has the layers that it has without."""
    tag = _jax.tag_primitive("layer_tag", lambda y, x, w, b: y)

    def tagged(p, x, *, mark=True):
        y = x @ p["w"] + p["b"]
        y = tag.bind(y, x, p["w"], p["b"]) if mark else y
        return curvature.losses.squared_error(jnp.tanh(y) @ p["v"]).sum(-1).mean()

    found = []
    for mark in (True, False):
        registry = curvature.register(functools.partial(tagged, mark=mark), PARAMS, X)
        assert registry.coverage == 1, str(registry)
        assert {x.name for x in registry.layers} == {"v", "w"}
        op = curvature.Estimator(registry, curvature.GaussNewton())(PARAMS, X)
        found.append({name: block.to_dense() for name, block in op.blocks.items()})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), *found)


def test_a_tag_inside_a_rule_is_said_not_to_be_seen():
    """As FermiNet has it: the energy's derivative is a rule of its own."""

    @jax.custom_jvp
    def energy(p, x):
        return log_psi(p, x).sum()

    @energy.defjvp
    def rule(primals, tangents):
        value, slope = jax.jvp(lambda p, x: log_psi(p, x), primals, tangents)
        curvature.losses.log_amplitude(value)
        return value.sum(), slope.sum()

    with pytest.raises(ValueError, match=r"custom_jvp or custom_vjp \(there is one at"):
        curvature.register(energy, PARAMS, X)


def test_complex_outputs_are_told_what_to_do():
    with pytest.raises(TypeError, match="Stack the real and the imaginary part"):
        curvature.losses.squared_error(jnp.ones(2, complex))
