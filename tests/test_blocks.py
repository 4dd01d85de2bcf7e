"""Blocks and the block-diagonal operator against dense matrices.

Every reference is a dense float64 matrix made with NumPy: `numpy.kron` of the factors, and
functions of it through `numpy.linalg.eigh` of the whole. For the operator on parameter trees the
matrix is put together from hand-written index maps of a model's parameters.
"""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from curvature import Dense, Diagonal, Kronecker
from curvature.statistics.factors import factors_of

D_IN, D_OUT = 4, 3


def second_moment(rng, *shape, rank, diagonal):
    """A positive semi-definite factor of a given rank, or its eigenvalues where diagonal."""
    *stack, size = shape
    if diagonal:
        values = rng.uniform(0.2, 3, (*stack, size))
        values[..., rank:] = 0
        return values
    x = rng.normal(size=(*stack, size, rank))
    return x @ x.swapaxes(-1, -2)


def full(factor, stack_ndim):
    if factor.ndim == stack_ndim + 1:
        return factor[..., None] * np.eye(factor.shape[-1])
    return factor


def stacked_kron(a, b, stack):
    """The Kronecker products of every copy, as a list of matrices."""
    a, b = full(a, len(stack)), full(b, len(stack))
    return [np.kron(a[i], b[i]) for i in np.ndindex(*stack)]


def kronecker(diagonal_in=False, diagonal_out=False, stack=(), rank_in=D_IN, rank_out=D_OUT):
    rng = np.random.default_rng(3)
    a = second_moment(rng, *stack, D_IN, rank=rank_in, diagonal=diagonal_in)
    b = 30 * second_moment(rng, *stack, D_OUT, rank=rank_out, diagonal=diagonal_out)
    block = Kronecker(jnp.asarray(a), jnp.asarray(b), len(stack))
    return block, stacked_kron(a, b, stack), (*stack, D_IN, D_OUT)


def diagonal(stack=(), zeros=0, inner=(D_IN, D_OUT)):
    values = np.random.default_rng(4).uniform(0.2, 3, (*stack, int(np.prod(inner))))
    values[..., :zeros] = 0
    shape = (*stack, *inner)
    block = Diagonal(jnp.asarray(values.reshape(shape)), len(stack))
    return block, [np.diag(values[i]) for i in np.ndindex(*stack)], shape


def dense_block(stack=(), rank=None, inner=(D_IN, D_OUT)):
    size = int(np.prod(inner))
    rng = np.random.default_rng(4)
    values = second_moment(rng, *stack, size, rank=rank or size + 3, diagonal=False)
    block = Dense(jnp.asarray(values), (*stack, *inner), len(stack))
    return block, [values[i] for i in np.ndindex(*stack)], (*stack, *inner)


SIDES = {"full": False, "diagonal": True}
BLOCKS = {
    f"{a} x {b}, stack {stack}": functools.partial(kronecker, SIDES[a], SIDES[b], stack)
    for a, b, stack in itertools.product(SIDES, SIDES, ((), (3,), (2, 2)))
} | {
    "singular input": functools.partial(kronecker, rank_in=2),
    "singular output": functools.partial(kronecker, rank_out=1),
    "singular factors, stacked": functools.partial(kronecker, False, False, (2,), 2, 2),
    "singular diagonals, stacked": functools.partial(kronecker, True, True, (2,), 2, 2),
    "singular full x diagonal": functools.partial(kronecker, False, True, (), 3, 2),
    "diagonal": diagonal,
    "diagonal, stacked": functools.partial(diagonal, (3,)),
    "diagonal, two stack axes": functools.partial(diagonal, (2, 2)),
    "diagonal, vector": functools.partial(diagonal, inner=(5,)),
    "diagonal, scalar": functools.partial(diagonal, inner=()),
    "singular diagonal, stacked": functools.partial(diagonal, (2,), 5),
    "dense": dense_block,
    "dense, stacked": functools.partial(dense_block, (3,)),
    "dense, two stack axes, vector": functools.partial(dense_block, (2, 2), inner=(5,)),
    "singular dense, stacked": functools.partial(dense_block, (2,), 4),
}
KRONECKER = [name for name in BLOCKS if isinstance(BLOCKS[name]()[0], Kronecker)]


