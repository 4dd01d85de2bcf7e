"""Kronecker factors of every way a dense layer can be written, against brute force in float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import factors

import curvature

N = 6


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def same(name, a, y):
    return y


@jax.custom_jvp
def activation(x):
    return jnp.tanh(x)


activation.defjvps(lambda t, ans, x: t * (1 - ans**2))


# Each case: (params, x, model(params, x), reference(params, x, tap), layers with a bias).


def mlp(wrap=lambda f: f, tap=None):
    params = {"w": normal(0, 3, 4), "b": normal(1, 4), "v": normal(2, 4, 2)}

    def layers(p, x, tap=same):
        h = activation(tap("w", x, x @ p["w"] + p["b"]))
        return tap("v", h, h @ p["v"])

    return params, normal(3, N, 3), wrap(lambda p, x: layers(p, x)), layers, {"w"}


def in_custom_jvp():
    """The layer itself lies in a custom_jvp function."""

    @jax.custom_jvp
    def layer(w, x):
        return jnp.tanh(x @ w)

    @layer.defjvp
    def layer_jvp(primals, tangents):
        return jax.jvp(lambda w, x: jnp.tanh(x @ w), primals, tangents)

    def reference(p, x, tap):
        return jnp.tanh(tap("w", x, x @ p["w"]))

    return {"w": normal(0, 3, 4)}, normal(1, N, 3), lambda p, x: layer(p["w"], x), reference, ()


def sequence():
    """Positions are rows; a bias added through a reshape."""
    params = {"w": normal(0, 3, 4), "b": normal(1, 4)}

    def model(p, x):
        return jnp.tanh(x @ p["w"] + p["b"].reshape(1, 1, 4))

    def reference(p, x, tap):
        return jnp.tanh(tap("w", x, x @ p["w"] + p["b"]))

    return params, normal(2, N, 5, 3), model, reference, {"w"}


def heads():
    """A (d, heads, k) kernel, its (heads, k) bias added after a transpose."""
    params = {"w": normal(0, 3, 2, 4), "b": normal(1, 2, 4)}

    def model(p, x):
        y = jnp.einsum("btd,dhk->bthk", x, p["w"]).transpose(0, 2, 1, 3)
        return jnp.tanh(y + p["b"][None, :, None, :])

    def reference(p, x, tap):
        y = tap("w", x, (x @ p["w"].reshape(3, 8)) + p["b"].reshape(8))
        return jnp.tanh(y.reshape(*x.shape[:2], 2, 4).transpose(0, 2, 1, 3))

    return params, normal(2, N, 5, 3), model, reference, {"w"}


def heads_in():
    """Two contracted axes, as in the output projection of attention."""
    params = {"w": normal(0, 2, 4, 3)}

    def model(p, x):
        return jnp.tanh(jnp.einsum("bthk,hkd->btd", x, p["w"]))

    def reference(p, x, tap):
        flat = x.reshape(*x.shape[:2], 8)
        return jnp.tanh(tap("w", flat, flat @ p["w"].reshape(8, 3)))

    return params, normal(2, N, 3, 2, 4), model, reference, ()


def weight_left():
    """`W x` on columns, the bias a column."""
    params = {"w": normal(0, 4, 3), "b": normal(1, 4)}

    def model(p, x):
        return jnp.tanh(p["w"] @ x.T + p["b"][:, None]).T

    def reference(p, x, tap):
        return jnp.tanh(tap("w", x, x @ p["w"].T + p["b"]))

    return params, normal(2, N, 3), model, reference, {"w"}


def transposed():
    params = {"w": normal(0, 4, 3)}

    def reference(p, x, tap):
        return jnp.tanh(tap("w", x, x @ p["w"].T))

    return params, normal(1, N, 3), lambda p, x: jnp.tanh(x @ p["w"].T), reference, ()


def vmapped():
    """Equinox's style: a single-example `W x + b` under vmap."""
    params = {"w": normal(0, 4, 3), "b": normal(1, 4)}

    def model(p, x):
        return jax.vmap(lambda v: jnp.tanh(p["w"] @ v + p["b"]))(x)

    def reference(p, x, tap):
        return jnp.tanh(tap("w", x, x @ p["w"].T + p["b"]))

    return params, normal(2, N, 3), model, reference, {"w"}


def reshaped():
    """A flat parameter vector."""
    params = {"w": normal(0, 12)}

    def reference(p, x, tap):
        return jnp.tanh(tap("w", x, x @ p["w"].reshape(3, 4)))

    return params, normal(1, N, 3), lambda p, x: jnp.tanh(x @ p["w"].reshape(3, 4)), reference, ()


