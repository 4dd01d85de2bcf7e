"""The output losses: optax's values and derivatives, and the analytic parts of every family.

Values, gradients and Hessians are compared with optax's functions of the same name. What a family
adds (`score`, `root`, `sampled_score`) is compared with derivatives of optax's function: the
gradient and the dense Hessian of one unit by automatic differentiation.
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


# Families -----------------------------------------------------------------------------------------

# name -> (function, z of shape units + event, targets in the family's own layout)
FAMILIES = {
    "integer": lambda: (INTEGER, normal(4, 5), (labels(4, classes=5),)),
    "integer, two unit axes": lambda: (INTEGER, normal(2, 3, 4), (labels(2, 3, classes=4),)),
    "integer, mask": lambda: (INTEGER, normal(4, 5), (np.zeros(4, np.int32), mask(4, 5))),
    "integer, empty unit": lambda: (
        INTEGER,
        normal(4, 5),
        (np.zeros(4, np.int32), mask_with_an_empty_unit()),
    ),
    "soft": lambda: (SOFT, normal(4, 5), (soft(4, 5),)),
    "soft, not summing to one": lambda: (SOFT, normal(4, 5), (weights(4, 5),)),
    "soft, mask": lambda: (SOFT, normal(4, 5), (weights(4, 5) * mask(4, 5), mask(4, 5))),
    "soft, empty unit": lambda: (
        SOFT,
        normal(4, 5),
        (weights(4, 5) * mask_with_an_empty_unit(), mask_with_an_empty_unit()),
    ),
    "sigmoid": lambda: (SIGMOID, normal(4, 3), (labels(4, 3, classes=2).astype(float),)),
    "sigmoid, soft labels": lambda: (SIGMOID, normal(4, 3), (weights(4, 3) / 2,)),
    "l2": lambda: (L2, normal(4, 3), (normal(4, 3, seed=1),)),
    "squared": lambda: (SQUARED, normal(4, 3), (normal(4, 3, seed=1),)),
}

MASKED_TARGETS = {
    "soft, labels on masked classes": lambda: (SOFT, normal(4, 5), (weights(4, 5), mask(4, 5))),
    "integer, label on a masked class": lambda: (
        INTEGER,
        normal(3, 3),
        (np.array([2, 0, 2], np.int32), np.array([[True, True, False]] * 3)),
    ),
}


def family(name):
    """(the family, optax's function of z and targets, z, targets)."""
    function, z, targets = {**FAMILIES, **MASKED_TARGETS}[name]()
    z, targets = jnp.asarray(z), tuple(map(jnp.asarray, targets))

    def theirs(z, target, *where):
        kwargs = {"where": where[0]} if where else {}
        return getattr(optax.losses, function)(z, target, **kwargs)

    def tagged(z):
        kwargs = {"where": targets[1]} if len(targets) > 1 else {}
        return getattr(curvature.losses, function)(z, targets[0], **kwargs)

    (tag,) = tags(tagged, z)
    return tag.loss, theirs, z, targets


def unit_hessians(loss, theirs, z, targets):
    """Dense Hessians of every unit, shape [units, event, event], by automatic differentiation."""
    count = z.ndim - loss.event_ndim
    flat = [x.reshape((-1, *x.shape[count:])) for x in (z, *targets)]
    dense = np.stack(jax.jit(jax.vmap(jax.hessian(theirs)))(*flat))
    event = int(np.prod(z.shape[count:]))
    return dense.reshape(-1, event, event)


def columns_of_root(loss, z, targets):
    """The matrix S of every unit, shape [units, event, event], one column at a time."""
    units = z.ndim - loss.event_ndim
    event = z.shape[units:]
    size = int(np.prod(event))
    columns = []
    for k in range(size):
        unit_vector = jnp.zeros(size).at[k].set(1).reshape(event)
        columns.append(loss.root(jnp.broadcast_to(unit_vector, z.shape), z, targets))
    return np.stack([np.asarray(c).reshape(-1, size) for c in columns], axis=-1)


@pytest.mark.parametrize("name", FAMILIES)
def test_family_value_is_optax(name):
    loss, theirs, z, targets = family(name)
    close(loss.value(z, targets), theirs(z, *targets))


@pytest.mark.parametrize(
    "name", [*FAMILIES, "soft, labels on masked classes", "integer, label on a masked class"]
)
def test_score_is_the_gradient(name):
    loss, theirs, z, targets = family(name)
    close(loss.score(z, targets), jax.jit(jax.grad(summed(theirs)))(z, *targets))


@pytest.mark.parametrize(
    "name", [*FAMILIES, "soft, labels on masked classes", "integer, label on a masked class"]
)
def test_root_times_its_transpose_is_the_hessian(name):
    loss, theirs, z, targets = family(name)
    s = columns_of_root(loss, z, targets)
    expected = unit_hessians(loss, theirs, z, targets)
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(s @ s.swapaxes(-1, -2), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", FAMILIES)
def test_root_is_linear(name):
    loss, _, z, targets = family(name)
    s = columns_of_root(loss, z, targets)
    v = jnp.asarray(normal(*z.shape, seed=9))
    expected = np.einsum("uij,uj->ui", s, np.asarray(v).reshape(s.shape[:2])).reshape(z.shape)
    close(loss.root(v, z, targets), jnp.asarray(expected))


def test_root_of_a_saturated_sigmoid_does_not_cancel():
    loss, _, _, targets = family("sigmoid")
    z = jnp.array([[-700.0, -40.0, 40.0]])
    square = loss.root(jnp.ones_like(z), z, targets) ** 2
    np.testing.assert_allclose(square, np.exp([[-700.0, -40.0, -40.0]]), rtol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_keep_the_dtype(name, key):
    loss, _, z, targets = family(name)
    z = z.astype(jnp.float32)
    targets = tuple(
        t.astype(jnp.float32) if jnp.issubdtype(t.dtype, jnp.floating) else t for t in targets
    )
    for out in (
        jax.eval_shape(loss.score, z, targets),
        jax.eval_shape(loss.root, z, z, targets),
        jax.eval_shape(loss.sampled_score, key, z, targets),
    ):
        assert out.dtype == jnp.float32
        assert out.shape == z.shape


SAMPLED = [name for name in FAMILIES if "two unit" not in name]
SIZES = 32 * 4 ** np.arange(5)
REPEATS = 16


@functools.cache
def sampled(name):
    """Independent draws for every size, [units, repeats, size, event], and the units' Hessians."""
    loss, theirs, z, targets = family(name)
    z, targets = z[:3], tuple(t[:3] for t in targets)
    hessian = unit_hessians(loss, theirs, z, targets)
    lead = (REPEATS, int(SIZES.sum()))
    many = [jnp.broadcast_to(x, lead + x.shape) for x in (z, *targets)]
    s = jax.jit(loss.sampled_score)(jax.random.key(0), many[0], tuple(many[1:]))
    s = np.asarray(s).reshape(*lead, *hessian.shape[:-1])
    draws = np.split(np.moveaxis(s, 2, 0), np.cumsum(SIZES)[:-1], axis=2)
    return draws, hessian


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_scores_have_mean_zero_and_the_hessian_as_second_moment(name):
    """Within five standard errors, entry by entry, of 131,072 draws a unit."""
    draws, hessian = sampled(name)
    s = draws[-1].reshape(len(hessian), -1, hessian.shape[-1])
    count = s.shape[1]
    assert (np.abs(s.mean(1)) <= 5 * s.std(1) / np.sqrt(count)).all()
    second = s.swapaxes(1, 2) @ s / count
    fourth = (s**2).swapaxes(1, 2) @ s**2 / count
    spread = np.sqrt(np.maximum(fourth - second**2, 0))
    assert (np.abs(second - hessian) <= 5 * spread / np.sqrt(count) + 1e-14).all()


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_scores_converge_with_the_square_root_of_the_samples(name):
    """Root-mean-square errors of 16 repetitions at 32, 128, ..., 8,192 samples: slope -1/2.

    A bias would flatten the slope. The standard deviation of the fitted slope is below 0.04.
    """
    draws, hessian = sampled(name)
    means = [np.sqrt((s.mean(2) ** 2).mean()) for s in draws]
    seconds = [s.swapaxes(-1, -2) @ s / s.shape[2] - hessian[:, None] for s in draws]
    for errors in (means, [np.sqrt((e**2).mean()) for e in seconds]):
        slope = np.polyfit(np.log(SIZES), np.log(errors), 1)[0]
        assert -0.6 < slope < -0.4


@pytest.mark.parametrize("name", SAMPLED)
def test_targets_are_drawn_from_the_model_not_the_data(name, key):
    loss, _, z, targets = family(name)
    rest = targets[1:]
    other = jnp.roll(targets[0], 1, axis=-1)  # the same mass for soft labels
    if rest:
        other = targets[0]
    fixed = loss.sampled_score(key, z, (other, *rest))
    close(loss.sampled_score(key, z, targets), fixed)
    again = loss.sampled_score(jax.random.key(1), z, targets)
    assert not np.allclose(again, fixed)


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
