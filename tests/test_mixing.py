"""Examples that meet each other before the loss: batch norm, centring, similarities, graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from curvature import losses

N = 8
Net = Callable[[Any, jax.Array], jax.Array]


def params() -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    return {
        "w1": jax.random.normal(keys[0], (4, 3)) / 2,
        "w2": jax.random.normal(keys[1], (3, 2)) / 2,
        "scale": 1 + jax.random.normal(keys[2], (3,)) / 5,
    }


X = jax.random.normal(jax.random.key(5), (N, 4))
EDGES = (jnp.array([0, 1, 2, 5, 7, 3]), jnp.array([1, 2, 0, 4, 3, 6]))


def plain(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w1"] * p["scale"]) @ p["w2"]


def batch_norm(p: Any, x: jax.Array) -> jax.Array:
    h = x @ p["w1"]
    h = (h - h.mean(0)) * jax.lax.rsqrt(h.var(0) + 1e-3) * p["scale"]
    return jnp.tanh(h) @ p["w2"]


def running(p: Any, x: jax.Array) -> jax.Array:
    h = x @ p["w1"]
    stats = jax.lax.stop_gradient((h.mean(0), h.var(0)))
    return jnp.tanh((h - stats[0]) * jax.lax.rsqrt(stats[1] + 1e-3) * p["scale"]) @ p["w2"]


def two_norms(p: Any, x: jax.Array) -> jax.Array:
    h = batch_norm(p, x)
    return (h - h.mean(0)) / (h.std(0) + 0.1)


def graph(p: Any, x: jax.Array) -> jax.Array:
    h = jnp.tanh(x @ p["w1"] * p["scale"])
    senders, receivers = EDGES
    h = h + jax.ops.segment_sum(h[senders], receivers, x.shape[0])
    return h @ p["w2"]


def adjacency(p: Any, x: jax.Array) -> jax.Array:
    weights = jax.nn.softmax(x @ x.T)
    return weights @ plain(p, x)


def scanned(p: Any, x: jax.Array) -> jax.Array:
    def step(h: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = jnp.tanh(row @ p["w1"] * p["scale"] + 0.5 * h)
        return h, h @ p["w2"]

    return jax.lax.scan(step, jnp.zeros(3), x)[1]


MIXED: dict[str, Net] = {
    "batch norm": batch_norm,
    "batch norm and remat": jax.checkpoint(batch_norm),
    "centred": lambda p, x: plain(p, x) - plain(p, x).mean(0),
    "similarities": lambda p, x: plain(p, x) @ plain(p, x).T / 2,
    "halves": lambda p, x: plain(p, x)[: x.shape[0] // 2] - plain(p, x)[x.shape[0] // 2 :],
    "neighbours": lambda p, x: jnp.diff(plain(p, x), axis=0),
    "rolled": lambda p, x: plain(p, x) * jnp.roll(plain(p, x), 1, axis=0),
    "cumulated": lambda p, x: jnp.cumsum(plain(p, x), axis=0) / 3,
    "sorted": lambda p, x: jnp.sort(plain(p, x), axis=0),
    "reversed": lambda p, x: plain(p, x) + plain(p, x)[::-1],
    "softmax over the batch": lambda p, x: 3 * jax.nn.softmax(plain(p, x), axis=0),
    "groups": lambda p, x: plain(p, x).reshape((-1, 2, 2)).sum(1),
    "distances": lambda p, x: jnp.abs(plain(p, x)[:, None] - plain(p, x)[None]).sum(-1),
    "graph": graph,
    "adjacency": adjacency,
    "scan over examples": scanned,
}
APART: dict[str, Net] = {
    "plain": plain,
    "running statistics": running,
    "layer norm": lambda p, x: jax.nn.standardize(x @ p["w1"] * p["scale"]) @ p["w2"],
    "chosen outputs": lambda p, x: plain(p, x)[jnp.arange(x.shape[0]), jnp.arange(x.shape[0]) % 2][
        :, None
    ],
    "taken along": lambda p, x: jnp.take_along_axis(
        plain(p, x), (jnp.arange(x.shape[0]) % 2)[:, None], axis=1
    ),
    "mapped": lambda p, x: jax.lax.map(lambda row: plain(p, row), x),
    "vectorised": lambda p, x: jax.vmap(plain, (None, 0))(p, x),
    "padded": lambda p, x: jnp.pad(plain(p, x), ((0, 2), (0, 0))),
    "flattened positions": lambda p, x: (
        plain(p, x.reshape((-1, 2, 2)).repeat(2, -1).reshape((-1, 4))).reshape((-1, 2, 2)).sum(1)
    ),
    "scan over features": lambda p, x: jax.lax.scan(
        lambda h, w: (h + plain(p, x * w), None), jnp.zeros((x.shape[0], 2)), jnp.ones(2)
    )[0],
}


def registered(net: Net) -> tuple[curvature.Registry, Callable[[Any], jax.Array]]:
    """The registry of squared errors of weight 1, and the outputs, whose J'J is the curvature."""

    def loss(p: Any, x: jax.Array) -> jax.Array:
        return losses.l2_loss(net(p, x)).sum()

    return curvature.register(loss, params(), X), lambda p: net(p, X)


