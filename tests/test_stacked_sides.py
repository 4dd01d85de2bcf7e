"""Diagonal factor sides on stacked layers: the update is that of the same layers one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal

import curvature

BLOCKS = ("kronecker", "kronecker_reduce", "kronecker_weighted", "foof", "ekfac")
METHODS = {
    "cholesky": curvature.Cholesky(),
    "newton-schulz": curvature.NewtonSchulz(),
    "eigh": curvature.Eigh(),
    "qr": curvature.QR(),
}
LAYERS, EXPERTS, ROWS = 2, 3, 7
STACKS = {"scan": (LAYERS,), "experts": (EXPERTS,), "both": (LAYERS, EXPERTS)}
# Both weights are between widths 3 and 5, so a limit of 4 makes one side of each diagonal.
SIDES = {"full": 8, "one wide": 4, "both wide": 2, "one-hot": 8}


def inputs(side):
    if side == "one-hot":
        return jax.random.randint(jax.random.key(1), (ROWS,), 0, 5)
    return normal(1, ROWS, 3)


def weights(stack, side):
    up = 5 if side == "one-hot" else 3
    return {"up": normal(2, *stack, up, 5), "down": normal(3, *stack, 5, 3)}


def block(h, x, side, apply, p):
    """One residual block; `apply` multiplies rows by a weight."""
    rows = jax.nn.one_hot(x, 5) if side == "one-hot" else h
    return h + apply(jnp.tanh(apply(rows, p["up"], first=True)), p["down"], first=False)


def start(x, side):
    return normal(4, ROWS, 3) if side == "one-hot" else x


def dense(rows, w, first):
    return rows @ w


def experts(rows, w, first):
    """Rows of its own for every expert, and the mean over experts behind the second weight."""
    if first:
        return jnp.einsum("end,edf->enf", jnp.broadcast_to(rows, (EXPERTS, *rows.shape)), w)
    return jnp.einsum("enf,efd->end", rows, w).mean(0)


def error(h):
    return curvature.losses.l2_loss(h, jnp.ones_like(h)).mean()


def stacked(name, side, p, x):
    apply = dense if name == "scan" else experts
    h = start(x, side)
    if name == "experts":
        return error(block(h, x, side, apply, p))
    return error(jax.lax.scan(lambda h, p: (block(h, x, side, apply, p), None), h, p)[0])


def apart(name, side, p, x):
    """The same with an array for every copy: `p["up"][layer][expert]`."""
    h = start(x, side)
    for layer in range(LAYERS if name != "experts" else 1):
        copies = zip(p["up"][layer], p["down"][layer], strict=True)
        h = sum(block(h, x, side, dense, {"up": u, "down": d}) for u, d in copies) / len(
            p["up"][layer]
        )
    return error(h)


def split(name, tree):
    lead = {"scan": (LAYERS, 1), "experts": (1, EXPERTS), "both": (LAYERS, EXPERTS)}[name]

    def one(w):
        w = w.reshape((*lead, *w.shape[-2:]))
        return [list(copies) for copies in w]

    return {key: one(w) for key, w in tree.items()}


def updates(loss_fn, params, x, side, settings):
    """Of every setting the update of a second step, in which inverses of the first are at work.

    Corrections move when their layer's turn comes, and copies apart have turns of their own: of a
    spread EKFAC it is the first step's.
    """
    registry = curvature.register(loss_fn, params, x)
    out = []
    for chosen, method, spread in settings:
        tx = curvature.scale_by_curvature(
            registry.with_blocks(chosen),
            curvature.EmpiricalFisher(),
            damping=0.1,
            refresh=METHODS[method],
            refresh_every=2,
            spread=spread,
            max_factor_dim=SIDES[side],
        )
        state, grads = tx.init(params), jax.grad(loss_fn)(params, x)
        for _ in range(1 if spread and chosen == "ekfac" else 2):
            step, state = tx.update(grads, state, params, loss_args=(x,))
        out.append((step, state.stats.failed_refreshes))
    return out


def compare(name, side, settings):
    params, x = weights(STACKS[name], side), inputs(side)
    one, many = (functools.partial(f, name, side) for f in (stacked, apart))

    @jax.jit
    def both(params, x):
        found = updates(one, params, x, side, settings)
        expected = updates(many, split(name, params), x, side, settings)
        return found, expected

    for setting, (found, failed), (expected, _) in zip(settings, *both(params, x), strict=True):
        assert failed == 0, setting
        assert all(bool(jnp.any(u != 0)) for u in jax.tree.leaves(found))
        jax.tree.map(
            lambda a, b, s=setting: np.testing.assert_allclose(
                a, b, rtol=1e-7, atol=1e-9, err_msg=str(s)
            ),
            split(name, found),
            expected,
        )


@pytest.mark.parametrize(
    ("name", "side", "chosen"),
    [("scan", "full", "foof"), ("experts", "both wide", "kronecker"), ("scan", "one-hot", "ekfac")],
)
def test_the_update_is_that_of_the_copies(name, side, chosen):
    compare(name, side, [(chosen, "cholesky", True)])


def in_turns():
    """Every stack and side with every method; one of half of them each is not exhaustive."""
    methods = list(METHODS)
    return [
        pytest.param(
            *(name, side, method),
            marks=()
            if methods[(i + j) // 2 % len(methods)] == method and (i + j) % 2 == 0
            else pytest.mark.exhaustive,
        )
        for i, name in enumerate(STACKS)
        for j, side in enumerate(SIDES)
        for method in methods
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side", "method"), in_turns())
def test_the_update_is_that_of_the_copies_for_every_block_and_method(name, side, method):
    compare(name, side, [(b, method, spread) for b in BLOCKS for spread in (False, True)])


def test_default_kfac_on_scanned_blocks_wider_than_a_factor_may_be():
    """Shapes alone: Llama-7B's hidden width is 11,008."""
    shape = jax.ShapeDtypeStruct

    def loss_fn(p, x):
        def one(h, w):
            return h + jnp.tanh(h @ w["up"]) @ w["down"], None

        return error(jax.lax.scan(one, x, p)[0])

    params = {"up": shape((2, 16, 11008), "float32"), "down": shape((2, 11008, 16), "float32")}
    x, key = shape((32, 16), "float32"), jax.eval_shape(lambda: jax.random.key(0))
    tx = curvature.kfac(curvature.register(loss_fn, params, x), 0.1)

    def step(grads, state, params, x, key):
        return tx.update(grads, state, params, loss_args=(x,), key=key)[0]

    found = jax.eval_shape(step, params, jax.eval_shape(tx.init, params), params, x, key)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, params)
