"""Kronecker factors of every way a dense layer can be written, against brute force in float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, ELEMENTWISE, N, normal, same
from reference import factors

import curvature


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


def stacked(expected, name):
    """A layer's factors, members stacked in front."""
    if name in expected:
        return expected[name]
    members = sorted(key for key in expected if key.startswith(f"{name}@"))
    return tuple(np.stack(parts) for parts in zip(*(expected[m] for m in members), strict=True))


def full(factor, block_ndim):
    """A diagonal factor as a matrix."""
    return factor if factor.ndim == block_ndim else np.eye(factor.shape[-1]) * factor[..., None]


@pytest.mark.parametrize("name", CASES)
def test_factors_equal_brute_force(name):
    """Kronecker factors, and the preconditioned gradient against a dense solve of the same."""
    params, x, model, reference, biased = CASES[name]()
    z, expected = jax.jit(lambda p, x: (model(p, x), reference(p, x, same)))(params, x)
    np.testing.assert_allclose(expected, z, rtol=1e-11, atol=1e-13)
    tagged, plain = losses_of(z.shape, "l2" if len(name) % 2 else "softmax")

    def loss_fn(p, x):
        return tagged(model(p, x))

    registry = curvature.register(loss_fn, params, x)
    expected = factors(reference, plain, params, x, biased)
    assert {layer.name for layer in registry.layers} == {key.split("@")[0] for key in expected}
    assert registry.coverage == 1
    kind = curvature.GaussNewton() if len(name) % 2 else curvature.Fisher(samples=None)
    operator = jax.jit(curvature.Estimator(registry, kind))(params, x)
    grads = jax.jit(jax.grad(loss_fn))(params, x)
    solved = jax.jit(lambda op, v: op.solve(v, damping=0.1))(operator, grads)
    for layer in registry.layers:
        a, b = stacked(expected, layer.name)
        block = operator.blocks[layer.name]
        np.testing.assert_allclose(full(block.input, a.ndim), a, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(full(block.output, b.ndim), b, rtol=1e-9, atol=1e-12)
        matrix = np.einsum("...ij,...kl->...ikjl", a, b)
        size = a.shape[-1] * b.shape[-1]
        matrix = matrix.reshape(*a.shape[:-2], size, size) + 0.1 * np.eye(size)
        v = layer.gather(jax.tree.leaves(grads)).reshape(*a.shape[:-2], size)
        np.testing.assert_allclose(
            layer.gather(jax.tree.leaves(solved)).ravel(),
            np.linalg.solve(matrix, v[..., None]).ravel(),
            rtol=1e-8,
            atol=1e-10,
        )


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
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-9), stacked.diagonal(), together
    )


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


@pytest.mark.parametrize("name", CASES | ELEMENTWISE)
@pytest.mark.parametrize("kind", [curvature.GaussNewton(), curvature.EmpiricalFisher()], ids=str)
def test_diagonal_and_dense_blocks_equal_per_example_gradients(name, kind):
    """Sums over examples of squares and outer products of gradients, for every kind of layer."""
    params, x, model, *_ = (CASES | ELEMENTWISE)[name]()
    z = model(params, x)
    targets = normal(9, *z.shape)

    def loss_fn(p, x, targets):
        return curvature.losses.squared_error(model(p, x), targets).sum() / 7

    registry = curvature.register(loss_fn, params, x, targets)
    assert registry.batch_found and registry.coverage == 1
    diagonal = registry.override("*", block="diagonal")
    dense = registry.override("*", block="dense")

    @jax.jit
    def both(*args):
        return [curvature.Estimator(r, kind)(*args) for r in (diagonal, dense)]

    squares, matrices = both(params, x, targets)
    scores = jax.jit(jax.jacrev(lambda p: model(p, x).reshape(N, -1)))(params)
    if isinstance(kind, curvature.EmpiricalFisher):
        residual = 2 * (z - targets).reshape(N, -1)
        scores = jax.tree.map(lambda j: jnp.einsum("nc,nc...->n...", residual, j)[:, None], scores)
        scale = 1 / 7
    else:
        scale = 2 / 7
    scores = jax.tree.map(lambda j: j.reshape(-1, *j.shape[2:]), scores)
    expected = jax.tree.map(lambda s: scale * (s**2).sum(0), scores)
    found = squares.diagonal()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-10, atol=1e-12)
    for layer in dense.layers:
        s = jax.vmap(lambda tree, layer=layer: layer.gather(jax.tree.leaves(tree)))(scores)
        s = s.reshape(len(s), *layer.stack, -1)
        outer = scale * np.einsum("n...i,n...j->...ij", s, s)
        np.testing.assert_allclose(
            matrices.blocks[layer.name].to_dense(), outer, rtol=1e-9, atol=1e-11
        )