def exact(out: Callable[[Any], jax.Array]) -> dict[str, np.ndarray]:
    p = params()
    jacobian = jax.jacobian(out)(p)
    return {name: np.asarray(jacobian[name]).reshape((-1, p[name].size)) for name in p}


@pytest.mark.parametrize("name", MIXED)
def test_says_where_examples_meet(name: str) -> None:
    registry, _ = registered(MIXED[name])
    meetings = {layer.name: layer.meeting for layer in registry.layers}
    assert "test_mixing.py" in meetings["w1"], meetings
    assert "Examples meet" in str(registry) and meetings["w1"] in str(registry)
    for block in ("kronecker", "diagonal", "ekfac"):
        estimator = curvature.Estimator(registry.with_blocks(block), curvature.GaussNewton())
        with pytest.raises(ValueError, match=r"examples meet .*test_mixing.py:\d+"):
            estimator(params(), X)


@pytest.mark.parametrize("name", APART)
def test_examples_that_do_not_meet(name: str) -> None:
    registry, out = registered(APART[name])
    assert not any(layer.mixed for layer in registry.layers), str(registry)
    assert "Examples meet" not in str(registry)
    if name == "flattened positions" or not all(x.structured for x in registry.layers):
        return
    op = curvature.Estimator(registry.with_blocks("diagonal"), curvature.GaussNewton())(
        params(), X, key=jax.random.key(0)
    )
    if any(layer.pooled for layer in op.layers):
        return
    found = op.diagonal()
    for layer, columns in exact(out).items():
        np.testing.assert_allclose(found[layer].ravel(), (columns**2).sum(0), rtol=1e-6)


def test_batch_norm_leaves_what_comes_after_it() -> None:
    registry, _ = registered(batch_norm)
    assert {x.name for x in registry.layers if x.mixed} == {"w1"}
    registry, _ = registered(two_norms)
    assert {x.name for x in registry.layers if x.mixed} == {"w1", "scale", "w2"}


def mean_of(estimator: curvature.Estimator, name: str, draws: int = 2000) -> tuple[Any, Any]:
    """The mean of a block's matrix over keys, and its standard error."""

    def matrix(key: jax.Array) -> jax.Array:
        return estimator(params(), X, key=key).blocks[name].to_dense()

    found = jax.lax.map(matrix, jax.random.split(jax.random.key(3), draws), batch_size=200)
    return np.asarray(found.mean(0)), np.asarray(found.std(0)) / draws**0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXED)
def test_blocks_of_gradients_are_right_in_the_mean(name: str) -> None:
    registry, out = registered(MIXED[name])
    columns = exact(out)["w1"]
    for block in ("dense", "diagonal", "identity"):
        estimator = curvature.Estimator(registry.with_blocks(block), curvature.GaussNewton())
        mean, error = mean_of(estimator, "w1")
        truth = columns.T @ columns
        if block == "diagonal":
            truth = np.diag(np.diag(truth))
        if block == "identity":
            truth = np.trace(truth) / len(truth) * np.eye(len(truth))
        np.testing.assert_array_less(np.abs(mean - truth), 6 * error + 1e-6 * np.abs(truth).max())


