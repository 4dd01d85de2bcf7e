"""Rows without a loss do not enter the input factor: padding, ignored labels, dropped positions.

The brute force knows which rows are padding; the library finds them from the loss's weights.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal

import curvature

N, T = 4, 5
LENGTHS = jnp.array([3, 5, 1, 0])
MASK = jnp.arange(T) < LENGTHS[:, None]  # one example without any position
X, Y = normal(0, N, T, 3), normal(1, N, T, 2)
TOKENS = jax.random.randint(jax.random.key(2), (N, T), 0, 6)
KINDS = [curvature.GaussNewton(), curvature.Fisher(2), curvature.EmpiricalFisher()]
REDUCTIONS = {
    "masked mean": lambda losses, mask: (losses * mask).sum() / mask.sum(),
    "where": lambda losses, mask: jnp.where(mask > 0, losses, 0.0).mean(),
    "mean of where": lambda losses, mask: jnp.mean(losses, where=mask > 0),
    "product": lambda losses, mask: jnp.einsum("nt,nt->", losses, mask),
}


def inputs(model, params, loss=REDUCTIONS["masked mean"], kind=KINDS[0], x=X, mask=MASK):
    """Input factors by layer name."""

    def loss_fn(params, x, y, mask):
        losses = curvature.losses.l2_loss(model(params, x), y).sum(-1)
        return loss(losses, mask.astype(losses.dtype))

    registry = curvature.register(loss_fn, params, x, Y, mask)
    estimator = jax.jit(curvature.Estimator(registry, kind))
    return {
        n: b.input for n, b in estimator(params, x, Y, mask, key=jax.random.key(3)).blocks.items()
    }


def moment(rows, bias=True):
    a = np.concatenate([rows, np.ones((len(rows), 1))], axis=1) if bias else np.asarray(rows)
    return a.T @ a / len(a)


NET = {"w": normal(4, 3, 2), "b": normal(5, 2), "v": normal(6, 2, 2)}


def hidden(p, x):
    return jax.nn.relu(x @ p["w"] + p["b"])  # two units: in many rows both are off


def net(p, x):
    return hidden(p, x) @ p["v"]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_masked_positions_are_no_rows(reduction, kind):
    found = inputs(net, NET, REDUCTIONS[reduction], kind)
    np.testing.assert_allclose(found["w"], moment(X[MASK]), rtol=1e-12)
    np.testing.assert_allclose(found["v"], moment(hidden(NET, X)[MASK], False), rtol=1e-12)


def test_without_a_mask_all_rows_count_even_those_whose_units_are_off():
    found = inputs(net, NET, lambda losses, mask: losses.mean())
    np.testing.assert_allclose(found["w"], moment(X.reshape(-1, 3)), rtol=1e-12)


def test_dropped_positions_are_no_rows():
    """A language model's shift by one: the last position has no loss."""
    found = inputs(net, NET, lambda losses, mask: losses[:, :-1].mean())
    np.testing.assert_allclose(found["w"], moment(X[:, :-1].reshape(-1, 3)), rtol=1e-12)


def test_tokens_of_padding_are_not_counted():
    params = {"table": normal(7, 6, 3), **NET}
    found = inputs(lambda p, x: net(p, p["table"][x]), params, x=TOKENS)
    counts = np.bincount(TOKENS[MASK], minlength=6)
    np.testing.assert_allclose(found["table"], counts / counts.sum(), rtol=1e-12)


def attend(p, x, mask):
    """Self-attention that does not look at padding."""
    q, k, v = x @ p["q"], x @ p["k"], x @ p["o"]
    scores = jnp.where(mask[:, None, :], q @ k.mT, -jnp.inf)
    scores = jnp.where(mask.any(-1)[:, None, None], scores, 0.0)  # an empty example attends to all
    return x + jax.nn.softmax(scores) @ v


def test_padding_behind_attention_is_no_row():
    p = {"f": normal(8, 3, 3), **{k: normal(i, 3, 3) for i, k in enumerate("qko")}, **NET}
    mask = jnp.arange(T) < jnp.array([3, 5, 2, 0])[:, None]
    found = inputs(lambda p, x: net(p, attend(p, jnp.tanh(x @ p["f"]), mask)), p, mask=mask)
    h = jnp.tanh(X @ p["f"])
    np.testing.assert_allclose(found["f"], moment(X[mask], False), rtol=1e-12)
    for name in "qko":
        np.testing.assert_allclose(found[name], moment(h[mask], False), rtol=1e-12)
    np.testing.assert_allclose(found["w"], moment(attend(p, h, mask)[mask]), rtol=1e-12)