def fused():
    """One kernel and one bias cut in two: two layers."""
    params = {"w": normal(0, 3, 8), "b": normal(1, 8)}

    def model(p, x):
        w, v = jnp.split(p["w"], 2, axis=1)
        return jnp.tanh(x @ w + p["b"][:4]) * (x @ v + p["b"][4:])

    def reference(p, x, tap):
        first = tap("w#0", x, x @ p["w"][:, :4] + p["b"][:4])
        return jnp.tanh(first) * tap("w#1", x, x @ p["w"][:, 4:] + p["b"][4:])

    return params, normal(2, N, 3), model, reference, {"w#0", "w#1"}


def shared():
    """One weight used twice: one block, pooled."""
    params = {"w": normal(0, 3, 3) / 2, "b": normal(1, 3)}

    def layers(p, x, tap=same):
        h = jnp.tanh(tap("w", x, x @ p["w"] + p["b"]))
        return tap("w", h, h @ p["w"] + p["b"])

    return params, normal(2, N, 3), lambda p, x: layers(p, x), layers, {"w"}


def recurrent():
    """A weight that is constant over a scan: one block, summed over time."""
    params = {"w": normal(0, 3, 3) / 2, "u": normal(1, 2, 3), "b": normal(2, 3)}

    def cell(p, h, x, tap=same):
        return jnp.tanh(tap("w", h, h @ p["w"] + p["b"]) + tap("u", x, x @ p["u"]))

    def model(p, x):
        def step(h, x):
            h = cell(p, h, x)
            return h, h

        return jax.lax.scan(step, jnp.zeros((N, 3)), x.swapaxes(0, 1))[1].swapaxes(0, 1)

    def reference(p, x, tap):
        h, hs = jnp.zeros((N, 3)), []
        for t in range(x.shape[1]):
            h = cell(p, h, x[:, t], tap)
            hs.append(h)
        return jnp.stack(hs, 1)

    return params, normal(3, N, 4, 2), model, reference, {"w"}


CASES = {
    "plain": mlp,
    "jit": functools.partial(mlp, jax.jit),
    "nested jit": functools.partial(mlp, lambda f: jax.jit(jax.jit(f))),
    "remat": functools.partial(mlp, jax.checkpoint),
    "remat with a policy": functools.partial(
        mlp, functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    ),
    "in custom_jvp": in_custom_jvp,
    "sequence": sequence,
    "heads": heads,
    "heads in": heads_in,
    "weight on the left": weight_left,
    "transposed": transposed,
    "vmapped": vmapped,
    "reshaped": reshaped,
    "fused": fused,
    "shared": shared,
    "recurrent": recurrent,
}

def losses_of(shape, name):
    """(tagged loss of z, the same from optax), with uneven weights."""
    weights = jnp.arange(1.0, shape[0] + 1)
    if name == "l2":
        targets = normal(9, *shape)
        weights = weights.reshape(-1, *[1] * (len(shape) - 1))

        def both(module):
            return lambda z: (weights * module.l2_loss(z, targets)).mean()

    else:
        labels = jnp.arange(np.prod(shape[:-1])).reshape(shape[:-1]) % shape[-1]
        weights = weights.reshape(-1, *[1] * (len(shape) - 2))

        def both(module):
            loss = module.softmax_cross_entropy_with_integer_labels
            return lambda z: 0.3 * (weights * loss(z, labels)).sum()

    return both(curvature.losses), both(optax.losses)