def vector(shape):
    return np.random.default_rng(5).normal(size=shape)


def function_of(matrix, f):
    """f on the eigenvalues; rounding errors of the eigenvalue zero count as zero."""
    values, vectors = np.linalg.eigh(matrix)
    values = np.where(np.abs(values) > 1e-11 * np.abs(values).max(initial=0), values, 0)
    return (vectors * f(values)) @ vectors.T


def damped_power(matrix, p, damping=0.0):
    """(M + damping I)^p, on the range."""

    def f(values):
        shifted = values + damping
        return np.where(shifted > 0, np.where(shifted > 0, shifted, 1) ** p, 0)

    return function_of(matrix, f)


def applied(matrices, v):
    """Each copy's matrix times its row-major flattened part of v."""
    flat = v.reshape((len(matrices), -1))
    return np.stack([m @ x for m, x in zip(matrices, flat, strict=True)]).reshape(v.shape)


def close(actual, expected, tolerance=1e-10):
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    assert actual.dtype == jnp.float64
    scale = np.abs(expected).max(initial=1e-300, where=np.isfinite(expected))
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * scale)


# One block ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCKS)
def test_product_and_dense_matrix(name):
    block, dense, shape = BLOCKS[name]()
    v = vector(shape)
    size = dense[0].shape[0]
    close(block.to_dense(), np.stack(dense).reshape((*shape[: block.stack_ndim], size, size)))
    close(block @ jnp.asarray(v), applied(dense, v))


POWERS = tuple(itertools.product((-1, -0.5, 0.5, 2), (0.0, 0.3)))


@jax.jit
def solves_and_powers(block, v):
    powers = [block.power(v, p, damping=damping) for p, damping in POWERS]
    return block.solve(v), [block.solve(v, damping) for damping in (0.0, 0.3)], powers


@pytest.mark.parametrize("name", BLOCKS)
def test_solves_and_powers(name):
    """Exactly (G + damping I)^p; without damping zero on the null space, as the pseudo-inverse."""
    block, dense, shape = BLOCKS[name]()
    v = vector(shape)
    plain, solved, powers = solves_and_powers(block, jnp.asarray(v))
    for found, damping in zip([plain, *solved], (0.0, 0.0, 0.3), strict=True):
        expected = [np.linalg.pinv(m + damping * np.eye(len(m)), rcond=1e-11) for m in dense]
        close(found, applied(expected, v))
    for found, (p, damping) in zip(powers, POWERS, strict=True):
        close(found, applied([damped_power(m, p, damping) for m in dense], v))


@pytest.mark.parametrize("name", BLOCKS)
def test_scalars_eigenvalues_and_diagonal(name):
    block, dense, shape = BLOCKS[name]()
    stack = shape[: block.stack_ndim]
    close(block.trace(), sum(np.trace(m) for m in dense))
    values = np.stack([np.linalg.eigvalsh(m) for m in dense]).reshape((*stack, -1))
    close(block.eigenvalues(), np.maximum(values, 0))
    assert (np.diff(block.eigenvalues(), axis=-1) >= 0).all()
    close(block.diagonal(), np.stack([np.diag(m) for m in dense]).reshape(shape))
    logdet = sum(np.linalg.slogdet(m + 0.3 * np.eye(len(m)))[1] for m in dense)
    close(block.logdet(0.3), logdet)
    if "singular" in name:
        assert block.logdet() == -np.inf
    else:
        close(block.logdet(), sum(np.linalg.slogdet(m)[1] for m in dense))