def test_tied_embedding_and_head_are_one_layer():
    """The diagonal is exact; the Kronecker factors have the partial traces of the two uses' sum."""
    params = {"w": normal(0, 5, 3), "v": normal(1, 3, 3)}
    x = jax.random.randint(jax.random.key(2), (N, 4), 0, 5)

    def model(p, x):
        return jnp.tanh(p["w"][x] @ p["v"]) @ p["w"].T

    def untied(p, x):
        return jnp.tanh(p["w"][x] @ p["v"]) @ p["u"]

    def loss_of(model):
        def loss_fn(p, x):
            loss = curvature.losses.softmax_cross_entropy_with_integer_labels
            return loss(model(p, x), (x + 1) % 5).mean()

        return loss_fn

    kind = curvature.GaussNewton()
    tied = curvature.register(loss_of(model), params, x)
    assert [(layer.kind, layer.uses) for layer in tied.layers] == [("dense", 1), ("embedding", 2)]
    apart = params | {"u": params["w"].T}
    other = curvature.register(loss_of(untied), apart, x)
    one = jax.jit(curvature.Estimator(tied, kind))(params, x).blocks["w"]
    two = jax.jit(curvature.Estimator(other, kind))(apart, x).blocks
    dense = two["w"].to_dense().reshape(5, 3, 5, 3)
    dense += two["u"].to_dense().reshape(3, 5, 3, 5).transpose(1, 0, 3, 2)
    pooled = one.to_dense().reshape(5, 3, 5, 3)
    np.testing.assert_allclose(
        np.einsum("iaib->ab", pooled), np.einsum("iaib->ab", dense), rtol=1e-9
    )
    np.testing.assert_allclose(
        np.einsum("iaja->ij", pooled).diagonal(), np.einsum("iaja->ij", dense).diagonal(), rtol=1e-9
    )


def test_tag_layer_gives_the_statistics_of_the_layer():
    """A layer inside custom_vjp, tagged by hand, equals the same layer in the open."""

    @jax.custom_vjp
    def kernel(w, b, x):
        return x @ w + b

    kernel.defvjp(
        lambda w, b, x: (x @ w + b, (w, x)), lambda r, g: (r[1].T @ g, g.sum(0), g @ r[0].T)
    )
    params = {"w": normal(0, 3, 4), "b": normal(1, 4), "v": normal(2, 4, 2)}
    x, y = normal(3, N, 3), normal(4, N, 2)

    def hidden(p, x, y):
        h = curvature.tag_layer(kernel(p["w"], p["b"], x), x, p["w"], p["b"])
        return curvature.losses.l2_loss(jnp.tanh(h) @ p["v"], y).mean()

    def plain(p, x, y):
        return curvature.losses.l2_loss(jnp.tanh(x @ p["w"] + p["b"]) @ p["v"], y).mean()

    kind = curvature.GaussNewton()
    one, two = (
        jax.jit(curvature.Estimator(curvature.register(f, params, x, y), kind))(params, x, y)
        for f in (hidden, plain)
    )
    for name, block in two.blocks.items():
        np.testing.assert_allclose(one.blocks[name].to_dense(), block.to_dense(), rtol=1e-12)
