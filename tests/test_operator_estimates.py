"""Traces, diagonals, spectra and solves of operators, against dense ones."""

import functools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from cases import normal
from jax.flatten_util import ravel_pytree
from operator_cases import close, setup

import curvature
from curvature import operators


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


def test_a_solve_with_what_is_not_finite_says_so():
    """The iteration itself ends at zero, and calls that a success."""
    good, bad = (
        operators.hessian(lambda p, x: jnp.sum(x * p**2), jnp.ones(2), [jnp.array([1.0, x])])
        for x in (2.0, jnp.nan)
    )
    for op, v in ((bad, jnp.ones(2)), (good, jnp.array([jnp.nan, 1.0]))):
        with pytest.raises(RuntimeError, match="is not finite"):
            operators.solve(op, v)
        found = operators.solve(op, v, throw=False)
        assert np.isnan(found.value).all()
        assert not bool(found.result == lx.RESULTS.successful)


def test_operators_of_nothing(key):
    zero = 0.0 * operators.hessian(lambda p, x: jnp.sum(x * p**2), jnp.ones(2), [jnp.ones(2)])
    np.testing.assert_array_equal(operators.top_eigenpairs(zero, 1, key).residuals, 0)
    empty = operators.hessian(lambda p, x: jnp.sum(x), {}, [jnp.ones(2)])
    assert operators.to_dense(empty).shape == (0, 0)


# Memory ------------------------------------------------------------------------------------------