@pytest.mark.parametrize("name", KRONECKER)
def test_damped_inverse_of_kronecker_is_the_factored_formula(name):
    """(A + pi sqrt(damping) I)^-1 x (B + sqrt(damping) / pi I)^-1, pi of each copy for itself."""
    block, _, shape = BLOCKS[name]()
    v, damping = vector(shape), 0.05
    stack = shape[: block.stack_ndim]
    a, b = (full(np.asarray(f), len(stack)) for f in (block.input, block.output))
    expected = []
    for i in np.ndindex(*stack):
        pi = np.sqrt((np.trace(a[i]) / D_IN) / (np.trace(b[i]) / D_OUT))
        assert abs(np.log(pi)) > 0.1  # so that a wrong pi is seen
        left = np.linalg.inv(a[i] + pi * np.sqrt(damping) * np.eye(D_IN))
        right = np.linalg.inv(b[i] + np.sqrt(damping) / pi * np.eye(D_OUT))
        expected.append(np.kron(left, right))
    inverse = block.damped_inverse(damping)
    assert isinstance(inverse, Kronecker)
    assert jax.tree.structure(inverse) == jax.tree.structure(block)
    assert inverse.input.shape == block.input.shape
    close(inverse @ jnp.asarray(v), applied(expected, v))


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(diagonal, (2,)),
        functools.partial(diagonal, (2,), 5),
        functools.partial(dense_block, (2,)),
        functools.partial(dense_block, (2,), 4),
    ],
    ids=["diagonal", "singular diagonal", "dense", "singular dense"],
)
def test_damped_inverse_of_diagonal_and_dense_is_exact(make):
    block, dense, shape = make()
    v = vector(shape)
    inverse = block.damped_inverse(0.05)
    assert jax.tree.structure(inverse) == jax.tree.structure(block)
    expected = [np.linalg.inv(m + 0.05 * np.eye(len(m))) for m in dense]
    close(inverse @ jnp.asarray(v), applied(expected, v))
    pseudo = [np.linalg.pinv(m, rcond=1e-11) for m in dense]
    close(block.damped_inverse(0.0) @ jnp.asarray(v), applied(pseudo, v))


def test_vec_is_row_major():
    """The kernel V of shape (d_in, d_out) is acted on as A V B, and as A x B on V.ravel()."""
    block, _, shape = kronecker()
    v = vector(shape)
    a, b = np.asarray(block.input), np.asarray(block.output)
    close(block @ jnp.asarray(v), a @ v @ b)
    dense = np.asarray(block.to_dense())
    close(block @ jnp.asarray(v), (dense @ v.ravel(order="C")).reshape(shape, order="C"))
    column_major = (dense @ v.ravel(order="F")).reshape(shape, order="F")
    assert np.abs(column_major - a @ v @ b).max() > 1


ZERO = {
    "input": lambda a, b: (0 * a, b),
    "output": lambda a, b: (a, 0 * b),
    "both": lambda a, b: (0 * a, 0 * b),
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("which", ZERO)
def test_zero_factors_give_no_nan(which, side):
    """The first of two copies is zero: pi = 1 there, zero pseudo-inverse, logdet -inf."""
    whole, _, shape = kronecker(SIDES[side], SIDES[side], (2,))
    a, b = (np.array(f) for f in (whole.input, whole.output))
    a[0], b[0] = ZERO[which](a[0], b[0])
    block = Kronecker(jnp.asarray(a), jnp.asarray(b), 1)
    v, damping = vector(shape), 0.05
    left = np.linalg.inv(full(a, 1)[0] + np.sqrt(damping) * np.eye(D_IN))
    right = np.linalg.inv(full(b, 1)[0] + np.sqrt(damping) * np.eye(D_OUT))
    inverse = block.damped_inverse(damping) @ jnp.asarray(v)
    close(inverse[0], left @ v[0] @ right)
    close(inverse[1], (whole.damped_inverse(damping) @ jnp.asarray(v))[1])
    for p in (-1, -0.5, 0.5, 2):
        np.testing.assert_array_equal(block.power(jnp.asarray(v), p)[0], 0)
        close(block.power(jnp.asarray(v), p)[1], whole.power(jnp.asarray(v), p)[1])
    close(block.solve(jnp.asarray(v), damping)[0], v[0] / damping)
    np.testing.assert_array_equal(block.eigenvalues()[0], 0)
    assert block.logdet() == -np.inf
    assert np.isfinite(block.logdet(damping))


@pytest.mark.parametrize(
    "name", ["full x full, stack ()", "full x diagonal, stack (3,)", "diagonal", "dense, stacked"]
)
def test_blocks_are_pytrees_that_jit_takes_and_returns(name):
    block, _, shape = BLOCKS[name]()
    v = jnp.asarray(vector(shape))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(block))

    @jax.jit
    def scaled(block, v, damping):
        return jax.tree.map(lambda x: 2 * x, block), block.solve(v, damping)

    twice, solved = scaled(block, v, 0.3)
    assert type(twice) is type(block)
    assert twice.stack_ndim == block.stack_ndim
    close(twice @ v, (4 if isinstance(block, Kronecker) else 2) * np.asarray(block @ v))
    close(solved, np.asarray(block.solve(v, 0.3)))


