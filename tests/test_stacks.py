"""Layers of one shape kept together: the numbers of layers one by one, in a short program.

Also the windows in which a stack is renewed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal

import curvature
from curvature.statistics.stacks import Stacks, stacks

pytestmark = pytest.mark.usefixtures("standard_promotion")
EXACT = curvature.GaussNewton()


# Three unrolled layers of one shape, two more of it in a loop, one of it with a bias, one that is
# a part of an array, and others.
PARAMS = {
    "a": normal(0, 4, 4),
    "b": normal(1, 4, 4),
    "c": normal(2, 4, 4),
    "scanned": normal(3, 2, 4, 4) / 2,
    "biased": {"w": normal(4, 4, 4), "b": jnp.ones(4)},
    "wide": normal(5, 4, 8),
    "last": normal(6, 4, 2),
    "scales": [jnp.ones(4), jnp.ones(4)],
}
ARGS = (normal(7, 16, 4), normal(8, 16, 2))


def loss(p, x, y):
    h = jnp.tanh(x @ p["a"]) * p["scales"][0]
    h = jnp.tanh(h @ p["b"]) * p["scales"][1]
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["scanned"])
    h = jnp.tanh(h @ p["c"]) + jnp.tanh(h @ p["biased"]["w"] + p["biased"]["b"])
    h = h @ p["wide"][:, :4] + jnp.tanh(h @ p["wide"][:, 4:])
    return curvature.losses.l2_loss(h @ p["last"], y).mean()


REGISTRY = curvature.register(loss, PARAMS, *ARGS)


def close(found, expected, tolerance=1e-10):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance),
        found,
        expected,
    )


def test_layers_of_one_shape_are_one_stack():
    found = {stack.name: stack for stack in stacks(REGISTRY.layers, PARAMS)}
    assert found["a (+5)"].shape == (7, 4, 4)  # a, b, c, two scanned ones, both parts of `wide`
    assert sorted(stack.shape for stack in found.values()) == [
        (1, 4, 2),
        (1, 5, 4),
        (2, 4),
        (7, 4, 4),
    ]
    alone = stacks(REGISTRY.layers, PARAMS, alone=True)
    assert [stack.name for stack in alone] == [layer.name for layer in REGISTRY.layers]


@pytest.mark.parametrize("alone", [False, True])
def test_gathered_and_scattered_is_the_identity(alone):
    leaves = jax.tree.leaves(PARAMS)
    back = [jnp.zeros_like(x) for x in leaves]
    for stack in stacks(REGISTRY.layers, PARAMS, alone=alone):
        block = stack.gather(leaves)
        assert block.shape == stack.shape
        for leaf, x in stack.scatter(block).items():
            back[leaf] = back[leaf] + x
    close(back, leaves, 0)


def test_statistics_go_together_and_apart():
    for block in ("ekfac", "dense", "identity"):
        estimator = curvature.Estimator(REGISTRY.with_blocks(block), EXACT)
        statistics = jax.jit(estimator.statistics)(PARAMS, *ARGS)
        whole = Stacks(estimator)
        together = whole.together(statistics)
        close(whole.apart(together), statistics, 0)
        shapes = jax.tree.map(jnp.shape, (whole.zeros(), together))
        assert shapes[0] == shapes[1]
        expected, found = estimator.operator(statistics), whole.operator(together)
        close(found @ PARAMS, expected @ PARAMS)
        close(found.trace(), expected.trace())


GIVEN = {"kind": EXACT, "spread": False, "refresh_every": 2, "warmup_steps": 1}
ADAM = optax.scale_by_adam(eps=1e-3)
RECIPES = {
    "kfac": lambda r, **o: curvature.kfac(r, 0.1, damping=0.1, statistics_every=1, **GIVEN, **o),
    "relative": lambda r: RECIPES["kfac"](r, relative_damping=True),
    "newton-schulz": lambda r: RECIPES["kfac"](r, refresh=curvature.NewtonSchulz()),
    "qr": lambda r: RECIPES["kfac"](r, refresh=curvature.QR()),
    "exact damping": lambda r: RECIPES["kfac"](r, refresh=curvature.Eigh(factored=False)),
    "ekfac": lambda r: RECIPES["kfac"](r.with_blocks("ekfac")),
    "foof": lambda r: RECIPES["kfac"](r.with_blocks("foof")),
    "dense": lambda r: RECIPES["kfac"](r.with_blocks("dense")),
    "identity": lambda r: RECIPES["kfac"](r.with_blocks("identity")),
    "narrow": lambda r: RECIPES["kfac"](r, max_factor_dim=3),
    "grafted": lambda r: RECIPES["kfac"](r, graft=ADAM),
    "in_eigenbasis": lambda r: curvature.in_eigenbasis(r, ADAM, statistics_every=1, **GIVEN),
    "shampoo": lambda r: curvature.in_eigenbasis(
        r, ADAM, curvature.Shampoo(), **{k: x for k, x in GIVEN.items() if k != "kind"}
    ),
}


def trained(tx, steps=4):
    params, state = PARAMS, tx.init(PARAMS)

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss)(params, *ARGS)
        updates, state = tx.update(grads, state, params, loss_args=ARGS)
        return jax.tree.map(lambda p, u: p - 0.01 * u, params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


QUICK, SLOW = ("ekfac", "in_eigenbasis"), ("kfac", "qr", "dense", "grafted", "shampoo")
RARE = (pytest.mark.slow, pytest.mark.exhaustive)


@pytest.mark.parametrize(
    "recipe",
    [
        *QUICK,
        *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW),
        *(pytest.param(x, marks=RARE) for x in RECIPES if x not in QUICK + SLOW),
    ],
)
def test_training_is_that_of_layers_one_by_one(recipe, monkeypatch):
    params, state = trained(RECIPES[recipe](REGISTRY))
    alone = lambda estimator, **_: Stacks(estimator, alone=True)  # noqa: E731
    monkeypatch.setattr(curvature.optimizer.options, "Stacks", alone)
    expected, other = trained(RECIPES[recipe](REGISTRY))
    assert len(jax.tree.leaves(state)) < len(jax.tree.leaves(other))
    close(params, expected, 1e-7)


def test_averages_are_by_layer():
    estimator = curvature.Estimator(REGISTRY, EXACT)
    expected = jax.jit(estimator.statistics)(PARAMS, *ARGS)
    for recipe, names in (("kfac", expected), ("in_eigenbasis", ("a", "scanned"))):
        _, state = trained(RECIPES[recipe](REGISTRY), 1)
        found = curvature.averages(REGISTRY, state)
        assert set(names) <= set(found)
        close(found, {name: expected[name] for name in found})
    with pytest.raises(ValueError, match="another registry's"):
        curvature.averages(REGISTRY.with_blocks("diagonal"), state)


# Windows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "turns"),
    [
        ("kronecker", 3),
        ("ekfac", 2),
        pytest.param("kronecker", 9, marks=pytest.mark.slow),
        pytest.param("ekfac", 9, marks=pytest.mark.slow),
    ],
)
def test_every_copy_has_its_turn(block, turns):
    """Between its turns an inverse stays; at it, it is that of the averages then."""
    make = functools.partial(
        curvature.scale_by_curvature, REGISTRY.with_blocks(block), EXACT, damping=0.1
    )
    tx = make(refresh_every=turns, warmup_steps=2)
    always = make(refresh_every=1)
    update, fresh = jax.jit(tx.update), jax.jit(always.update)
    state, other = tx.init(PARAMS), always.init(PARAMS)
    renewed = jax.tree.map(lambda x: np.zeros(len(x), int), state.inverse)
    for t in range(2 + turns):
        args = (ARGS[0] * (1 + t / 9), ARGS[1])
        grads = jax.grad(loss)(PARAMS, *args)
        before = state.inverse
        _, state = update(grads, state, PARAMS, loss_args=args)
        _, other = fresh(grads, other, PARAMS, loss_args=args)
        if t < 2:
            close(state.inverse, other.inverse)
            continue
        for name, arrays in state.inverse.items():
            for field, x in arrays.items():
                changed = [
                    not np.array_equal(*pair) for pair in zip(x, before[name][field], strict=True)
                ]
                renewed[name][field] += changed
                if block == "kronecker":  # corrections depend on the bases that came before
                    same = np.flatnonzero(changed)
                    close(x[same], other.inverse[name][field][same], 1e-8)
    assert all((x >= 1).all() and (x <= 2).all() for x in jax.tree.leaves(renewed))
    copies = sum(x.size for x in jax.tree.leaves(renewed))
    assert sum(x.sum() for x in jax.tree.leaves(renewed)) <= 1.5 * copies


def test_one_copy_that_fails_keeps_its_inverse_alone():
    """A dead input makes one factor of three singular; its neighbours are renewed."""
    params = {name: PARAMS[name] for name in "abc"}
    dead = jnp.ones(4).at[0].set(0)

    def three(p, x):
        h = sum(jnp.tanh((x * m) @ p[name]) for name, m in zip("abc", (1, dead, 1), strict=True))
        return curvature.losses.l2_loss(h).mean()

    registry = curvature.register(three, params, ARGS[0])
    tx = curvature.scale_by_curvature(
        registry, EXACT, damping=lambda t: jnp.where(t == 1, 0.0, 0.1), refresh_every=1
    )
    state, states = tx.init(params), []
    for t in range(2):
        args = (ARGS[0] * (1 + t),)
        grads = jax.grad(three)(params, *args)
        _, state = jax.jit(tx.update)(grads, state, params, loss_args=args)
        states.append(state)
    ((before, after),) = ([s.inverse[n] for s in states] for n in states[0].inverse)
    for side in ("input", "output"):
        same = [np.array_equal(*pair) for pair in zip(before[side], after[side], strict=True)]
        assert same == [False, True, False]
    assert [s.stats.failed_refreshes for s in states] == [0, 1]


@pytest.mark.parametrize("recipe", ["kfac", "in_eigenbasis"])
def test_a_step_has_a_derivative(recipe):
    """In reverse as well, though a loop over the turns that are due would have none."""
    params = {name: PARAMS[name] for name in "abc"}

    def chain(p, x):
        return curvature.losses.l2_loss(jnp.tanh(x @ p["a"]) @ p["b"] @ p["c"]).mean()

    registry = curvature.register(chain, params, ARGS[0])
    given = {"kind": EXACT, "refresh_every": 2}
    tx = {
        "kfac": lambda: curvature.scale_by_curvature(registry, damping=0.1, **given),
        "in_eigenbasis": lambda: curvature.in_eigenbasis(
            registry, optax.trace(0.9), refresh=curvature.Eigh(), **given
        ),
    }[recipe]()

    @jax.jit
    def after(p):
        updates, _ = tx.update(jax.grad(chain)(p, ARGS[0]), tx.init(p), p, loss_args=ARGS[:1])
        return chain(jax.tree.map(lambda x, u: x - 0.1 * u, p, updates), ARGS[0])

    found = jax.jit(jax.grad(after))(params)
    direction = jax.tree.map(jnp.cos, params)
    up, down = (
        after(jax.tree.map(lambda p, d, h=h: p + h * d, params, direction)) for h in (1e-5, -1e-5)
    )
    np.testing.assert_allclose(optax.tree.vdot(found, direction), (up - down) / 2e-5, rtol=1e-5)


# The inner transformation of `in_eigenbasis` ------------------------------------------------------


def test_what_looks_at_whole_arrays_sees_every_layer():
    """With an eigenbasis that stays the identity it is the inner transformation, layer by layer."""
    params = {name: PARAMS[name] * 3**i for i, name in enumerate("abc")}
    registry = curvature.register(
        lambda p, x: curvature.losses.l2_loss(x @ p["a"] @ p["b"] @ p["c"]).mean(), params, ARGS[0]
    )
    inner = optax.chain(optax.scale_by_adam(), optax.scale_by_trust_ratio())
    tx = curvature.in_eigenbasis(registry, inner, curvature.Shampoo(), max_factor_dim=3)
    grads = jax.tree.map(jnp.cos, params)
    found, _ = tx.update(grads, tx.init(params), params)
    expected, _ = inner.update(grads, inner.init(params), params)
    close(found, expected)


# The program -------------------------------------------------------------------------------------


def operations(depth, make):
    """StableHLO operations of an update, and of what the unrolled net needs for its statistics."""
    params = {f"w{i}": normal(0, 4, 4) for i in range(depth)}

    def deep(p, x, y):
        for i in range(depth):
            x = x + jnp.tanh(x @ p[f"w{i}"])
        return curvature.losses.l2_loss(x, y).mean()

    args = (ARGS[0], normal(9, 16, 4))
    registry = curvature.register(deep, params, *args)
    tx = make(registry)
    grads, key = jax.tree.map(jnp.ones_like, params), jax.random.key(0)
    estimator = curvature.Estimator(registry)

    def count(function, *values):
        text = jax.jit(function).lower(*values).as_text()
        return sum("stablehlo." in line for line in text.splitlines())

    update = count(
        lambda g, s, p: tx.update(g, s, p, loss_args=args, key=key), grads, tx.init(params), params
    )
    return update, count(lambda p: estimator.statistics(p, *args, key=key), params)


@pytest.mark.parametrize(
    ("make", "most"),
    [(curvature.kfac, 35), (curvature.ekfac, 45), (curvature.eigen_adam, 30)],
    ids=["kfac", "ekfac", "eigen_adam"],
)
def test_a_layer_more_is_little_more_of_a_program(make, most):
    """Beyond the statistics of the net itself: gathered, scattered, added to its parameters."""
    (small, net_small), (large, net_large) = (
        operations(depth, lambda registry: make(registry, 0.1)) for depth in (4, 12)
    )
    assert (large - small - (net_large - net_small)) / 8 <= most
    # Its own passes, and products that are written once for all of a shape.
    assert (net_large - net_small) / 8 <= 20


@pytest.mark.parametrize("make", [curvature.kfac, curvature.eigen_adam])
def test_without_jit_later_turns_compile_nothing(make, compilations):
    """Neither the loop over turns, nor that over matrices of one size."""
    params = {name: normal(i, 4, 4) for i, name in enumerate("abc")}

    def deep(p, x, y):
        for w in p.values():
            x = jnp.tanh(x @ w)
        return curvature.losses.l2_loss(x, y).mean()

    args = (normal(8, 16, 4), normal(9, 16, 4))
    registry = curvature.register(deep, params, *args)
    tx = make(registry, 0.1, statistics_every=2, refresh_every=4, warmup_steps=0)
    state, gradient = tx.init(params), jax.jit(jax.grad(deep))
    for i in range(9):
        if i == 5:
            compilations.clear()
        grads = gradient(params, *args)
        updates, state = tx.update(grads, state, params, loss_args=args, key=jax.random.key(i))
        params = optax.apply_updates(params, updates)
    assert not compilations
