"""Functions that return nothing (checks, `jax.debug.print`) in a loss, and other effects."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback
from jax.sharding import Mesh, PartitionSpec

import curvature
from curvature import metrics, operators, proximal
from curvature.trace.outputs import linearise

X = jax.random.normal(jax.random.key(0), (8, 3))
Y = jax.random.normal(jax.random.key(1), (8, 2))
PARAMS = {
    "w": jax.random.normal(jax.random.key(2), (3, 4)),
    "gain": jnp.linspace(0.5, 1.5, 4),
    "v": jax.random.normal(jax.random.key(3), (4, 2)),
}


def loss_with(check):
    """A loss that calls `check` on parameters, hidden values, predictions and losses."""

    def loss(p, x, y):
        check(p["w"])
        h = x @ p["w"]
        check(h)
        h = jnp.tanh(h * p["gain"])
        check(h)
        z = h @ p["v"]
        check(z)
        losses = curvature.losses.l2_loss(z, y)
        check(losses)
        check(losses.mean())
        return losses.mean()

    return loss


def looped(p, x, y, check):
    """The loss in a scan over micro-batches, with the check in the body."""

    def step(total, xy):
        loss = loss_with(check)(p, *xy)
        check(total)
        return total + loss / 2, None

    halves = jax.tree.map(lambda a: a.reshape(2, 4, -1), (x, y))
    return jax.lax.scan(step, jnp.zeros((), x.dtype), halves)[0]


def show(x):
    jax.debug.print("{}", x.sum())


def show_elsewhere(x):
    jax.debug.callback(lambda _: None, x)


def scanned(check):
    return lambda x: jax.lax.scan(lambda _, a: (None, check(a)), None, x.reshape(-1, 1))[0]


def mapped(check):
    return lambda x: jax.vmap(check)(x.reshape(-1, 1))


def chosen(check):
    return lambda x: jax.lax.cond(x.sum() > 0, check, lambda _: None, x)


def looping(check):
    """No gradient passes a while loop."""

    def body(state):
        check(state[1])
        return state[0] + 1, state[1]

    def check_twice(x):
        jax.lax.while_loop(lambda s: s[0] < 2, body, (0, jax.lax.stop_gradient(x)))

    return check_twice


def ruled(check):
    """In a function with a rule of its own."""

    @jax.custom_jvp
    def nothing(x):
        check(x)
        return ()

    nothing.defjvp(lambda primals, tangents: ((), ()))
    return nothing


CHECKS = {
    "jit of nothing": jax.jit(lambda x: None),
    "scan of nothing": scanned(lambda _: None),
    "cond of nothing": chosen(lambda _: None),
    "remat of nothing": jax.checkpoint(lambda x: None),
    "print": show,
    "callback": show_elsewhere,
    "print in jit": jax.jit(show),
    "print in scan": scanned(show),
    "print in vmap": mapped(show),
    "print in cond": chosen(show),
    "print in while": looping(show),
    "print in remat": jax.checkpoint(show),
    "print in custom_jvp": ruled(show),
    "print in scan in jit in cond": chosen(jax.jit(scanned(show))),
}
WRAPPED = {
    "plain": lambda check: loss_with(check),
    "in jit": lambda check: jax.jit(loss_with(check)),
    "in remat": lambda check: jax.checkpoint(loss_with(check)),
    "in scan": lambda check: functools.partial(looped, check=check),
}
REFERENCE = curvature.register(loss_with(lambda _: None), PARAMS, X, Y)


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_a_check_changes_nothing_that_is_found(check, wrap):
    registry = curvature.register(wrap(check), PARAMS, X, Y)
    found = [(x.name, x.kind, x.shape) for x in registry.layers]
    assert found == [(x.name, x.kind, x.shape) for x in REFERENCE.layers]


def all_checks(x):
    for name in ("jit of nothing", "print", "print in while", "print in scan in jit in cond"):
        CHECKS[name](x)


ALL = loss_with(all_checks)


def matrices(op):
    return {name: block.to_dense() for name, block in op.blocks.items()}


@pytest.mark.slow
@pytest.mark.parametrize("block", ["kronecker", "ekfac", "diagonal"])
def test_statistics_are_those_without_checks(block, capfd):
    """Samples are drawn, so that passes are vectorised."""

    @jax.jit
    def both(p, key):
        pair = [curvature.register(ALL, PARAMS, X, Y), REFERENCE]
        estimators = [curvature.Estimator(r.with_blocks(block), curvature.Fisher(2)) for r in pair]
        return [matrices(estimator(p, X, Y, key=key)) for estimator in estimators]

    found, expected = both(PARAMS, jax.random.key(5))
    jax.tree.map(np.testing.assert_allclose, found, expected)
    jax.effects_barrier()
    assert capfd.readouterr().out.count("\n") > 10  # they do print


@pytest.mark.slow
def test_steps_are_those_without_checks():
    def step(loss, p):
        registry = curvature.register(loss, PARAMS, X, Y)
        damping = curvature.LevenbergMarquardt(1.0)
        tx = curvature.kfac(registry, curvature.QuadraticModel(), damping=damping)
        gradient = jax.grad(loss)(p, X, Y)
        key = jax.random.key(0)
        return tx.update(gradient, tx.init(p), p, loss_args=(X, Y), key=key)[0]

    both = jax.jit(lambda p: (step(ALL, p), step(loss_with(lambda _: None), p)))
    jax.tree.map(np.testing.assert_allclose, *both(PARAMS))


@pytest.mark.slow
def test_exact_operators_are_those_without_checks():
    @jax.jit
    def products(p):
        found = []
        for loss in (ALL, loss_with(lambda _: None)):
            outputs = linearise(loss, False, p, (X, Y))
            found.append(outputs.pullback(outputs.pushforward(p)))
        return found

    jax.tree.map(np.testing.assert_allclose, *products(PARAMS))
    for make in (operators.hessian, operators.gauss_newton):
        pair = [make(loss, PARAMS, [(X, Y)]) for loss in (ALL, loss_with(lambda _: None))]
        jax.tree.map(np.testing.assert_allclose, *(op @ PARAMS for op in pair))


@pytest.mark.slow
def test_a_comparison_is_made_of_a_loss_with_checks():
    registry = curvature.register(loss_with(scanned(show)), PARAMS, X, Y)
    kinds = {"exact": curvature.GaussNewton(), "drawn": curvature.Fisher(2)}
    found = curvature.compare(
        registry, PARAMS, [(X, Y)], kinds=kinds, key=jax.random.key(0), damping=1.0
    )
    assert not [note for note in found.notes if "Error" in note]


@pytest.mark.slow
def test_a_proximal_step_is_made_of_functions_with_checks():
    def f(p):
        all_checks(p["w"])
        return jnp.tanh(X @ p["w"]) @ p["v"]

    def value(z):
        all_checks(z)
        return ((z - Y) ** 2).mean()

    w = {name: PARAMS[name] for name in "wv"}
    proximal.natural_gradient_step(f, value, metrics.Euclidean(), w, 1.0)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", ["jit of nothing", "print", "print in scan", "callback"])
def test_a_check_in_a_shard_map(name, check_vma):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    parts = (PartitionSpec(), PartitionSpec("data"), PartitionSpec("data"))

    def sharded(check):
        one = lambda p, x, y: jax.lax.pmean(loss_with(check)(p, x, y), "data")  # noqa: E731
        return jax.shard_map(
            one, mesh=mesh, in_specs=parts, out_specs=PartitionSpec(), check_vma=check_vma
        )

    def trace(check):
        registry = curvature.register(sharded(check), PARAMS, X, Y)
        estimator = curvature.Estimator(registry, curvature.Fisher(1))
        return jax.jit(lambda p: estimator(p, X, Y, key=jax.random.key(0)).trace())(PARAMS)

    np.testing.assert_allclose(trace(CHECKS[name]), trace(lambda _: None))


def ordered(x):
    jax.debug.print("{}", x.sum(), ordered=True)


def kept(x):
    jax.new_ref(x)[...] += 1


def written(x):
    io_callback(lambda _: None, None, x)


@pytest.mark.parametrize("wrap", [WRAPPED["plain"], WRAPPED["in jit"]], ids=["plain", "in jit"])
@pytest.mark.parametrize(
    ("check", "words"),
    [
        (ordered, r"debug_\w+ \(ordered\) at test_effects\.py:\d+\..*ordered=False"),
        (kept, r"ref.* at test_effects\.py:\d+"),
        (written, r"io_callback at test_effects\.py:\d+"),
        (scanned(written), r"io_callback at test_effects\.py:\d+"),
    ],
)
def test_an_effect_that_cannot_be_kept_is_refused_at_registration(check, words, wrap):
    with pytest.raises(ValueError, match=words):
        curvature.register(wrap(check), PARAMS, X, Y)