DAMPED = {
    "solve": lambda block, v, damping: block.solve(v, damping),
    "power": lambda block, v, damping: block.power(v, -0.5, damping),
    "logdet": lambda block, v, damping: block.logdet(damping),
    "damped_inverse": lambda block, v, damping: block.damped_inverse(damping) @ v,
}
KINDS = {
    "kronecker": kronecker,
    "kronecker, diagonal": lambda: kronecker(True, True),
    "diagonal": diagonal,
    "dense": dense_block,
}


@pytest.mark.parametrize("operation", DAMPED)
@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_is_kept(kind, operation):
    block, _, shape = KINDS[kind]()
    block = jax.tree.map(lambda x: x.astype(jnp.float32), block)
    v = jnp.asarray(vector(shape), jnp.float32)
    assert DAMPED[operation](block, v, 0.3).dtype == jnp.float32


@pytest.mark.parametrize("operation", DAMPED)
@pytest.mark.parametrize("kind", KINDS)
def test_damping_of_another_precision_keeps_the_blocks(kind, operation):
    """As when an optimizer's damping, float64 under x64, meets float32 statistics."""
    block, _, shape = KINDS[kind]()
    block = jax.tree.map(lambda x: x.astype(jnp.float32), block)
    v = jnp.asarray(vector(shape), jnp.float32)
    result = DAMPED[operation](block, v, jnp.asarray(0.3, jnp.float64))
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, DAMPED[operation](block, v, 0.3), rtol=1e-5, atol=1e-5)


# The operator on parameter trees ------------------------------------------------------------------

EXAMPLES = 14


def model(params, x):
    h = jnp.tanh(x @ params["dense"]["kernel"] + params["dense"]["bias"])
    h = h * jnp.exp(params["scale"])
    h, _ = jax.lax.scan(lambda h, p: (jnp.tanh(h @ p["w"] + p["b"]), None), h, params["stack"])
    q, k = jnp.split(h @ params["qkv"][:, 1:], 2, axis=1)
    q = q + h @ params["qkv"][:, :1]
    return jnp.concatenate([jnp.tanh(q * k), h[:, :2]], axis=1) @ params["head"].T


def loss_fn(params, x, y):
    return curvature.losses.l2_loss(model(params, x), y).sum(-1).mean()


@functools.cache
def setup():
    rng = np.random.default_rng(6)
    shapes = {
        "dense": {"bias": (4,), "kernel": (3, 4)},
        "head": (2, 4),
        "qkv": (4, 5),
        "scale": (4,),
        "stack": {"b": (2, 4), "w": (2, 4, 4)},
        "unused": (2,),
    }
    params = jax.tree.map(
        lambda s: jnp.asarray(0.6 * rng.normal(size=s)),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )
    x, y = jnp.asarray(rng.normal(size=(EXAMPLES, 3))), jnp.asarray(rng.normal(size=(EXAMPLES, 2)))
    return params, x, y


def positions():
    """Where each parameter's entries lie in the concatenation of all leaves in `setup`'s order."""
    sizes = {
        "bias": 4,
        "kernel": 12,
        "head": 8,
        "qkv": 20,
        "scale": 4,
        "b": 8,
        "w": 32,
        "unused": 2,
    }
    ends = np.cumsum(list(sizes.values()))
    parts = np.split(np.arange(ends[-1]), ends[:-1])
    at = dict(zip(sizes, parts, strict=True))
    return at | {
        "kernel": at["kernel"].reshape(3, 4),
        "head": at["head"].reshape(2, 4),
        "qkv": at["qkv"].reshape(4, 5),
        "b": at["b"].reshape(2, 4),
        "w": at["w"].reshape(2, 4, 4),
    }


