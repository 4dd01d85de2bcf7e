"""What operators take: batches, their weights, loaders, trees and losses; what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from operator_cases import N, brute_force, close, setup

import curvature
from curvature import operators


def test_weights_of_batches():
    case, loss_fn, _ = setup("mlp")
    batches = [case.args(3, N), case.args(4, N)]
    parts = [brute_force("mlp", seed).gauss_newton for seed in (3, 4)]
    op = operators.gauss_newton(loss_fn, case.params, batches, weights=[1, 0.25])
    close(operators.to_dense(op), parts[0] + 0.25 * parts[1])
    for weights in ([1.0], [1.0, 1.0, 1.0]):
        op = operators.gauss_newton(loss_fn, case.params, batches, weights=weights)
        with pytest.raises(ValueError, match=r"2 batches and \d weights"):
            op @ case.params


def test_batches_whose_size_cannot_be_read_need_weights():
    def loss_fn(w, statistics, x):
        return curvature.losses.l2_loss((x - statistics) @ w, jnp.zeros(len(x))).mean()

    batches = [(jnp.ones(2), normal(0, n, 2)) for n in (4, 4, 3)]
    w = jnp.ones(2)
    close(*(operators.gauss_newton(loss_fn, w, batches[:k]) @ w for k in (2, 2)))
    op = operators.gauss_newton(loss_fn, w, batches)
    with pytest.raises(ValueError, match=r"different leading axes, \[2, 3\].*weights="):
        op @ w
    assert operators.gauss_newton(loss_fn, w, batches, weights=[1, 1, 1]) @ w is not None


class Loader:
    """Makes its batches anew each time, as NumPy arrays, and counts how often."""

    def __init__(self, batches):
        self.batches, self.read = batches, 0

    def __iter__(self):
        for batch in self.batches:
            self.read += 1
            yield tuple(np.asarray(x) for x in batch)


def test_a_loader_is_read_batch_by_batch_and_nothing_is_traced_anew():
    """Other vectors, batches, parameters or operators cost no trace; another shape costs one."""
    case, loss_fn, _ = setup("mlp")
    traces = []

    def counted(p, *args):
        traces.append(args[0].shape)
        return loss_fn(p, *args)

    loader = Loader([case.args(seed, n) for seed, n in ((0, 4), (1, 4), (2, 4), (3, 2))])
    op = operators.gauss_newton(counted, case.params, loader)
    assert loader.read == 1
    op @ case.params
    op @ jax.tree.map(jnp.ones_like, case.params)
    assert loader.read == 1 + 2 * 4
    first = len(traces)
    assert first <= 4
    other = jax.tree.map(lambda p: p + 1, case.params)
    operators.gauss_newton(counted, other, loader) @ case.params
    assert len(traces) == first


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "batches is empty"),
        ((b for b in [(1,)]), TypeError, "generator, which can be iterated only once"),
        (iter([(1,)]), TypeError, "list_iterator, which can be iterated only once"),
        ({"x": 1}, TypeError, "type dict, expected an iterable of batches"),
        (np.ones((2, 2)), TypeError, "type ndarray, expected an iterable"),
        (3, TypeError, "type int, expected an iterable"),
    ],
    ids=["empty", "generator", "iterator", "dict", "array", "number"],
)
def test_what_is_no_dataset_is_refused(batches, error, message):
    with pytest.raises(error, match=message):
        operators.hessian(lambda p, x: jnp.sum(p), jnp.ones(2), batches)


def test_trees_that_are_not_like_the_parameters_are_refused():
    op = operators.hessian(lambda p, x: jnp.sum(p["a"] ** 2), {"a": jnp.ones(2)}, [jnp.ones(1)])
    with pytest.raises(ValueError, match=r"structure: found \['b'\], expected \['a'\]"):
        op @ {"b": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"\['a'\] has shape \[3\], expected .*\[2\]"):
        op @ {"a": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"leading axes \[\(\)\]. Use mv"):
        op.mm({"a": jnp.ones(())})
    with pytest.raises(ValueError, match=r"\['a'\] has shape \[\], expected"):
        op.mm({"a": jnp.ones(2)})


def test_losses_that_cannot_be_seen_are_refused():
    loss = curvature.losses.l2_loss
    data = [normal(0, N)]

    def untagged(p, x):
        return jnp.mean((x * p) ** 2)

    def hidden(p, x):
        return jax.lax.while_loop(
            lambda c: c[0] < 1, lambda c: (c[0] + 1, loss(x * p).mean()), (0, jnp.zeros(()))
        )[1]

    def chained(p, x):
        first = loss(x * p).mean()
        return loss(x * first).mean()

    def vector(p, x):
        return loss(x * p)

    p = jnp.ones(())
    with pytest.raises(ValueError, match=r"no tagged loss.*optax\.losses"):
        operators.gauss_newton(untagged, p, data)
    with pytest.raises(ValueError, match="tagged inside while at test_operator_batches"):
        operators.gauss_newton(hidden, p, data)
    with pytest.raises(ValueError, match=r"l2_loss at test_operator_batches.*depend on .* another"):
        operators.gauss_newton(chained, p, data)
    with pytest.raises(TypeError, match="expected a scalar"):
        operators.gauss_newton(vector, p, data)


def test_heads_with_different_numbers_of_examples_have_no_empirical_fisher():
    def loss_fn(p, x):
        loss = curvature.losses.l2_loss
        return loss(x * p).mean() + loss(x[:2] * p).mean()

    with pytest.raises(ValueError, match=r"have \[2, 5\] examples"):
        operators.empirical_fisher(loss_fn, jnp.ones(()), [normal(0, N)])


def test_settings_that_make_no_sense_are_refused(key):
    case, loss_fn, _ = setup("mlp")
    data = [case.args(3, N)]
    with pytest.raises(ValueError, match="samples is 0"):
        operators.fisher(loss_fn, case.params, data, samples=0, key=key)
    with pytest.raises(ValueError, match="need a random key"):
        operators.fisher(loss_fn, case.params, data, samples=1)
    op = operators.gauss_newton(loss_fn, case.params, data)
    with pytest.raises(ValueError, match="at least 2"):
        operators.trace(op, key, 1)
    with pytest.raises(ValueError, match=r"samples is 2\.5"):
        operators.fisher(loss_fn, case.params, data, samples=2.5, key=key)
    with pytest.raises(ValueError, match="at_once=0"):
        operators.trace(op, key, at_once=0)
    for number in ({"damping": -1.0}, {"damping": float("nan")}, {"tolerance": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(number))}="):
            operators.solve(op, case.params, **number)
    for dtype in (jnp.int32, jnp.complex64):
        with pytest.raises(TypeError, match=r"params\['n'\] is of .*expected real floating"):
            operators.hessian(
                lambda p, x: (x * p["n"]).sum(), {"n": jnp.ones(2, dtype)}, [jnp.ones(2)]
            )
    with pytest.raises(ValueError, match="k is 0"):
        operators.top_eigenpairs(op, 0, key)
    with pytest.raises(ValueError, match="k is 100"):
        operators.top_eigenpairs(op, 100, key)
    with pytest.raises(ValueError, match="samples=1"):
        operators.spectral_density(op, key, samples=1)


# Estimates and solves ----------------------------------------------------------------------------