def test_a_position_without_a_loss_that_others_attend_to_is_a_row():
    """The prompt of a fine-tuned language model: keys and values of it matter, queries do not."""
    p = {k: normal(i, 3, 3) for i, k in enumerate("qko")} | NET
    prompt = jnp.arange(T) >= jnp.array([1, 2, 3, 0])[:, None]
    found = inputs(lambda p, x: net(p, attend(p, x, jnp.ones((N, T), bool))), p, mask=prompt)
    np.testing.assert_allclose(found["q"], moment(X[prompt], False), rtol=1e-12)
    np.testing.assert_allclose(found["k"], moment(X.reshape(-1, 3), False), rtol=1e-12)


@pytest.mark.parametrize("groups", [1, 3])
def test_windows_without_a_loss_are_no_rows(groups):
    p = {"w": normal(4, 2, 3 // groups, 6), "b": normal(5, 6), "v": normal(6, 6, 2)}

    def model(p, x):
        y = jax.lax.conv_general_dilated(
            x, p["w"], (1,), [(1, 0)], None, None, ("NWC", "WIO", "NWC"), groups
        )
        return jnp.tanh(y + p["b"]) @ p["v"]

    found = inputs(model, p)["w"]
    before = jnp.pad(X, [(0, 0), (1, 0), (0, 0)])[:, :-1]
    windows = jnp.stack([before, X], -1)[MASK]  # channels, then window
    if groups == 1:
        np.testing.assert_allclose(found, moment(windows.reshape(len(windows), -1)), rtol=1e-12)
    else:
        for group in range(groups):
            np.testing.assert_allclose(found[group], moment(windows[:, group]), rtol=1e-12)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "remat"])
def test_scanned_layers_and_losses_in_a_scan(wrap):
    p = {"stack": normal(0, 2, 3, 3), **NET}

    def loss_fn(p, x, y, mask):
        x = jax.lax.scan(wrap(lambda h, w: (jnp.tanh(h @ w), None)), x, p["stack"])[0]

        def chunk(total, part):  # the loss of one position at a time
            x, y, m = part
            return total + (curvature.losses.l2_loss(net(p, x), y).sum(-1) * m).sum(), None

        by_position = jax.tree.map(lambda a: a.swapaxes(0, 1), (x, y, mask))
        return jax.lax.scan(chunk, jnp.zeros(()), by_position)[0] / mask.sum()

    data = (X, Y, MASK.astype(X.dtype))
    registry = curvature.register(loss_fn, p, *data)
    blocks = jax.jit(curvature.Estimator(registry, curvature.GaussNewton()))(p, *data).blocks
    h = [X, jnp.tanh(X @ p["stack"][0])]
    h.append(jnp.tanh(h[1] @ p["stack"][1]))
    for i in range(2):
        np.testing.assert_allclose(blocks["stack"].input[i], moment(h[i][MASK], False), rtol=1e-12)
    np.testing.assert_allclose(blocks["w"].input, moment(h[2][MASK]), rtol=1e-12)


def test_experts_count_the_rows_that_were_sent_to_them():
    p = {"w": normal(4, 2, 3, 4), "v": normal(6, 4, 2)}
    chosen = TOKENS % 2

    def model(p, x):
        sent = jax.nn.one_hot(chosen, 2, dtype=x.dtype)
        y = jnp.einsum("entd,edf->entf", jnp.stack([x, x]), p["w"])
        return jnp.tanh(jnp.einsum("entf,nte->ntf", y, sent)) @ p["v"]

    found = inputs(model, p)["w"]
    for expert in range(2):
        rows = X[MASK & (chosen == expert)]
        np.testing.assert_allclose(found[expert], moment(rows, False), rtol=1e-12)