def coordinates():
    """For a layer's parameters, positions of the block coordinates of its copies.

    Written by hand from `model`; a parameter that is cut into several layers has several entries.
    """
    at = positions()
    homogeneous = np.concatenate([at["kernel"], at["bias"][None]])
    stack = np.concatenate([at["w"], at["b"][:, None]], axis=1)
    return {
        ("['dense']['kernel']", "['dense']['bias']"): [[homogeneous]],
        ("['head']",): [[at["head"].T]],
        ("['qkv']",): [[at["qkv"][:, 1:]], [at["qkv"][:, :1]]],
        ("['scale']",): [[at["scale"]]],
        ("['stack']['w']", "['stack']['b']"): [[stack[0], stack[1]]],
        ("['unused']",): [[at["unused"]]],
    }


@functools.cache
def operator():
    params, x, y = setup()
    registry = curvature.register(loss_fn, params, x, y)
    registry = registry.override("head", block="diagonal").override("qkv", block="dense")
    kind = curvature.GaussNewton()
    return registry, curvature.Estimator(registry, kind)(params, x, y, key=jax.random.key(0))


def placed(matrix_of):
    """The matrix on all parameters with `matrix_of(block, copy)` at each layer's coordinates."""
    registry, op = operator()
    at = coordinates()
    dense = np.zeros((90, 90))
    for layer in registry.layers:
        block = op.blocks[layer.name]
        size = block.diagonal().size
        (copies,) = (c for c in at[layer.parameters] if sum(index.size for index in c) == size)
        for copy, index in enumerate(copies):
            flat = index.ravel()
            dense[np.ix_(flat, flat)] += matrix_of(block, copy)
    return dense


def block_matrix(block, copy):
    """The dense matrix of one copy, from the block's arrays."""
    if isinstance(block, Diagonal):
        return np.diag(np.asarray(block.values).ravel())
    if isinstance(block, Dense):
        return np.asarray(block.values)
    a, b = np.asarray(block.input), np.asarray(block.output)
    return np.kron(a[copy], b[copy]) if a.ndim == 3 else np.kron(a, b)


def flatten(tree):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


def unflatten(flat):
    leaves, structure = jax.tree.flatten(setup()[0])
    parts = jnp.split(jnp.asarray(flat), np.cumsum([leaf.size for leaf in leaves])[:-1])
    shaped = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(structure, shaped)


def matrix_by_unit_vectors(function):
    """The matrix of a linear map of trees, one unit vector at a time."""
    columns = jax.vmap(lambda e: function(unflatten(e)))(jnp.eye(90))
    leaves = [np.asarray(leaf).reshape(90, -1) for leaf in jax.tree.leaves(columns)]
    return np.concatenate(leaves, axis=1).T


def test_the_model_has_all_sorts_of_layers():
    registry, op = operator()
    kinds = [
        (layer.parameters, type(op.blocks[layer.name]), op.blocks[layer.name].stack_ndim)
        for layer in sorted(registry.layers, key=lambda layer: layer.parameters)
    ]
    assert kinds == [
        (("['dense']['kernel']", "['dense']['bias']"), Kronecker, 0),
        (("['head']",), Diagonal, 0),
        (("['qkv']",), Dense, 0),
        (("['qkv']",), Dense, 0),
        (("['scale']",), Diagonal, 0),
        (("['stack']['w']", "['stack']['b']"), Kronecker, 1),
        (("['unused']",), Diagonal, 0),
    ]
    assert list(op.blocks) == [layer.name for layer in registry.layers]


