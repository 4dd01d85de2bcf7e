"""Wide Kronecker factors as blocks along their diagonals, held against the matrices they stand for.

The blocks of a factor are those of the whole one; whatever is done with them is done by numpy with
matrices that are zero outside of them.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import curvature
from curvature import sides
from curvature.blocks import Kronecker
from curvature.sides import Limit

pytestmark = pytest.mark.usefixtures("standard_promotion")
LIMIT = Limit(3, "blocks")
SIZES = ((7, 8), (3, 8), (8, 2))  # a block that is filled up; one side; blocks that fit


def close(found, expected, rtol=1e-9):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def masked(matrix, form):
    """A matrix without what is outside of blocks of a form's width."""
    if len(form) < 3:
        return matrix
    number = np.arange(matrix.shape[-1]) // form[1]
    return np.where(number[:, None] == number, matrix, 0)


def in_form(matrix, form):
    """The blocks of a matrix as they are kept, by numpy."""
    if len(form) < 3:
        return matrix
    count, width, _ = form
    found = np.zeros((*matrix.shape[:-2], *form))
    for i in range(count):
        part = matrix[..., i * width : (i + 1) * width, i * width : (i + 1) * width]
        found[..., i, : part.shape[-2], : part.shape[-1]] = part
    return found


def factor(seed, size, stack=()):
    """A positive definite matrix without the entries outside of its blocks, and its form."""
    rows = np.asarray(normal(seed, *stack, 2 * size, size))
    form = LIMIT.form(size)
    return masked(rows.swapaxes(-1, -2) @ rows, form), form


# One side ----------------------------------------------------------------------------------------


def test_forms():
    assert [LIMIT.form(n) for n in (3, 4, 7, 9)] == [(3, 3), (2, 2, 2), (3, 3, 3), (3, 3, 3)]
    assert Limit(3).form(3) == (3, 3)
    assert Limit(3).form(4) == (4,)
    for size in range(1, 50):  # no block is empty, none wider than allowed
        for widest in range(1, 12):
            form = Limit(widest, "blocks").form(size)
            if len(form) == 3:
                count, width, _ = form
                assert width <= widest
                assert (count - 1) * width < size <= count * width


@pytest.mark.parametrize("size", [7, 6, 2])
@pytest.mark.parametrize("stack", [(), (2,)])
def test_a_side_is_the_matrix_that_it_stands_for(size, stack):
    matrix, form = factor(0, size, stack)
    kept, depth = jnp.asarray(in_form(matrix, form)), len(stack)
    v, rows = np.asarray(normal(1, *stack, size, 4)), np.asarray(normal(2, *stack, 3, 4, size))
    turned, how = v.swapaxes(-1, -2), "...ij,...jk->...ik"

    @jax.jit
    def found(kept):
        return {
            "full": sides.full(kept, size, depth),
            "entries": sides.entries(kept, size, depth),
            "left": sides.left(how, kept, v, depth, "highest"),
            "transposed": sides.left("...ji,...jk->...ik", kept, v, depth, "highest"),
            "right": sides.right(how, turned, kept, depth, "highest"),
            "rows": sides.right("...nti,...ij->...ntj", rows, kept, depth, "highest", rows=2),
            "unit": sides.full(sides.unit(kept, depth), size, depth),
        }

    expected = {
        "full": matrix,
        "entries": np.diagonal(matrix, axis1=-2, axis2=-1),
        "left": matrix @ v,
        "transposed": matrix.swapaxes(-1, -2) @ v,
        "right": turned @ matrix,
        "rows": np.einsum("...nti,...ij->...ntj", rows, matrix),
        "unit": np.broadcast_to(np.eye(size), matrix.shape),
    }
    jax.tree.map(close, found(kept), expected)


@pytest.mark.parametrize("rank", [1, 2, 7])
def test_an_eigenbasis_is_one_of_the_side_also_where_it_is_singular(rank):
    """What fills a block up would otherwise mix with the null space."""
    rows = np.asarray(normal(0, rank, 7))
    form = LIMIT.form(7)
    matrix = masked(rows.T @ rows, form)
    values, basis = sides.side_eigh(jnp.asarray(in_form(matrix, form)), 7, 0)
    q = np.asarray(sides.full(basis, 7, 0))
    close(q.T @ q, np.eye(7))
    close(q * values @ q.T, matrix)