def test_losses_that_cancel_each_other_are_seen():
    """The same outputs with opposite signs, and differences over time that telescope."""
    x, m = jnp.array([[1.0], [2.0], [9.0]]), jnp.array([1.0, 1.0, 0.0])

    def opposite(p, x, m):
        z = x @ p["w"]
        both = curvature.losses.l2_loss(z) + curvature.losses.l2_loss(-z)
        return (both[:, 0] * m).sum()

    def telescope(p, x, m):
        z = (x @ p["w"])[:, 0]

        def step(total, part):
            before, now, m = part
            return total + jnp.where(m > 0, curvature.losses.l2_loss(now - before), 0.0), None

        return jax.lax.scan(step, 0.0, (jnp.roll(z, 1), z, m))[0]

    for loss_fn, rows in ((opposite, x[:2]), (telescope, x)):
        registry = curvature.register(loss_fn, {"w": jnp.ones((1, 1))}, x, m)
        estimator = curvature.Estimator(registry, curvature.GaussNewton())
        found = estimator({"w": jnp.ones((1, 1))}, x, m).blocks["w"].input
        np.testing.assert_allclose(found, moment(rows, False), rtol=1e-12)


@pytest.mark.parametrize("how", ["factor", "cond"])
def test_a_mask_may_be_one_number_in_every_step_of_a_scan(how):
    x, m = normal(1, T, N, 3), jnp.array([1.0, 0.0, 1.0, 1.0, 0.0])

    def loss_fn(p, x, m):
        def step(total, part):
            x, m = part
            loss = lambda: curvature.losses.l2_loss(net(p, x)).sum()  # noqa: E731
            if how == "factor":
                return total + m * loss(), None
            return total + jax.lax.cond(m > 0, loss, lambda: 0.0), None

        return jax.lax.scan(step, 0.0, (x, m))[0]

    registry = curvature.register(loss_fn, NET, x, m)
    found = jax.jit(curvature.Estimator(registry, curvature.GaussNewton()))(NET, x, m).blocks
    rows = x[m > 0].reshape(-1, 3)
    np.testing.assert_allclose(found["w"].input, moment(rows), rtol=1e-12)


def test_a_loss_that_is_clipped_away_is_a_mask():
    def loss_fn(p, x):
        return jnp.maximum(curvature.losses.l2_loss(x @ p["w"]) - 1, 0).sum()

    p, x = {"w": jnp.ones((1, 1))}, jnp.array([[1.0], [4.0]])
    registry = curvature.register(loss_fn, p, x)
    found = curvature.Estimator(registry, curvature.GaussNewton())(p, x).blocks["w"].input
    np.testing.assert_allclose(found, 16)


NONLINEAR = {
    "relu": jax.nn.relu,
    "relu squared": lambda h: jax.nn.relu(h) ** 2,
    "hard tanh": jax.nn.hard_tanh,
    "saturated tanh": lambda h: jnp.tanh(1e3 * h),
}


@pytest.mark.parametrize("name", NONLINEAR)
def test_a_mask_of_ones_changes_nothing(name):
    def model(p, x):
        return NONLINEAR[name](x @ p["w"] + p["b"]) @ p["v"]

    found = inputs(model, NET, mask=jnp.ones((N, T), bool))["w"]
    np.testing.assert_allclose(found, moment(X.reshape(-1, 3)), rtol=1e-12)


def test_a_layer_tagged_by_hand():
    def model(p, x):
        y = jnp.tanh(curvature.tag_layer(x @ p["w"] + p["b"], x, p["w"], p["b"]))
        return y @ p["v"]

    np.testing.assert_allclose(inputs(model, NET)["w"], moment(X[MASK]), rtol=1e-12)


def test_the_pass_that_finds_the_rows_is_left_out_where_no_weight_can_be_zero():
    """Counted in the trace: matrix products with and without a mask."""

    def products(reduction):
        def loss_fn(p, x, y, mask):
            losses = curvature.losses.l2_loss(net(p, x), y).sum(-1)
            return reduction(losses, mask.astype(losses.dtype))

        registry = curvature.register(loss_fn, NET, X, Y, MASK)
        estimator = curvature.Estimator(registry, curvature.EmpiricalFisher())
        jaxpr = jax.make_jaxpr(functools.partial(estimator.statistics))(NET, X, Y, MASK)
        return str(jaxpr).count("dot_general[")

    plain = products(lambda losses, mask: 0.3 * losses.sum() / mask.sum() + losses.mean())
    assert products(REDUCTIONS["masked mean"]) > plain
    # Two layers: forward, backward (to the data as well, which XLA drops), and two factors each.
    assert plain == 2 * (1 + 1 + 2)