OPERATIONS = {
    "@": (lambda op, v: op @ v, lambda m: m),
    "solve, damping": (lambda op, v: op.solve(v, damping=0.1), lambda m: damped_power(m, -1, 0.1)),
    "solve": (lambda op, v: op.solve(v), lambda m: damped_power(m, -1)),
    "power -1": (lambda op, v: op.power(v, -1, damping=0.1), lambda m: damped_power(m, -1, 0.1)),
    "power -1/2": (lambda op, v: op.power(v, -0.5, 0.1), lambda m: damped_power(m, -0.5, 0.1)),
    "power 1/2": (lambda op, v: op.power(v, 0.5), lambda m: damped_power(m, 0.5)),
    "power 2": (lambda op, v: op.power(v, 2), lambda m: damped_power(m, 2)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operator_is_the_dense_matrix(name):
    """All columns, against NumPy on the matrix put together by hand."""
    apply, of_matrix = OPERATIONS[name]
    tolerance = 1e-5 if name == "solve" else 1e-8  # undamped: the condition number is 1e9
    _, op = operator()
    dense = placed(block_matrix)
    assert np.linalg.matrix_rank(dense, 1e-9) == 86  # not the unused ones, and two of qkv's
    expected = placed(lambda block, copy: of_matrix(block_matrix(block, copy)))
    close(jnp.asarray(matrix_by_unit_vectors(functools.partial(apply, op))), expected, tolerance)
    v = np.random.default_rng(7).normal(size=90)
    result = apply(op, unflatten(v))
    assert jax.tree.structure(result) == jax.tree.structure(setup()[0])
    jax.tree.map(lambda r, p: chex.assert_equal_shape([r, p]), result, setup()[0])
    close(jnp.asarray(flatten(result)), expected @ v, tolerance)


def test_operator_damped_inverse_is_that_of_its_blocks():
    _, op = operator()

    def inverse(block, copy):
        m = block_matrix(block, copy)
        if not isinstance(block, Kronecker):
            return np.linalg.inv(m + 0.1 * np.eye(len(m)))
        a, b = (np.asarray(f) for f in (block.input, block.output))
        a, b = (a[copy], b[copy]) if a.ndim == 3 else (a, b)
        pi = np.sqrt(np.trace(a) / len(a) / (np.trace(b) / len(b)))
        left = np.linalg.inv(a + pi * np.sqrt(0.1) * np.eye(len(a)))
        return np.kron(left, np.linalg.inv(b + np.sqrt(0.1) / pi * np.eye(len(b))))

    v = np.random.default_rng(7).normal(size=90)
    result = jax.jit(lambda op, v: op.damped_inverse(0.1) @ v)(op, unflatten(v))
    close(jnp.asarray(flatten(result)), placed(inverse) @ v)


def test_operator_scalars_eigenvalues_and_diagonal():
    _, op = operator()
    dense = placed(block_matrix)
    close(op.trace(), np.trace(dense))
    close(op.eigenvalues(), np.maximum(np.linalg.eigvalsh(dense), 0), 1e-9)
    assert (np.diff(op.eigenvalues()) >= 0).all()
    close(op.logdet(damping=0.1), np.linalg.slogdet(dense + 0.1 * np.eye(90))[1])
    assert op.logdet() == -np.inf  # the unused parameters
    close(jnp.asarray(flatten(op.diagonal())), np.diag(dense))
    assert jax.tree.structure(op.diagonal()) == jax.tree.structure(setup()[0])


def test_excluded_parameters_are_outside_the_operator():
    """Zero in results, None in the diagonal; the other blocks are as they were."""
    params, x, y = setup()
    registry, op = operator()
    registry = registry.override("stack/*", exclude=True)
    estimator = curvature.Estimator(registry, curvature.GaussNewton())
    rest = estimator(params, x, y, key=jax.random.key(0))
    assert set(op.blocks) - set(rest.blocks) == {"stack"}
    inside = {key: value for key, value in params.items() if key != "stack"}
    for apply in (lambda op: op @ params, lambda op: op.solve(params, 0.1)):
        all_of_it, result = apply(op), apply(rest)
        assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(result.pop("stack")))
        assert any(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(all_of_it["stack"]))
        for name in inside:
            jax.tree.map(lambda a, b: close(a, np.asarray(b)), result[name], all_of_it[name])
    diagonal_of_rest = rest.diagonal()
    assert diagonal_of_rest.pop("stack") == {"b": None, "w": None}
    assert jax.tree.structure(diagonal_of_rest) == jax.tree.structure(inside)
    close(rest.trace(), op.trace() - op.blocks["stack"].trace())
    assert len(rest.eigenvalues()) == 90 - 40


def test_an_operator_without_blocks_is_zero():
    params, x, y = setup()
    registry = curvature.register(loss_fn, params, x, y).override("*", exclude=True)
    op = curvature.Estimator(registry, curvature.GaussNewton())(params, x, y)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(op @ params))
    assert op.trace() == op.logdet(0.1) == 0
    assert op.eigenvalues().shape == (0,)