KINDS = {
    "exact Fisher": curvature.Fisher(samples=None),
    "Fisher": curvature.Fisher(samples=2),
    "probes": curvature.GaussNewton(probes=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["batch norm", "centred", "similarities"])
def test_every_kind_has_the_trace(name: str, kind: str) -> None:
    registry, out = registered(MIXED[name])
    for block in ("ekfac", "diagonal"):
        estimator = curvature.Estimator(registry.with_blocks(block), KINDS[kind])
        keys = jax.random.split(jax.random.key(3), 2000)
        run = lambda key: estimator(params(), X, key=key).blocks["w1"].trace()  # noqa: E731,B023
        found = np.asarray(jax.lax.map(run, keys, batch_size=200))
        truth = (exact(out)["w1"] ** 2).sum()
        assert abs(found.mean() - truth) < 6 * found.std() / len(keys) ** 0.5


@pytest.mark.slow
def test_empirical_fisher_sums_the_scores_of_outputs() -> None:
    registry, out = registered(batch_norm)
    jacobian = exact(out)["w1"].reshape((N, 2, -1))
    scores = np.einsum("nci,nc->ni", jacobian, np.asarray(out(params())))
    estimator = curvature.Estimator(registry.with_blocks("dense"), curvature.EmpiricalFisher())
    mean, error = mean_of(estimator, "w1")
    np.testing.assert_array_less(np.abs(mean - scores.T @ scores), 6 * error + 1e-9)


@pytest.mark.slow
def test_kronecker_blocks_add_up_the_rows_of_every_output() -> None:
    registry, _ = registered(batch_norm)
    estimator, p = curvature.Estimator(registry, curvature.GaussNewton()), params()

    def of_rows(shift: jax.Array) -> jax.Array:  # identity weights: rows are inputs of the norm
        return batch_norm({**p, "w1": jnp.eye(3)}, X @ p["w1"] + shift)

    g = jax.jacobian(of_rows)(jnp.zeros((N, 3)))
    expected = jnp.kron(X.T @ X / N, jnp.einsum("ncri,ncrj->ij", g, g))
    mean, error = mean_of(estimator, "w1")
    np.testing.assert_array_less(np.abs(mean - expected), 6 * error + 1e-9)


def conv_norm(p: Any, x: jax.Array) -> jax.Array:
    h = jax.lax.conv_general_dilated(
        x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    h = h + p["c"]
    h = (h - h.mean((0, 1, 2))) * jax.lax.rsqrt(h.var((0, 1, 2)) + 1e-3)
    return jnp.tanh(h).mean((1, 2)) @ p["w"]


def looked_up(p: Any, x: jax.Array) -> jax.Array:
    h = p["k"][x]
    return (h - h.mean(0)) @ p["w"]


@pytest.mark.slow
@pytest.mark.parametrize("net", [conv_norm, looked_up])
def test_convolutions_and_embeddings_before_batch_norm(net: Net) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    if net is conv_norm:
        x = jax.random.normal(keys[0], (6, 3, 3, 2))
        p = {"k": jax.random.normal(keys[1], (2, 2, 2, 3)), "c": jnp.ones(3)}
    else:
        x, p = jnp.array([0, 1, 1, 2, 3, 2]), {"k": jax.random.normal(keys[1], (4, 3))}
    p["w"] = jax.random.normal(keys[2], (3, 2))
    registry = curvature.register(lambda p, x: losses.l2_loss(net(p, x)).sum(), p, x)
    estimator = curvature.Estimator(registry.with_blocks("diagonal"), curvature.GaussNewton())
    assert {x.name for x in registry.layers if x.mixed} == {registry.layers[-2].name}
    jacobian = jax.jacobian(lambda p: net(p, x))(p)["k"]
    truth = np.asarray(jacobian.reshape((-1, *p["k"].shape)) ** 2).sum(0)

    def diagonal(key: jax.Array) -> jax.Array:
        return estimator(p, x, key=key).diagonal()["k"]

    found = jax.lax.map(diagonal, jax.random.split(jax.random.key(1), 2000), batch_size=200)
    error = found.std(0) / len(found) ** 0.5
    np.testing.assert_array_less(np.abs(found.mean(0) - truth), 6 * error + 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["batch norm", "centred"])
def test_compare_says_what_it_estimates(name: str) -> None:
    registry, out = registered(MIXED[name])
    found = curvature.compare(
        registry, params(), [(X,)], key=jax.random.key(0), progress=False, directions=False
    )
    assert any("Examples meet" in note and "w1" in note for note in found.notes), found.notes
    columns = exact(out)
    truths = {n: (columns[n] ** 2).sum() for n in columns}
    truths["whole network"] = sum(truths.values())
    for block in found.blocks:
        if block.name not in truths:
            continue
        trace = block.spectra["Fisher"].trace
        off = abs(trace.value - truths[block.name])
        mixed = any(x.name == block.name and x.mixed for x in registry.layers)
        assert trace.error is not None and off < 2 * trace.error + 1e-9
        assert not mixed or trace.error > 0.01 * trace.value
        structured = block.structured.get("Fisher", {})
        assert not (mixed and "diagonal" in structured)
        if "kronecker" in structured:
            assert 0.3 < structured["kronecker"].trace_ratio.value < 6
