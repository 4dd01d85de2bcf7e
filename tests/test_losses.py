"""The losses with a namesake in optax: its values, derivatives and refusals, and the tag.

What a family adds (scores, matrices, samples) is in test_families.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvature

INTEGER = "softmax_cross_entropy_with_integer_labels"
SOFT = "softmax_cross_entropy"
SIGMOID = "sigmoid_binary_cross_entropy"
L2 = "l2_loss"
SQUARED = "squared_error"
HUBER = "huber_loss"

TOLERANCE = {"float64": 1e-13, "float32": 2e-6, "bfloat16": 3e-2}


def normal(*shape, seed=0):
    return 2 * np.random.default_rng(seed).normal(size=shape)


def labels(*shape, classes, seed=1):
    return np.random.default_rng(seed).integers(0, classes, shape, dtype=np.int32)


def soft(*shape, axis=-1, seed=1):
    p = np.random.default_rng(seed).uniform(0.1, 1, shape)
    return p / p.sum(axis, keepdims=True)


def weights(*shape, seed=1):
    """Soft labels that do not sum to one."""
    return np.random.default_rng(seed).uniform(0, 2, shape)


def mask(*shape, seed=2):
    """A mask that leaves out about a third; entries at index 0 always count."""
    kept = np.random.default_rng(seed).uniform(size=shape) > 0.35
    kept[..., 0] = kept[0] = True
    assert not kept.all()
    return kept


def mask_with_an_empty_unit():
    kept = mask(4, 5)
    kept[2] = False
    return kept


# name -> (function, positional arguments, keyword arguments)
CASES = {
    "integer": lambda: (INTEGER, (normal(4, 5), labels(4, classes=5)), {}),
    "integer, no unit axis": lambda: (INTEGER, (normal(5), labels(classes=5)), {}),
    "integer, axis 0": lambda: (INTEGER, (normal(5, 4), labels(4, classes=5)), {"axis": 0}),
    "integer, middle axis": lambda: (
        INTEGER,
        (normal(3, 5, 2), labels(3, 2, classes=5)),
        {"axis": 1},
    ),
    "integer, two axes": lambda: (
        INTEGER,
        (normal(3, 4, 2), labels(4, classes=6)),
        {"axis": (0, 2)},
    ),
    "integer, two axes in reverse": lambda: (
        INTEGER,
        (normal(3, 4, 2), labels(4, classes=6)),
        {"axis": (-1, 0)},
    ),
    "integer, all axes": lambda: (INTEGER, (normal(3, 2), labels(classes=6)), {"axis": (0, 1)}),
    "integer, mask": lambda: (
        INTEGER,
        (normal(4, 5), labels(4, classes=5)),
        {"where": mask(4, 5)},
    ),
    "integer, mask of classes": lambda: (
        INTEGER,
        (normal(4, 5), labels(4, classes=5)),
        {"where": np.array([[True, False, True, True, False]])},
    ),
    "integer, mask of units": lambda: (
        INTEGER,
        (normal(4, 5), labels(4, classes=5)),
        {"where": np.array([True, False, True, True])},
    ),
    "integer, empty unit": lambda: (
        INTEGER,
        (normal(4, 5), labels(4, classes=5)),
        {"where": mask_with_an_empty_unit()},
    ),
    "integer, mask and axis": lambda: (
        INTEGER,
        (normal(3, 5, 2), labels(3, 2, classes=5)),
        {"axis": 1, "where": mask(3, 5, 2)},
    ),
    "integer, mask and two axes": lambda: (
        INTEGER,
        (normal(3, 4, 2), labels(4, classes=6)),
        {"axis": (2, 0), "where": mask(3, 4, 2)},
    ),
    "soft": lambda: (SOFT, (normal(4, 5), soft(4, 5)), {}),
    "soft, not summing to one": lambda: (SOFT, (normal(4, 5), weights(4, 5)), {}),
    "soft, middle axis": lambda: (SOFT, (normal(3, 5, 2), weights(3, 5, 2)), {"axis": -2}),
    "soft, two axes": lambda: (SOFT, (normal(3, 4, 2), weights(3, 4, 2)), {"axis": (0, 2)}),
    "soft, no axis": lambda: (SOFT, (normal(3, 2), weights(3, 2)), {"axis": None}),
    "soft, one label for all": lambda: (SOFT, (normal(4, 5), weights(5)), {}),
    "soft, one logit for all": lambda: (SOFT, (normal(5), weights(4, 5)), {}),
    "soft, one weight a unit": lambda: (SOFT, (normal(4, 5), weights(4, 1)), {}),
    "soft, both broadcast": lambda: (SOFT, (normal(3, 1, 5), weights(2, 5)), {}),
    "soft, mask": lambda: (SOFT, (normal(4, 5), weights(4, 5)), {"where": mask(4, 5)}),
    "soft, mask of units": lambda: (
        SOFT,
        (normal(4, 5), weights(4, 5)),
        {"where": np.array([True, False, True, True])},
    ),
    "soft, empty unit": lambda: (
        SOFT,
        (normal(4, 5), weights(4, 5)),
        {"where": mask_with_an_empty_unit()},
    ),
    "soft, mask and axes": lambda: (
        SOFT,
        (normal(3, 4, 2), weights(3, 4, 2)),
        {"axis": (0, 2), "where": mask(3, 4, 2)},
    ),
    "sigmoid": lambda: (SIGMOID, (normal(4, 3), labels(4, 3, classes=2).astype(float)), {}),
    "sigmoid, integer labels": lambda: (SIGMOID, (normal(4, 3), labels(4, 3, classes=2)), {}),
    "sigmoid, soft labels": lambda: (SIGMOID, (normal(4, 3), weights(4, 3) / 2), {}),
    "sigmoid, one label for all": lambda: (SIGMOID, (normal(4, 3), weights(3) / 2), {}),
    "sigmoid, one logit for all": lambda: (SIGMOID, (normal(3), weights(4, 3) / 2), {}),
    "sigmoid, large logits": lambda: (SIGMOID, (15 * normal(4, 3), weights(4, 3) / 2), {}),
    "sigmoid, scalar": lambda: (SIGMOID, (normal(), weights() / 2), {}),
    "l2": lambda: (L2, (normal(4, 3), normal(4, 3, seed=1)), {}),
    "l2, no targets": lambda: (L2, (normal(4, 3),), {}),
    "l2, scalar": lambda: (L2, (normal(), normal(seed=1)), {}),
    "squared": lambda: (SQUARED, (normal(4, 3), normal(4, 3, seed=1)), {}),
    "squared, no targets": lambda: (SQUARED, (normal(4, 3),), {}),
    "huber": lambda: (HUBER, (normal(4, 3), normal(4, 3, seed=1)), {}),
    "huber, delta": lambda: (HUBER, (normal(4, 3), normal(4, 3, seed=1)), {"delta": 0.3}),
    "huber, no targets": lambda: (HUBER, (normal(4, 3),), {"delta": 2}),
    "huber, deltas": lambda: (HUBER, (normal(4, 3),), {"delta": np.array([0.5, 1.0, 2.0])}),
}

TYPICAL = [
    "integer",
    "integer, middle axis",
    "integer, mask and two axes",
    "soft",
    "soft, mask",
    "sigmoid",
    "sigmoid, integer labels",
    "l2",
    "squared",
    "huber",
]

# Logits are broadcast to the labels before the classes are looked for, so all three differ from
# optax, which normalises over the logits' own axes; the first two silently.
BROADCAST_REFUSED = {
    "logits of lower rank, positive axis": lambda: (SOFT, (normal(5), weights(5, 5)), {"axis": 0}),
    "one logit for all classes": lambda: (SOFT, (normal(4, 1), weights(4, 5)), {}),
    "logits of lower rank, mask": lambda: (
        SOFT,
        (normal(5), weights(4, 5)),
        {"where": np.array([True, False, True, True, False])},
    ),
}


def case(name, dtype=np.float64, table=CASES):
    """(our function, optax's function, arguments), with floating-point arguments in `dtype`."""
    function, args, kwargs = table[name]()
    args = [
        jnp.asarray(x, dtype) if np.issubdtype(x.dtype, np.floating) else jnp.asarray(x)
        for x in map(np.asarray, args)
    ]
    kwargs = {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in kwargs.items()}
    ours = functools.partial(getattr(curvature.losses, function), **kwargs)
    theirs = functools.partial(getattr(optax.losses, function), **kwargs)
    return ours, theirs, args


def close(actual, expected, tolerance=1e-12):
    actual, expected = jnp.asarray(actual), jnp.asarray(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    np.testing.assert_allclose(
        np.asarray(actual, np.float64),
        np.asarray(expected, np.float64),
        rtol=tolerance,
        atol=tolerance,
    )


def summed(function):
    return lambda *args: function(*args).sum()


# Values and derivatives ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_optax(name):
    """Gradients in the logits and, where they are floating point, the targets."""
    ours, theirs, args = case(name)
    which = tuple(i for i, x in enumerate(args) if jnp.issubdtype(x.dtype, jnp.floating))
    if "where" in ours.keywords:
        which = (0,)  # optax's gradient in a masked soft label is 0 * inf

    @jax.jit
    def both(*args):
        return [(f(*args), jax.grad(summed(f), which)(*args)) for f in (ours, theirs)]

    actual, expected = both(*args)
    assert all(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(expected))
    jax.tree.map(close, actual, expected)


@pytest.mark.parametrize("name", TYPICAL)
def test_eager_values_and_hessians_are_optax(name):
    ours, theirs, args = case(name)
    close(ours(*args), theirs(*args))

    @jax.jit
    def both(*args):
        return [jax.hessian(summed(f))(*args) for f in (ours, theirs)]

    actual, expected = both(*args)
    assert np.abs(expected).max() > 1e-3
    close(actual, expected)


@pytest.mark.parametrize("name", ["integer, mask and two axes", "sigmoid"])
def test_eager_and_forward_mode_derivatives_are_optax(name):
    ours, theirs, args = case(name)
    close(jax.grad(summed(ours))(*args), jax.grad(summed(theirs))(*args))
    close(jax.jit(jax.jacfwd(ours))(*args), jax.jit(jax.jacfwd(theirs))(*args))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["integer", "integer, mask and two axes", *TYPICAL[3:]])
def test_low_precision_is_kept_as_optax_keeps_it(name, dtype):
    ours, theirs, args = case(name, dtype)

    @jax.jit
    def both(*args):
        return [(f(*args), jax.grad(summed(f))(*args)) for f in (ours, theirs)]

    actual, expected = both(*args)
    assert {x.dtype.name for x in expected} == {dtype}
    jax.tree.map(functools.partial(close, tolerance=TOLERANCE[dtype]), actual, expected)


@pytest.mark.parametrize("name", BROADCAST_REFUSED)
def test_logits_that_would_be_broadcast_ambiguously_raise(name):
    ours, _, args = case(name, table=BROADCAST_REFUSED)
    with pytest.raises(ValueError, match="broadcasts to the logits"):
        ours(*args)


def stacked(x, axis, copies=3):
    """`copies` different versions of an array along a new axis."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        parts = [x * (1 + i / 7) for i in range(copies)]
    else:
        parts = [jnp.roll(x, i) for i in range(copies)]
    return jnp.stack(parts, axis)


def unstacked(x, axis, copy):
    return x if axis is None else jnp.take(x, copy, axis=axis)


IN_AXES = [(0, 0), (-1, 0), (1, -1), (0, None), (None, -1)]


@pytest.mark.parametrize(
    ("transform", "in_axes"),
    [*[("value", axes) for axes in IN_AXES], ("grad", (-1, 0)), ("jit", (0, -1))],
)
@pytest.mark.parametrize(
    "name",
    ["integer", "integer, mask", "soft, two axes", "sigmoid", "l2"],
)
def test_vmap_in_any_axis(name, in_axes, transform):
    ours, theirs, args = case(name)
    if transform == "grad":
        ours, theirs = jax.grad(summed(ours)), jax.grad(summed(theirs))
    # The mask is a constant of the mapped function: an operand that is not mapped.
    mapped = [x if a is None else stacked(x, a) for x, a in zip(args, in_axes, strict=True)]
    one = [[unstacked(x, a, i) for x, a in zip(mapped, in_axes, strict=True)] for i in range(3)]
    theirs = jax.jit(theirs)
    expected = jnp.stack([theirs(*xs) for xs in one])
    assert not np.allclose(expected[0], expected[1])
    for out in (0, -1):
        vmapped = jax.vmap(ours, in_axes, out_axes=out)
        vmapped = jax.jit(vmapped) if transform == "jit" else vmapped
        close(jnp.moveaxis(vmapped(*mapped), out, 0), expected)


def test_vmap_over_masks():
    z, t, masks = normal(4, 5), labels(4, classes=5), np.stack([mask(4, 5, seed=s) for s in (2, 3)])
    ours = jax.vmap(
        lambda m: curvature.losses.softmax_cross_entropy_with_integer_labels(z, t, -1, m)
    )
    for i, m in enumerate(masks):
        expected = optax.losses.softmax_cross_entropy_with_integer_labels(z, t, -1, jnp.asarray(m))
        close(ours(jnp.asarray(masks))[i], expected)


@pytest.mark.parametrize("name", ["integer", "soft"])
def test_a_loss_of_one_example_vmapped_is_the_loss_of_the_batch(name):
    ours, theirs, args = case(name)

    @jax.jit
    def both(*args):
        nested = [x.reshape((2, 2, *x.shape[1:])) for x in args]
        mapped = jax.vmap(ours)(*args), jax.vmap(jax.grad(ours))(*args)
        return (*mapped, jax.vmap(jax.vmap(ours))(*nested)), (
            theirs(*args),
            jax.grad(summed(theirs))(*args),
            theirs(*nested),
        )

    jax.tree.map(close, *both(*args))


# The tag ------------------------------------------------------------------------------------------


def tags(loss_fn, z):
    return curvature.register(lambda p: loss_fn(p["z"]).sum(), {"z": z}).losses


@pytest.mark.parametrize(
    ("name", "shape"),
    {
        "integer": (4, 5),
        "integer, middle axis": (3, 2, 5),
        "integer, two axes": (4, 6),
        "soft": (4, 5),
        "soft, one logit for all": (4, 5),
        "soft, no axis": (6,),
        "sigmoid": (4, 3),
        "l2": (4, 3),
        "l2, no targets": (4, 3),
        "squared": (4, 3),
        "huber, deltas": (4, 3),
    }.items(),
)
def test_a_loss_is_seen_in_the_trace(name, shape):
    """One tag, under its public name, with the classes as the last axis."""
    ours, _, (z, *rest) = case(name)
    (tag,) = tags(lambda z: ours(z, *rest), z)
    assert tag.name == CASES[name]()[0]
    assert tag.z.shape == shape


@pytest.mark.parametrize("name", ["integer", "soft", "sigmoid", "l2", "squared"])
def test_a_vmapped_loss_is_one_tag_with_the_mapped_axis_in_front(name):
    ours, _, (z, *rest) = case(name)
    (tag,) = tags(
        lambda z: jax.vmap(ours, (-1, *(0 for _ in rest)))(z, *rest), jnp.moveaxis(z, 0, -1)
    )
    assert tag.z.shape == z.shape


# Bad inputs ---------------------------------------------------------------------------------------

z, t = np.zeros((4, 5)), np.zeros(4, np.int32)
L = curvature.losses

# name -> (call, exception, words of the message: what was found, what was expected)
BAD = {
    "integer logits": (lambda: L.softmax_cross_entropy_with_integer_labels(t, t), TypeError,
                       "logits .*int32.* expected floating"),
    "complex logits": (lambda: L.softmax_cross_entropy(z + 1j, z), TypeError,
                       "logits .*complex128.* expected floating"),
    "boolean logits": (lambda: L.sigmoid_binary_cross_entropy(z > 0, z), TypeError,
                       "logits .*bool.* expected floating"),
    "integer predictions": (lambda: L.l2_loss(t), TypeError,
                            "predictions .*int32.* expected floating"),
    "integer predictions, squared": (lambda: L.squared_error(t, t), TypeError,
                                     "predictions .*int32.* expected floating"),
    "labels of floats": (lambda: L.softmax_cross_entropy_with_integer_labels(z, z[:, 0]), TypeError,
                         "labels .*float64.* expected integers.*softmax_cross_entropy"),
    "one-hot labels": (
        lambda: L.softmax_cross_entropy_with_integer_labels(z, z.astype(np.int32)), ValueError,
        r"labels .*\(4, 5\).* expected \(4,\)"),
    "wrong number of labels": (
        lambda: L.softmax_cross_entropy_with_integer_labels(z, t[:3]), ValueError,
        r"labels .*\(3,\).* expected \(4,\)"),
    "labels for another axis": (
        lambda: L.softmax_cross_entropy_with_integer_labels(z, t, axis=0), ValueError,
        r"labels .*\(4,\).* expected \(5,\)"),
    "soft labels of another shape": (lambda: L.softmax_cross_entropy(z, z[:, :3]), ValueError,
                                     r"\(4, 5\).*\(4, 3\)"),
    "sigmoid labels of another shape": (lambda: L.sigmoid_binary_cross_entropy(z, z[:3]),
                                        ValueError, r"\(4, 5\).*\(3, 5\)"),
    "sigmoid labels that meet all logits": (
        lambda: L.sigmoid_binary_cross_entropy(z[:, :1], z[:, 0]), ValueError,
        r"labels .*\(4,\) and logits \(4, 1\).*one shape"),
    "l2 targets of another shape": (lambda: L.l2_loss(z, z[0]), ValueError,
                                    r"targets .*\(5,\).* expected .*\(4, 5\)"),
    "squared targets of another shape": (lambda: L.squared_error(z, z.T), ValueError,
                                         r"targets .*\(5, 4\).* expected .*\(4, 5\)"),
    "mask of another shape": (
        lambda: L.softmax_cross_entropy(z, z, where=np.ones((3, 5), bool)), ValueError,
        r"\[3, ?5\].*\[4, ?5\]"),
}  # fmt: skip


@pytest.mark.parametrize("transform", [lambda f: f(), lambda f: jax.jit(f)()], ids=["eager", "jit"])
@pytest.mark.parametrize("name", BAD)
def test_bad_inputs_raise_and_name_what_was_found(name, transform):
    call, exception, words = BAD[name]
    with pytest.raises(exception, match=f"(?s){words}"):
        transform(call)


@pytest.mark.parametrize("axis", [2, 5, -3, (0, 2), (0, 0)], ids=str)
def test_an_axis_that_does_not_exist_raises(axis):
    with pytest.raises(ValueError, match="axis"):
        L.softmax_cross_entropy(np.zeros((3, 3)), np.zeros((3, 3)), axis=axis)
    with pytest.raises(ValueError, match="axis"):
        L.softmax_cross_entropy_with_integer_labels(np.zeros((3, 3)), t[:3], axis=axis)
