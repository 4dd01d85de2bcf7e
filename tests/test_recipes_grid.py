"""No recipe loses a run of the benchmark, at a tenth to ten times its rate and any batch size."""

import functools
import math

import jax
import optax
import pytest
from newcomers import Newcomer, runner

import curvature
from benchmarks import problems

RECIPES = {
    "kfac": (curvature.kfac, 0.1),
    "ekfac": (curvature.ekfac, 0.1),
    "foof": (curvature.foof, 0.1),
    "eigen_adam": (curvature.eigen_adam, 0.01),
    "soap": (functools.partial(curvature.eigen_adam, kind=curvature.Shampoo()), 0.01),
}
"""Each with the rate that the documentation starts from."""
STEPS = {16: 300, 1500: 60}
"""By batch size; the last is all of the data."""
SMALL = ("digits_classifier", "digits_autoencoder")
CASES = [(p, b, r) for p in SMALL for b in STEPS for r in RECIPES]
QUICK = [("digits_classifier", 1500, "eigen_adam")]


pytestmark = pytest.mark.usefixtures("library_defaults")


@functools.cache
def newcomer(name, batch_size):
    problem = problems.PROBLEMS[name]()

    def loss_fn(params, state, batch, key):
        return problem.loss_fn(params, problems.Batch(*batch)), state

    def init(seed):
        return problem.network.init(jax.random.key(seed)), {}

    return Newcomer(init, loss_fn, tuple(problem.data), batch_size)


@pytest.mark.parametrize(
    ("name", "batch_size", "recipe"),
    [pytest.param(*c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES],
)
def test_no_run_ends_above_its_start(name, batch_size, recipe):
    problem = newcomer(name, batch_size)
    make, usual = RECIPES[recipe]
    registry = problem.register()
    run = runner(problem, lambda rate: make(registry, rate), STEPS[batch_size])
    for rate in (usual / 10, usual, usual * 10):
        for seed in (0, 1):
            before, after, state = run(rate, seed)
            assert math.isfinite(after) and after < before, (rate, seed, before, after)
            assert optax.tree_utils.tree_get(state, "skipped") == 0