def test_entries_may_be_as_large_as_their_squares_may_not():
    matrix, form = factor(0, 7)
    block = Kronecker(
        jnp.asarray(1e20 * in_form(matrix, form), jnp.float32), jnp.eye(2, dtype=jnp.float32)
    )
    block = dataclasses.replace(block, sizes=(7, 2))
    assert jnp.all(jnp.isfinite(block.damped_inverse(1e-3) @ jnp.ones((7, 2), jnp.float32)))


def test_what_fills_a_block_up_is_emptied():
    matrix, form = factor(0, 7)
    kept = jnp.asarray(in_form(matrix, form))
    apart = sides.told_apart(kept, 7, 0)
    assert float(jnp.min(jnp.linalg.eigvalsh(apart))) > 0
    close(sides.emptied(apart, 7, 0), kept)


# Blocks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SIZES)
def test_a_block_is_the_product_of_its_matrices(shape):
    (a, form_a), (b, form_b) = factor(0, shape[0]), factor(1, shape[1])
    kept = (jnp.asarray(in_form(x, form)) for x, form in ((a, form_a), (b, form_b)))
    block = Kronecker(*kept, sizes=shape)
    whole = Kronecker(jnp.asarray(a), jnp.asarray(b))
    v = normal(2, *shape)

    @jax.jit
    def algebra(block):
        inverse = block.damped_inverse(0.1)
        return {
            "product": block @ v,
            "dense": block.to_dense(),
            "trace": block.trace(),
            "diagonal": block.diagonal(),
            "eigenvalues": jnp.sort(block.eigenvalues().ravel()),
            "solve": block.solve(v, 0.1),
            "power": block.power(v, -0.5, 0.1),
            "logdet": block.logdet(0.1),
            "inverse": inverse @ v,
            "trace of the inverse": inverse.trace(),  # nothing is left where a block is filled up
        }

    found = algebra(block)
    close(found["dense"], np.kron(a, b))
    close(found["product"], a @ v @ b)
    close(found["trace"], np.trace(a) * np.trace(b))
    close(found["diagonal"], np.outer(np.diag(a), np.diag(b)))
    jax.tree.map(lambda x, y: close(x, np.asarray(y)), found, algebra(whole))


# Statistics --------------------------------------------------------------------------------------


def problem():
    """A deep enough net with a bias, so that a side of 5 inputs has 6 coordinates."""
    params = {"w": normal(0, 5, 8), "b": normal(1, 8), "v": normal(2, 8, 8), "u": normal(3, 8, 7)}
    args = (normal(4, 12, 5), jnp.arange(12) % 7)

    def loss(p, x, y):
        h = jnp.tanh(x @ p["w"] + p["b"])
        z = jnp.tanh(h @ p["v"]) @ p["u"]
        return curvature.losses.softmax_cross_entropy_with_integer_labels(z, y).mean()

    return loss, params, args


@pytest.mark.parametrize("block", ["kronecker", "kronecker_reduce", "kronecker_weighted", "foof"])
def test_blocks_are_those_of_the_whole_factors(block):
    loss, params, args = problem()
    registry = curvature.register(loss, params, *args).with_blocks(block)
    kind = curvature.Fisher(samples=None)
    whole = jax.jit(curvature.Estimator(registry, kind))(params, *args)
    found = jax.jit(curvature.Estimator(registry, kind, 3, wide_factors="blocks"))(params, *args)
    for name, x in whole.blocks.items():
        for side in ("input", "output"):
            expected, kept = np.asarray(getattr(x, side)), getattr(found.blocks[name], side)
            if expected.ndim == 2:
                expected = in_form(expected, LIMIT.form(len(expected)))
            close(kept, expected)
    assert found.blocks["w"].input.shape == (2, 3, 3)


