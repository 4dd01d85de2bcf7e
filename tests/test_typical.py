"""The typical curvature that relative damping goes by, from blocks made one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from jax.sharding import NamedSharding, PartitionSpec

import curvature
from curvature.blocks import BLOCKS, Kronecker
from curvature.optimizer.refresh.typical import typical
from curvature.statistics.stacks import Stacks

X, Y = normal(0, 8, 4), jnp.arange(8) % 3
PARAMS = {  # two of one shape, one used in both directions, and two without factors
    "a": normal(1, 4, 4),
    "b": normal(2, 4, 4) / 30,
    "tied": normal(3, 4, 2),
    "head": normal(4, 4, 3),
    "scale": normal(5, 4),
    "shift": normal(6, 4),
}
EXACT = curvature.Fisher(samples=None)


def loss_fn(p, x, y):
    h = jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) * p["scale"] + p["shift"]
    h = jnp.tanh(h @ p["tied"]) @ p["tied"].T
    return curvature.losses.softmax_cross_entropy_with_integer_labels(h @ p["head"], y).mean()


REGISTRY = curvature.register(loss_fn, PARAMS, X, Y)


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_it_is_the_mean_of_means_by_traces(block, filled):
    """Whatever fills up a stack, so that devices have equal shares of it."""
    over = NamedSharding(jax.make_mesh((4,), ("d",)), PartitionSpec("d")) if filled else None
    estimator = curvature.Estimator(REGISTRY.with_blocks(block), EXACT)
    stacks = Stacks(estimator, over=over)
    weight = jnp.asarray(0.3)  # of running averages
    statistics = stacks.together(estimator.statistics(PARAMS, X, Y))
    weighted = jax.tree.map(lambda x: weight * x, statistics)
    found = jax.jit(lambda s: typical(stacks.layers, s, weight))(weighted)

    plain = "kronecker" if block == "ekfac" else block  # it has the same factors
    blocks = curvature.Estimator(REGISTRY.with_blocks(plain), EXACT)(PARAMS, X, Y).blocks
    traces = {name: float(one.trace()) for name, one in blocks.items()}
    means = {layer.name: traces[layer.name] / layer.size for layer in REGISTRY.layers}
    outputs = {
        n: float(b.mean_eigenvalues[1]) for n, b in blocks.items() if isinstance(b, Kronecker)
    }
    for mine, all_means in ((found.whole, means), (found.output, outputs)):
        total = sum(traces[name] for name in all_means)
        expected = sum(traces[name] * mean for name, mean in all_means.items())
        np.testing.assert_allclose(mine, 0.3 * expected / total if total else 0, rtol=1e-9)