def test_logdet_of_a_regular_operator_without_damping():
    rng = np.random.default_rng(8)
    x, y = rng.normal(size=(6, 3)), rng.normal(size=(6, 2))
    params = {"w": rng.normal(size=(3, 2))}

    def loss(params, x, y):
        return curvature.losses.squared_error(x @ params["w"], y).sum()

    registry = curvature.register(loss, params, x, y)
    op = curvature.Estimator(registry, curvature.GaussNewton())(params, x, y)
    # G = (x'x / 6) x (6 * 2 I): the Hessian of the loss.
    close(op.logdet(), np.linalg.slogdet(np.kron(x.T @ x, 2 * np.eye(2)))[1])


def test_results_have_the_dtype_of_the_tree():
    _, op = operator()
    v = unflatten(np.random.default_rng(7).normal(size=90))
    expected = op.solve(v, 0.1)
    with jax.numpy_dtype_promotion("standard"):  # float32 vectors, float64 blocks
        result = op.solve(jax.tree.map(lambda x: x.astype(jnp.bfloat16), v), 0.1)
    assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(flatten(result), flatten(expected), rtol=0.1, atol=0.1)


WRONG = {
    "a leaf is missing": lambda p: {k: v for k, v in p.items() if k != "scale"},
    "a leaf too many": lambda p: p | {"more": jnp.zeros(2)},
    "another name": lambda p: {k.replace("head", "tail"): v for k, v in p.items()},
    "another container": lambda p: list(p.values()),
    "an array": lambda p: jnp.zeros(90),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(
    "call", [lambda op, v: op @ v, lambda op, v: op.solve(v, 0.1), lambda op, v: op.power(v, 2)]
)
def test_another_structure_raises(call, wrong):
    params, _, _ = setup()
    _, op = operator()
    with pytest.raises(ValueError, match="acts on trees like the parameters: "):
        call(op, WRONG[wrong](params))


def test_operator_is_a_pytree_that_jit_takes_and_returns():
    params, x, y = setup()
    registry, op = operator()
    estimator = curvature.Estimator(registry, curvature.GaussNewton())
    key = jax.random.key(0)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(op))
    returned = jax.jit(estimator)(params, x, y, key=key)
    assert isinstance(returned, curvature.BlockDiagonal)
    assert jax.tree.structure(returned) == jax.tree.structure(op)
    jax.tree.map(lambda a, b: close(a, np.asarray(b)), returned, op)

    solve = jax.jit(lambda op, v: op.solve(v, 0.1))
    expected = op.solve(params, 0.1)
    for one in (op, returned, jax.tree.unflatten(*jax.tree.flatten(op)[::-1])):
        jax.tree.map(lambda a, b: close(a, np.asarray(b)), solve(one, params), expected)
    assert solve._cache_size() == 1  # the operators' static parts are equal


def test_arrays_are_the_statistics_that_the_operator_was_made_of():
    params, x, y = setup()
    registry, op = operator()
    estimator = curvature.Estimator(registry, curvature.GaussNewton())
    statistics = estimator.statistics(params, x, y, key=jax.random.key(0))
    factors = {x.name: factors_of(x, statistics[x.name]) for x in estimator.layers}
    assert jax.tree.structure(op.arrays()) == jax.tree.structure(factors)
    jax.tree.map(lambda a, b: close(a, np.asarray(b)), op.arrays(), factors)
    again = estimator.operator(op.arrays())
    jax.tree.map(lambda a, b: close(a, np.asarray(b)), again @ params, op @ params)