def test_convolutions_tied_and_scanned_layers():
    """Patches, transposed uses, and stacks in front of the blocks."""
    params = {"c": normal(0, 2, 2, 2, 5), "t": normal(1, 5, 5), "s": normal(2, 3, 5, 5)}
    x = normal(3, 4, 3, 3, 2)

    def loss(p, x):
        dimensions = ("NHWC", "HWIO", "NHWC")
        h = jax.lax.conv_general_dilated(x, p["c"], (1, 1), "VALID", dimension_numbers=dimensions)
        h = jnp.tanh(h @ p["t"])
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["s"])
        return curvature.losses.l2_loss(jnp.tanh(h @ p["t"].T).mean((1, 2))).mean()

    registry, kind = curvature.register(loss, params, x), curvature.GaussNewton()
    whole, found = (
        jax.jit(estimator.statistics)(params, x)
        for estimator in (
            curvature.Estimator(registry, kind),
            curvature.Estimator(registry, kind, 3, wide_factors="blocks"),
        )
    )
    assert {"c", "t", "s"} == set(whole)
    assert "input_flipped" in whole["t"]
    for name, arrays in whole.items():
        for field, expected in arrays.items():
            matrix = not field.startswith("rows")
            form = LIMIT.form(expected.shape[-1]) if matrix else ()
            close(found[name][field], in_form(np.asarray(expected), form))


@pytest.mark.parametrize("positions", [(), (3,)], ids=["rows", "positions"])
def test_corrections_are_second_moments_in_the_basis_of_the_blocks(positions):
    params, x = {"w": normal(0, 7, 5)}, normal(1, 6, *positions, 7)

    def loss(p, x):
        return curvature.losses.l2_loss(x @ p["w"]).sum()

    registry = curvature.register(loss, params, x).with_blocks("ekfac")
    kind = curvature.EmpiricalFisher()
    estimator = curvature.Estimator(registry, kind, 3, wide_factors="blocks")
    block = jax.jit(estimator)(params, x).blocks["w"]
    qa, qb = (
        np.asarray(sides.full(basis, size, 0))
        for basis, size in zip((block.input_basis, block.output_basis), (7, 5), strict=True)
    )
    each = np.asarray(jax.jit(jax.vmap(lambda x: jax.grad(loss)(params, x[None])["w"]))(x))
    close(block.values, np.sum((qa.T @ each @ qb) ** 2, axis=0))
    dense = np.kron(qa, qb)
    close(block.to_dense(), dense * np.asarray(block.values).ravel() @ dense.T)


# Steps -------------------------------------------------------------------------------------------


def update(make, steps=1, registry=None, **options):
    loss, params, args = problem()
    registry = registry or curvature.register(loss, params, *args)
    tx = make(registry, max_factor_dim=3, wide_factors="blocks", **options)
    state = jax.jit(tx.init)(params)
    step = jax.jit(
        lambda s, p, key: tx.update(jax.grad(loss)(p, *args), s, p, loss_args=args, key=key)
    )
    for i in range(steps):
        updates, state = step(state, params, jax.random.key(i))
        params = optax.apply_updates(params, updates)
    return updates, state, loss(params, *args)