@pytest.mark.parametrize("loss", ["l2", "softmax"])
@pytest.mark.parametrize("name", CASES)
def test_factors_equal_brute_force(name, loss):
    params, x, model, reference, biased = CASES[name]()
    z = model(params, x)
    np.testing.assert_allclose(reference(params, x, same), z, rtol=1e-12)
    tagged, plain = losses_of(z.shape, loss)
    registry = curvature.register(lambda p, x: tagged(model(p, x)), params, x)
    expected = factors(reference, plain, params, x, biased)
    assert {layer.name for layer in registry.layers} == set(expected)
    assert registry.coverage == 1
    kind = curvature.GaussNewton() if loss == "l2" else curvature.Fisher(samples=None)
    operator = jax.jit(curvature.Estimator(registry, kind))(params, x)
    for layer, (a, b) in expected.items():
        np.testing.assert_allclose(operator.blocks[layer].input, a, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(operator.blocks[layer].output, b, rtol=1e-9, atol=1e-12)


def test_scanned_layers_are_stacked_and_equal_unrolled_ones():
    params = {"w": normal(0, 3, 4, 4) / 2, "b": normal(1, 3, 4)}
    x, y = normal(2, N, 4), normal(3, N, 4)

    def loss(z):
        return curvature.losses.l2_loss(z, y).mean()

    def scanned(p, x):
        def step(h, layer):
            return jax.checkpoint(lambda h, q: jnp.tanh(h @ q["w"] + q["b"]))(h, layer), None

        return loss(jax.lax.scan(step, x, p)[0])

    def unrolled(layers, x):
        for layer in layers:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return loss(x)

    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(3)]
    one = curvature.register(scanned, params, x)
    many = curvature.register(unrolled, layers, x)
    assert [layer.stack for layer in one.layers] == [(3,)]
    for kind in (curvature.GaussNewton(), curvature.EmpiricalFisher()):
        block = jax.jit(curvature.Estimator(one, kind))(params, x).blocks["w"]
        operator = jax.jit(curvature.Estimator(many, kind))(layers, x)
        for i, other in enumerate(operator.blocks.values()):
            np.testing.assert_allclose(block.input[i], other.input, rtol=1e-10)
            np.testing.assert_allclose(block.output[i], other.output, rtol=1e-10)
    one, many = (r.override("*", block="diagonal") for r in (one, many))
    stacked = jax.jit(curvature.Estimator(one, curvature.GaussNewton()))(params, x)
    single = jax.jit(curvature.Estimator(many, curvature.GaussNewton()))(layers, x)
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *single.diagonal())
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9), stacked.diagonal(), together)


def test_flax_scan_equals_the_same_blocks_unrolled():
    """`nn.scan` of remat blocks: the same statistics and the same preconditioned gradient."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            h = nn.LayerNorm()(x)
            return x + nn.Dense(4)(nn.gelu(nn.Dense(8)(h))), None

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            make = nn.scan(
                nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return make(name="blocks")(x, None)[0]

    class Unrolled(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(3):
                x, _ = Block(name=f"block{i}")(x)
            return x

    with jax.numpy_dtype_promotion("standard"):
        x, y = normal(0, N, 5, 4), normal(1, N, 5, 4)
        params = Scanned().init(jax.random.key(2), x)
        params = jax.tree.map(lambda p: p.astype(float), params)
        stacked = params["params"]["blocks"]
        split = {f"block{i}": jax.tree.map(lambda p, i=i: p[i], stacked) for i in range(3)}
        solved = []
        for model, p in ((Scanned(), params), (Unrolled(), {"params": split})):

            def loss_fn(p, x, y, model=model):
                return curvature.losses.l2_loss(model.apply(p, x), y).mean()

            registry = curvature.register(loss_fn, p, x, y)
            kind = curvature.Fisher(samples=None)
            estimate = jax.jit(curvature.Estimator(registry, kind))
            dense = estimate(p, x, y, key=jax.random.key(3))
            grads = jax.grad(loss_fn)(p, x, y)
            solved.append(dense.solve(grads, damping=1e-3)["params"])
        for i in range(3):
            for name in ("Dense_0", "Dense_1"):
                for leaf in ("kernel", "bias"):
                    np.testing.assert_allclose(
                        solved[0]["blocks"][name][leaf][i],
                        solved[1][f"block{i}"][name][leaf],
                        rtol=1e-6,
                    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", [curvature.GaussNewton(), curvature.EmpiricalFisher()], ids=str)
def test_diagonal_equals_per_example_gradients(name, kind):
    """Squared per-example gradients by brute force, for shared and unshared layers."""
    params, x, model, _, _ = CASES[name]()
    z = model(params, x)
    targets = normal(9, *z.shape)

    def loss_fn(p, x):
        return curvature.losses.squared_error(model(p, x), targets).sum() / 7

    registry = curvature.register(loss_fn, params, x).override("*", block="diagonal")
    diagonal = jax.jit(curvature.Estimator(registry, kind))(params, x).diagonal()
    jacobian = jax.jit(jax.jacrev(lambda p: model(p, x).reshape(N, -1)))(params)
    if isinstance(kind, curvature.EmpiricalFisher):
        residual = 2 * (z - targets).reshape(N, -1)
        expected = jax.tree.map(
            lambda j: (jnp.einsum("nc,nc...->n...", residual, j) ** 2).sum(0) / 7, jacobian
        )
    else:
        expected = jax.tree.map(lambda j: 2 * (j**2).sum((0, 1)) / 7, jacobian)
    for key, value in expected.items():
        np.testing.assert_allclose(diagonal[key], value, rtol=1e-10, atol=1e-12)
