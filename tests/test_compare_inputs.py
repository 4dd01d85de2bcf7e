"""What `compare` is given: smaller last batches, kinds with arrays; and what it lets go of."""

from __future__ import annotations

import gc
import re
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from curvature import losses, metrics
from curvature.report.words import summary

KEY = jax.random.key(0)
FEW: dict[str, Any] = {"key": KEY, "progress": False, "directions": False, "approximations": ()}


def test_a_smaller_last_batch_counts_by_its_examples_beside_model_state() -> None:
    def loss_fn(p: Any, state: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return losses.l2_loss((x - state) @ p["w"], y).sum(-1).mean()

    def batch(n: int) -> tuple[jax.Array, ...]:
        return jnp.zeros(4), jax.random.normal(jax.random.key(n), (n, 4)), jnp.ones((n, 3))

    batches, p = [batch(32), batch(32), batch(20)], {"w": jnp.eye(4, 3)}
    registry = curvature.register(loss_fn, p, *batches[0])
    found = curvature.compare(registry, p, batches, **FEW)
    assert found.state.examples == 84
    assert not any("could not be used" in note for note in found.notes)
    x = np.concatenate([np.asarray(b[1]) for b in batches])
    trace = 3 * (x**2).sum() / 84
    np.testing.assert_allclose(found.blocks[0].spectra["Fisher"].trace.value, trace, rtol=1e-5)


def test_kinds_may_hold_arrays() -> None:
    def loss_fn(p: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return losses.l2_loss(x @ p["w"], y).mean()

    x, y, p = jax.random.normal(KEY, (16, 4)), jnp.ones((16, 3)), {"w": jnp.eye(4, 3)}
    registry = curvature.register(loss_fn, p, x, y)
    scale = (jnp.zeros((16, 3)), jnp.full((16, 3), 2.0))
    kind = curvature.GaussNewton(metric=metrics.FisherMetric(losses.Gaussian(), scale))
    kinds = {"Fisher": curvature.Fisher(None), "metric": kind}
    trace = curvature.Estimator(registry, kind)(p, x, y).trace()
    for _ in range(2):
        found = curvature.compare(registry, p, [(x, y)], kinds=kinds, **FEW)
        value = found.blocks[0].spectra["metric"].trace.value
        np.testing.assert_allclose(value, trace, rtol=1e-5)


@pytest.mark.slow
def test_what_the_loss_closes_over_is_let_go() -> None:
    class Data:
        x = jnp.ones((8, 4))

    def run() -> tuple[Any, Any]:
        data = Data()

        def loss_fn(p: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            return losses.l2_loss(x @ p["w"] + 0 * data.x[0, 0], y).mean()

        p, x, y = {"w": jnp.ones((4, 2))}, jnp.ones((8, 4)), jnp.zeros((8, 2))
        registry = curvature.register(loss_fn, p, x, y)
        curvature.compare(registry, p, [(x, y)], key=KEY, progress=False)
        return weakref.ref(data), weakref.ref(registry)

    refs = run()
    gc.collect()
    assert [ref() for ref in refs] == [None, None]


def test_equal_comparisons_share_what_has_been_compiled() -> None:
    traces = 0

    def loss_fn(p: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        return losses.l2_loss(x @ p["w"], y).mean()

    x, y, p = jnp.ones((8, 4)), jnp.zeros((8, 2)), {"w": jnp.ones((4, 2))}
    registry = curvature.register(loss_fn, p, x, y)
    counts = []
    for _ in range(3):
        before = traces
        curvature.compare(registry, p, [(x, y)], key=KEY, progress=False)
        counts.append(traces - before)
    assert counts[1] == counts[2] < counts[0] / 2


def test_other_trees_than_were_registered_are_refused_in_short() -> None:
    names = [f"a_module_of_a_long_name_number_{i}" for i in range(9)]
    p = {name: {"kernel": jnp.ones((2, 2))} for name in names}

    def loss_fn(p: Any, x: jax.Array) -> jax.Array:
        return losses.l2_loss(sum(x @ p[name]["kernel"] for name in names)).mean()

    x = jnp.ones((4, 2))
    registry = curvature.register(loss_fn, p, x)
    wrong = {name: {"inner": {"kernel": {"value": jnp.ones((2, 2))}}} for name in names}
    for params, batch in ((wrong, (x,)), (p, (x, x)), (p, {"x": x})):
        with pytest.raises(ValueError, match="another structure") as error:
            curvature.compare(registry, params, [batch], key=KEY, progress=False)
        assert len(str(error.value)) <= 300
        assert "curvature_flax.nnx" in str(error.value)
        assert params is p or names[0] in str(error.value)


@pytest.mark.slow
def test_steps_from_samples_name_the_samples() -> None:
    def loss_fn(p: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return losses.l2_loss(x @ p["w"], y).sum(-1).mean()

    x, p = jax.random.normal(KEY, (16, 4)), {"w": jnp.ones((4, 3))}
    y = 0.01 * jax.random.normal(jax.random.key(1), (16, 3)) + x @ p["w"]
    registry = curvature.register(loss_fn, p, x, y)
    for kind, named in ((curvature.Fisher(samples=4), True), (curvature.Fisher(None), False)):
        kinds = {"true": kind, "other": curvature.EmpiricalFisher()}
        found = curvature.compare(registry, p, [(x, y)], key=KEY, kinds=kinds, progress=False)
        text = " ".join(summary(found))
        assert (
            re.search(r"At damping 0.001, from 4 samples of .*, its step is", text) is not None
        ) == named