METHODS = {
    "Cholesky": curvature.Cholesky(),
    "NewtonSchulz": curvature.NewtonSchulz(),
    "Eigh": curvature.Eigh(factored=True),
    "QR": curvature.QR(factored=True),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_that_of_the_inverses_of_the_blocks(name):
    loss, params, args = problem()
    registry, kind = curvature.register(loss, params, *args), curvature.Fisher(samples=None)
    make = curvature.scale_by_curvature
    found, _, _ = update(
        make, kind=kind, damping=0.01, relative_damping=False, refresh=METHODS[name], decay=0.0
    )
    operator = jax.jit(curvature.Estimator(registry, kind))(params, *args)
    grads = jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(params, *args))
    joined = {"w": np.vstack([grads["w"], grads["b"]]), "v": grads["v"], "u": grads["u"]}
    for name, block in operator.blocks.items():
        a, b = (masked(np.asarray(x), LIMIT.form(len(x))) for x in (block.input, block.output))
        pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(b) / len(b)))
        a, b = a + pi * 0.1 * np.eye(len(a)), b + 0.1 / pi * np.eye(len(b))
        expected = np.linalg.solve(a, np.linalg.solve(b, joined[name].T).T)
        kept = np.vstack([found["w"], found["b"]]) if name == "w" else found[name]
        close(kept, expected, rtol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_inverses_of_unchanged_factors_are_fresh(name):
    """Also of a block that is filled up, which must not look changed for ever."""
    loss, params, args = problem()
    registry, kind = curvature.register(loss, params, *args), curvature.Fisher(samples=None)
    how = dataclasses.replace(METHODS[name], tolerance=0.5)
    tx = curvature.scale_by_curvature(
        registry, kind=kind, damping=0.01, refresh=how, max_factor_dim=3, wide_factors="blocks"
    )
    grads, state = jax.jit(jax.grad(loss))(params, *args), jax.jit(tx.init)(params)
    update = jax.jit(lambda state: tx.update(grads, state, params, loss_args=args)[1])
    for _ in range(3):
        state = update(state)
    assert float(state.stats.staleness) < 1e-3


RECIPES = {
    "kfac": lambda r, **o: curvature.kfac(r, 0.1, **o),
    "ekfac": lambda r, **o: curvature.ekfac(r, 0.1, **o),
    "QR": lambda r, **o: curvature.kfac(r, 0.1, refresh=curvature.QR(), **o),
    "adaptive": lambda r, **o: curvature.kfac(
        r, curvature.QuadraticModel(), damping=curvature.LevenbergMarquardt(), **o
    ),
    "eigen_adam": lambda r, **o: curvature.eigen_adam(r, 0.03, **o),
    "soap": lambda r, **o: curvature.eigen_adam(r, 0.03, kind=curvature.Shampoo(), **o),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_train(name):
    loss, params, args = problem()
    _, _, after = update(RECIPES[name], steps=15)
    assert float(after) < 0.8 * float(loss(params, *args))


@pytest.mark.parametrize("refresh", [curvature.QR(), curvature.Eigh()], ids=["QR", "Eigh"])
@pytest.mark.parametrize("kind", [curvature.Fisher(), curvature.Shampoo()], ids=["fisher", "soap"])
def test_a_basis_of_blocks_is_orthogonal_and_cancels(kind, refresh):
    """Rotated, left alone, and rotated back, a gradient is what it was."""
    loss, params, args = problem()
    make = lambda r, **o: curvature.in_eigenbasis(r, optax.identity(), kind, refresh=refresh, **o)  # noqa: E731
    found, state, _ = update(make, steps=1)
    jax.tree.map(lambda x, y: close(x, np.asarray(y)), found, jax.grad(loss)(params, *args))
    _, state, _ = update(make, steps=12)
    for arrays in optax.tree_utils.tree_get(state, "bases").values():
        for q in arrays.values():
            close(np.asarray(q).swapaxes(-1, -2) @ q, np.broadcast_to(np.eye(q.shape[-1]), q.shape))


@pytest.mark.parametrize("name", ["kfac", "ekfac", "eigen_adam"])
@pytest.mark.parametrize("gather", ["inverses", "updates"])
def test_devices_share_blocks(name, gather):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    over = NamedSharding(mesh, P("data"))
    alone, _, _ = update(RECIPES[name], steps=2)
    shared, _, _ = update(RECIPES[name], steps=2, refresh_over=over, gather=gather)
    jax.tree.map(lambda x, y: close(x, np.asarray(y), 1e-5), shared, alone)


def test_memory_and_messages():
    loss, params, args = problem()
    registry = curvature.register(loss, params, *args)
    whole = curvature.kfac(registry, 0.1)
    blocks = curvature.kfac(registry, 0.1, max_factor_dim=3, wide_factors="blocks")
    size = params["w"].dtype.itemsize
    found = curvature.state_memory(whole, params)["inverse"]
    assert found == size * (6**2 + 8**2 + 2 * 8**2 + 8**2 + 7**2)
    assert curvature.state_memory(blocks, params)["inverse"] == size * (2 + 5 * 3) * 3**2
    for make in (curvature.kfac, curvature.eigen_adam):
        with pytest.raises(ValueError, match="expected 'diagonal' or 'blocks'"):
            make(registry, 0.1, wide_factors="block")
    with pytest.raises(ValueError, match="expected 'diagonal' or 'blocks'"):
        curvature.Estimator(registry, wide_factors="full")
    for widest in (-1, 2.5, None, True):
        for make in (curvature.kfac, curvature.eigen_adam):
            with pytest.raises(ValueError, match=r"max_factor_dim is .*, expected a whole number"):
                make(registry, 0.1, max_factor_dim=widest)
    with pytest.raises(ValueError, match="at least 1"):
        curvature.kfac(registry, 0.1, max_factor_dim=0, wide_factors="blocks")
