"""What a layer is given and called: whole-number inputs, and parameters whose paths print alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature

Y = jnp.arange(12) % 3
ENTROPY = curvature.losses.softmax_cross_entropy_with_integer_labels
BLOCKS = ("kronecker", "kronecker_reduce", "kronecker_weighted", "ekfac", "foof", "diagonal")
BLOCKS = (*BLOCKS, "dense", "identity")


def mixed(x, w):
    """`x @ w` without promotion, as JAX writes it."""
    axes = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, w, axes, preferred_element_type=w.dtype)


def dense(p, x):
    return mixed(x, p["w"]) + p["b"]


def positions(p, x):
    return (mixed(x.reshape(12, 3, 2), p["w"][:2]) + p["b"]).mean(1)


def members(p, x):
    """Two halves of the features with a weight each."""
    w = p["w"].reshape(2, 3, 3)
    axes = (((2,), (1,)), ((1,), (0,)))
    y = jax.lax.dot_general(x.reshape(12, 2, 3), w, axes, preferred_element_type=w.dtype)
    return y.sum(0) + p["b"]


def repeated(p, x):
    """A shared layer, and one whose input is the weight's left operand."""
    y = mixed(x, p["w"]) + mixed(1 - x, p["w"])
    return y + jax.lax.dot_general(p["w"], x, (((0,), (1,)), ((), ()))).T


def one_hot(p, x):
    hot = jax.nn.one_hot(jnp.where(x.astype(float) > 0, 1, 0).sum(1) % 6, 6, dtype=x.dtype)
    return mixed(hot, p["w"]) + p["b"]


def dense_operators(model, x):
    registry = curvature.register(lambda p, x, y: ENTROPY(model(p, x), y).mean(), P, x, Y)
    found = {}
    for block in BLOCKS:
        op = curvature.Estimator(registry.with_blocks(block), curvature.GaussNewton())(P, x, Y)
        found[block] = {name: b.to_dense() for name, b in op.blocks.items()}
    return found


P = {"w": jax.random.normal(jax.random.key(0), (6, 3)), "b": jnp.zeros(3)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        *((dense, dtype) for dtype in (bool, "uint8", "int8", "int32")),
        (positions, bool),
        (members, "int8"),
        (repeated, "int8"),
        *((one_hot, dtype) for dtype in (bool, "uint8", "int32")),
    ],
)
def test_whole_numbers_are_the_same_numbers_as_floats(model, dtype):
    bits = jax.random.bernoulli(jax.random.key(1), 0.5, (12, 6))
    x = (2 * bits.astype("int8") - 1 if dtype == "int8" else bits).astype(dtype)
    both = [jax.jit(lambda x: dense_operators(model, x))(z) for z in (x, x.astype(float))]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), *both)


@pytest.mark.parametrize("dtype", [bool, "int32"])
def test_whole_numbers_into_two_layers(dtype):
    """Whole numbers have no gradient, what comes after them does."""

    def trace(x):
        loss = lambda p, x, y: ENTROPY(mixed(jnp.tanh(dense(p, x)), p["v"]), y).mean()  # noqa: E731
        registry = curvature.register(loss, params, x, Y)
        return curvature.Estimator(registry, curvature.GaussNewton())(params, x, Y).trace()

    params = P | {"v": jnp.eye(3) + 0.5}
    x = jax.random.bernoulli(jax.random.key(1), 0.5, (12, 6)).astype(dtype)
    np.testing.assert_allclose(jax.jit(trace)(x), jax.jit(trace)(x.astype(float)))


A, B = jax.random.normal(jax.random.key(2), (3, 3)), jax.random.normal(jax.random.key(3), (3, 3))
TREES = {
    "keys with slashes": {"a": {"b/c": A}, "a/b": {"c": B}},
    "other shapes": {"a": {"b/c": A[:, :2]}, "a/b": {"c": B[:2]}},
    "list and key": {"a": [A], "a/0": B},
    "module and leaf": {"a": {"b": {"c": A}}, "a/b": B},
    "a number's mark": {"w": A, "w#rest": B},
}


@pytest.mark.parametrize("params", TREES.values(), ids=TREES)
def test_layers_whose_paths_print_alike_have_an_entry_each(params):
    def loss_fn(p, x, y):
        first, second = jax.tree.leaves(p)
        return ENTROPY(jnp.tanh(x @ first) @ second, y).mean()

    x = jax.random.normal(jax.random.key(4), (12, 3))
    registry = curvature.register(loss_fn, params, x, Y)
    names = [layer.name for layer in registry.layers]
    assert len(set(names)) == 2
    assert all(any(key in name for key in "abw") for name in names)
    plain = dict(zip("ab", jax.tree.leaves(params), strict=True))
    reference = curvature.register(loss_fn, plain, x, Y)
    op = jax.jit(curvature.Estimator(registry, curvature.GaussNewton()))(params, x, Y)
    expected = jax.jit(curvature.Estimator(reference, curvature.GaussNewton()))(plain, x, Y)
    for name, plain_name in zip(names, "ab", strict=True):
        found = op.blocks[name].to_dense()
        np.testing.assert_allclose(found, expected.blocks[plain_name].to_dense())
