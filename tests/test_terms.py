"""What of the loss's gradient no tagged loss covers, what has no gradient, and what counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from curvature import losses

X, Y = jax.random.normal(jax.random.key(0), (6, 3)), jax.random.normal(jax.random.key(1), (6, 2))
P = {
    "w": jax.random.normal(jax.random.key(2), (3, 2)),
    "s": jnp.array(0.5),
    "table": jax.random.normal(jax.random.key(3), (8, 2)),
}


def net(p, x):
    return x @ p["w"] + p["table"][:1]


def penalised(p):
    """Rows of the table that are not read have a gradient: that of the penalty."""
    return losses.l2_loss(net(p, X), Y).mean() + 1e-3 * (p["table"] ** 2).sum()


def task_weights(p):
    return jnp.exp(-p["s"]) * losses.l2_loss(net(p, X), Y).mean() + p["s"]


def in_targets(p):
    return losses.l2_loss(net(p, X), Y * p["s"]).mean()


def weighted_sum_in_a_scan(p):
    def step(total, xy):
        return total + losses.l2_loss(xy[0] @ p["w"], xy[1]).sum(), None

    return jax.lax.scan(step, p["s"], (X, Y))[0] + 0 * p["table"].sum()


def either(p):
    z = net(p, X)
    tagged = lambda z: losses.l2_loss(z, Y).mean()  # noqa: E731
    return jax.lax.cond(p["s"] > 0, tagged, lambda z: (z**3).mean(), z)


def handed_on(p):
    """A loss that a branch hands on, where another gives a value of its own."""
    z = net(p, X)
    tagged = losses.l2_loss(z, Y).mean()
    return jax.lax.cond(p["s"] > 0, lambda z, t: t, lambda z, t: (z**3).mean(), z, tagged)


def in_a_jit(p):
    return jax.jit(penalised)(p)


def rounded_penalty(p):
    """A rule of its own has a gradient where the function has none."""
    rounded = jax.custom_jvp(lambda x: jax.lax.stop_gradient(x))
    rounded.defjvps(lambda t, ans, x: t)
    return losses.l2_loss(net(p, X), Y).mean() + rounded(p["s"])


def metric(p):
    """What the loss does not depend on is no term of it."""
    jax.debug.print("{}", (p["s"] * losses.l2_loss(net(p, X), Y)).max())
    return losses.l2_loss(net(p, X), Y).mean() + jax.lax.stop_gradient(p["w"].sum())


FOUND = {
    penalised: {("add", ("table",))},
    task_weights: {("mul", ("s",)), ("add", ("s",))},
    in_targets: {("targets", ("s",))},
    weighted_sum_in_a_scan: {("scan", ("s",)), ("add", ("table",))},
    either: {("cond", ("table", "w"))},
    handed_on: {("cond", ("table", "w"))},
    in_a_jit: {("add", ("table",))},
    rounded_penalty: {("add", ("s",))},
    metric: set(),
}


def registered(loss):
    return curvature.register(lambda p, x: loss(p) + 0 * x.sum(), P, X)


@pytest.mark.parametrize("loss", FOUND, ids=lambda f: f.__name__)
def test_terms_that_no_tagged_loss_covers(loss):
    registry = registered(loss)
    names = sorted(P)
    found = {(t.what, tuple(names[i] for i in t.leaves)) for t in registry.untagged}
    assert found == FOUND[loss]
    assert all("test_terms.py:" in t.where for t in registry.untagged)
    lines = [line for line in str(registry).splitlines() if "no tagged loss covers" in line]
    assert len(lines) == len(found)


# What an untagged term reaches is known by leaf: there, rows that are not read count.
BY_ENTRY = [loss for loss in FOUND if loss not in (either, handed_on)]


@pytest.mark.parametrize("loss", BY_ENTRY, ids=lambda f: f.__name__)
def test_coverage_counts_entries_with_a_gradient(loss):
    """Those that `jax.grad` gives one, at parameters of no symmetry."""
    gradients = [jax.grad(loss)(P | {"s": jnp.array(s)}) for s in (-0.7, 0.7)]
    reached = sum(
        int(np.sum(np.any([g != 0 for g in pair], axis=0)))
        for pair in zip(*map(jax.tree.leaves, gradients), strict=True)
    )
    if loss is weighted_sum_in_a_scan:
        reached += P["table"].size  # a product with zero is a gradient that happens to be zero
    registry = registered(loss)
    assert sum(x.size for x in registry.layers if x.reached) == reached
    covered = sum(x.size for x in registry.layers if x.structured)
    assert registry.coverage == covered / reached
    idle = sum(leaf.size for leaf in P.values()) - reached
    assert (f"{idle:,} more have no gradient" in str(registry)) == (idle > 0)


@pytest.mark.parametrize("loss", [either, handed_on], ids=lambda f: f.__name__)
def test_a_branch_without_a_tagged_loss_sends_no_curvature_back(loss):
    registry = registered(loss)
    estimator = curvature.Estimator(registry, curvature.GaussNewton())
    key = jax.random.key(0)
    assert estimator(P, X, key=key).trace() > 0
    other = P | {"s": jnp.array(-1.0)}
    assert estimator(other, X, key=key).trace() == 0


def test_no_parameter_in_a_prediction_is_an_error():
    swapped = lambda p, x: losses.l2_loss(Y, x @ p["w"]).mean()  # noqa: E731
    frozen = lambda p, x: losses.l2_loss(jax.lax.stop_gradient(x @ p["w"]), Y).mean()  # noqa: E731
    words = r"No parameter reaches.*l2_loss at test_terms\.py:\d+.*They reach the targets at test_"
    with pytest.raises(ValueError, match=words):
        curvature.register(swapped, P, X)
    with pytest.raises(ValueError, match=r"No parameter reaches.*under stop_gradient"):
        curvature.register(frozen, P, X)


def test_a_loss_that_does_not_depend_on_its_tagged_losses_is_an_error():
    def loss_fn(p, x):
        z = x @ p["w"]
        return ((z - Y) ** 2).mean(), losses.l2_loss(z, Y).mean()

    with pytest.raises(ValueError, match=r"does not depend on its tagged losses \(l2_loss at"):
        curvature.register(loss_fn, P, X, has_aux=True)
