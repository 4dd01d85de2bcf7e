"""No recipe loses a run, at a tenth to ten times its rate and any batch size.

The benchmark's two small problems, of which the classifier is the demo's, and README's first.
"""

import functools
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from newcomers import Newcomer, cross_entropy, runner

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
STEPS = {"sixteen": 300, "full": 60}
"""By batch size."""
PROBLEMS = ("digits_classifier", "digits_autoencoder", "readme")
CASES = [(p, b, r) for p in PROBLEMS for b in STEPS for r in RECIPES]
QUICK = [("digits_classifier", "full", "eigen_adam")]


pytestmark = pytest.mark.usefixtures("library_defaults")


def readme():
    """README's first example; its labels are noise."""
    params = {"w1": jnp.eye(8, 16), "b1": jnp.zeros(16), "w2": jnp.eye(16, 3)}
    data = jax.random.normal(jax.random.key(0), (64, 8)), jnp.arange(64) % 3

    def loss_fn(params, batch):
        logits = jnp.tanh(batch[0] @ params["w1"] + params["b1"]) @ params["w2"]
        return cross_entropy(logits, batch[1]).mean()

    return lambda key: params, loss_fn, data


def benchmark(name):
    problem = problems.PROBLEMS[name]()
    data = tuple(problem.data)
    return problem.network.init, lambda p, batch: problem.loss_fn(p, problems.Batch(*batch)), data


@functools.cache
def newcomer(name, batch_size):
    init, loss_fn, data = readme() if name == "readme" else benchmark(name)
    return Newcomer(
        init=lambda seed: (init(jax.random.key(seed)), {}),
        loss_fn=lambda params, state, batch, key: (loss_fn(params, batch), state),
        data=data,
        batch_size=16 if batch_size == "sixteen" else len(data[0]),
    )


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
