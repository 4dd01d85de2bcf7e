"""Views of a leaf as ranges, beside the entries that they hold; what is left of large leaves."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import curvature
from curvature import losses
from curvature.trace.views import View, overlap, remainder

SHAPES = [(12,), (4, 6), (2, 3, 4), (3, 1, 4), (2, 2, 2, 3)]


@st.composite
def views(draw, shape, most=5):
    """A view of an array of this shape, by a few moves."""
    view = View.of(0, shape)
    for _ in range(draw(st.integers(0, most))):
        inner = view.inner
        move = draw(st.sampled_from(["reshape", "transpose", "slice", "slice", "reverse"]))
        if move == "reshape":
            size = math.prod(inner)
            first = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
            rest = size // first
            second = draw(st.sampled_from([n for n in range(1, rest + 1) if rest % n == 0]))
            view = view.reshape((first, second, rest // second))
        elif move == "transpose":
            view = view.transpose(tuple(draw(st.permutations(range(len(inner))))))
        elif move == "reverse":
            axes = [a for a in range(len(inner)) if draw(st.booleans())]
            view = view.reverse(tuple(axes))
        else:
            starts = [draw(st.integers(0, n - 1)) for n in inner]
            stops = [draw(st.integers(a + 1, n)) for a, n in zip(starts, inner, strict=True)]
            view = view.slice(starts, stops, [draw(st.integers(1, 2)) for _ in inner])
    return view


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_ranges_say_what_counting_entries_says(data):
    shape = data.draw(st.sampled_from(SHAPES))
    found = data.draw(st.lists(views(shape), min_size=1, max_size=3))
    entries = [set(view.indices().ravel().tolist()) for view in found]
    assert overlap(found) == (len(set().union(*entries)) < sum(map(len, entries)))
    other = found[-1]
    same = found[0].shape == other.shape and np.array_equal(found[0].indices(), other.indices())
    assert found[0].same_as(other) == same
    if not overlap(found):
        rest = remainder(found)
        left = np.concatenate([view.indices().ravel() for view in rest]) if rest else np.array([])
        everything = np.concatenate([left, *(view.indices().ravel() for view in found)])
        np.testing.assert_array_equal(np.sort(everything), np.arange(math.prod(shape)))


@given(st.data())
def test_a_view_is_itself_after_moves_that_undo_one_another(data):
    shape = data.draw(st.sampled_from(SHAPES[1:]))
    view = data.draw(views(shape, most=2))
    order = tuple(data.draw(st.permutations(range(len(view.inner)))))
    back = tuple(int(a) for a in np.argsort(order))
    assert view.same_as(view.transpose(order).transpose(back))
    assert view.same_as(view.reshape((math.prod(view.inner),)).reshape(view.inner))
    assert view.same_as(view.reverse((0,)).reverse((0,)))


LARGE = {
    "slices of columns": ((64, 96), lambda w: [w[:, 32 * i : 32 * (i + 1)] for i in range(3)]),
    "interleaved heads": (
        (64, 96),
        lambda w: [w.reshape(64, 4, 3, 8)[:, :, i].reshape(64, 32) for i in range(3)],
    ),
    "a flat vector": ((6144,), lambda w: [w[:2048].reshape(64, 32), w[2048:4096].reshape(64, 32)]),
    "every other row": ((128, 32), lambda w: [w[::2]]),
    "the first rows": ((256, 32), lambda w: [w[:64]]),
    "a corner": ((128, 96), lambda w: [w[:64, :32], w[64:, 64:]]),
    "convolution kernels": ((3, 3, 64, 32), lambda w: [w[1, 1], w[0, 2]]),
}


@pytest.mark.parametrize(("shape", "parts"), LARGE.values(), ids=LARGE)
def test_nothing_of_the_size_of_a_leaf_is_in_what_is_static_or_in_the_program(shape, parts):
    """The leaf is met in parts, of which each is a layer, and what is left are boxes."""

    def loss_fn(p, x, y):
        return losses.l2_loss(sum(jnp.tanh(x @ w) for w in parts(p["w"])), y).mean()

    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, float)

    p, x, y = {"w": leaf(*shape)}, leaf(4, 64), leaf(4, 32)
    registry = curvature.register(loss_fn, p, x, y)
    assert registry.layers[0].structured
    assert sum(layer.size for layer in registry.layers) == math.prod(shape)
    for layer in registry.layers:
        for view in layer.views:
            assert all(move.kind != "take" for move in view.moves)
            assert len(str(dataclasses.astuple(view))) < 1000
    tx = curvature.kfac(registry, 0.1, damping=1e-2)

    def step(p, g, state, args, key):
        return tx.update(g, state, p, loss_args=args, key=key)

    key = jax.eval_shape(lambda: jax.random.key(0))
    text = jax.jit(step).lower(p, p, jax.eval_shape(tx.init, p), (x, y), key).as_text()
    constants = re.findall(r'dense<"?\[?([^>]*)>', text)
    assert max(map(len, constants)) < 1000


def test_entries_that_are_no_ranges_are_counted():
    """A slice through flattened axes, transposed before: rows of it are no box."""
    cut = View.of(0, (4, 6)).transpose((1, 0)).reshape((24,)).slice((1,), (10,), None)
    assert cut.ranges() is None
    assert overlap([cut, View.of(0, (4, 6)).slice((0, 0), (1, 1), None)]) is False
    assert overlap([cut, View.of(0, (4, 6)).slice((1, 0), (2, 1), None)]) is True
    (rest,) = remainder([cut])
    held = [*cut.indices().tolist(), *rest.indices().tolist()]
    assert sorted(held) == list(range(24))
