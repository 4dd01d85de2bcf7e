"""The optimizer's state through orbax: the same run to the last bit, or on another mesh."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import normal
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import curvature

pytestmark = pytest.mark.usefixtures("standard_promotion")  # for optax.scale_by_adam
P = PartitionSpec
X, Y = normal(0, 8, 3), jnp.arange(8) % 4
PARAMS = {"w": normal(1, 3, 16), "b": normal(2, 16), "odd": normal(3, 16), "v": normal(4, 16, 4)}
HALF = 4
"""Steps before the checkpoint, and after it."""

OPTIMIZERS = {
    "kfac": lambda registry: curvature.kfac(
        registry,
        curvature.QuadraticModel(),
        damping=curvature.LevenbergMarquardt(0.3, every=3),
        refresh_every=3,
        fallback=optax.scale_by_adam(),
    ),
    "ekfac": lambda registry: curvature.ekfac(registry, 0.1, damping=0.1, refresh_every=3),
    "eigen_adam": lambda registry: curvature.eigen_adam(
        registry, 0.1, refresh_every=3, warmup_steps=2, weight_decay=0.1
    ),
}


def loss_fn(params, x, y):
    h = jnp.tanh(x @ params["w"] + params["b"]) + jnp.cumsum(params["odd"])  # "odd" is generic
    losses = curvature.losses.softmax_cross_entropy_with_integer_labels(h @ params["v"], y)
    return losses.mean()


class Training:
    """Steps from (params, opt_state), each with a key of its own."""

    def __init__(self, optimizer, dtype=jnp.float64):
        self.batch = X.astype(dtype), Y
        params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
        registry = curvature.register(loss_fn, params, *self.batch)
        self.tx = OPTIMIZERS[optimizer](registry)
        self.start = params, self.tx.init(params)
        self.step = jax.jit(self._step)
        self.compiled = 0

    def _step(self, params, state, batch, key):
        self.compiled += 1
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        updates, state = self.tx.update(grads, state, params, loss_args=batch, key=key)
        return (optax.apply_updates(params, updates), state), loss

    def run(self, at, first, batch=None):
        """What there is after HALF steps, and the loss before each."""
        losses = []
        for i in range(first, first + HALF):
            at, loss = self.step(*at, batch or self.batch, jax.random.key(i))
            losses.append(float(loss))
        return at, losses


@functools.cache
def uninterrupted(optimizer, dtype=jnp.float64):
    """The training, what there is half-way, and the end with the losses on the way there."""
    training = Training(optimizer, dtype)
    half, _ = training.run(training.start, 0)
    return training, half, *training.run(half, HALF)


def through_disk(folder, tree, target, **options):
    """`tree` saved, and read again as `target` (shapes, dtypes, shardings) says."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "saved", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "saved", target, **options)


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.float64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_restored_run_goes_on_to_the_last_bit(tmp_path, optimizer, dtype):
    training, half, whole, expected = uninterrupted(optimizer, dtype)
    fresh = training.start  # what a program has that has just been started
    restored = through_disk(tmp_path, half, jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh))
    assert jax.tree.structure(restored) == jax.tree.structure(half)
    compiled = training.compiled
    end, losses = training.run(restored, HALF)
    assert losses == expected
    jax.tree.map(np.testing.assert_array_equal, end, whole)
    assert jax.tree.map(jnp.result_type, end) == jax.tree.map(jnp.result_type, fresh)
    assert training.compiled == compiled
    assert training.run((restored[0], fresh[1]), HALF)[1] != expected  # the state does matter


def mesh(*shape):
    count = int(np.prod(shape))
    return Mesh(np.array(jax.devices()[:count]).reshape(shape), ("data", "model"))


SHARDED = {(3, 16): P(None, "model"), (16,): P("model"), (16, 4): P("model")}
"""Parameters, momentum and moments with their hidden units divided; they go by their shape."""


def shardings(tree, mesh, specs):
    """What has no spec is on every device."""
    return jax.tree.map(lambda x: NamedSharding(mesh, specs.get(x.shape, P())), tree)


def meshes():
    """Optimizer, devices saved from, mesh restored to, what is divided there; one of each quick."""
    targets = [((4, 1), {}), ((2, 2), SHARDED), ((1, 4), SHARDED)]
    quick = [("kfac", 1, (4, 1)), ("ekfac", 2, (2, 2))]
    return [
        pytest.param(
            *(optimizer, saved_on, shape, specs),
            marks=() if (optimizer, saved_on, shape) in quick else pytest.mark.slow,
            id=f"{optimizer}-{saved_on}-{shape[0]}x{shape[1]}",
        )
        for optimizer, saved_on, (shape, specs) in itertools.product(OPTIMIZERS, (1, 2), targets)
    ]


@pytest.mark.parametrize("optimizer, saved_on, shape, specs", meshes())
def test_a_run_goes_on_on_another_mesh(tmp_path, optimizer, saved_on, shape, specs):
    training, half, whole, expected = uninterrupted(optimizer)
    if saved_on == 2:
        half = jax.device_put(half, shardings(half, mesh(1, 2), SHARDED))
    wanted = shardings(half, mesh(*shape), specs)
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), half, wanted
    )
    restored = through_disk(tmp_path, half, target)
    assert jax.tree.map(lambda x: x.sharding, restored) == wanted
    batch = jax.device_put(training.batch, NamedSharding(mesh(*shape), P("data")))
    end, losses = training.run(restored, HALF, batch)
    np.testing.assert_allclose(losses, expected, rtol=1e-9)
    for a, b in zip(jax.tree.leaves(end[0]), jax.tree.leaves(whole[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)


def deep_loss(params, x):
    for w in params.values():
        x = jnp.tanh(x @ w)
    return curvature.losses.l2_loss(x).mean()


def deep(make, count):
    """A start and a step of five equal layers, whose state is divided over so many devices."""
    over = NamedSharding(Mesh(np.array(jax.devices()[:count]), ("data",)), P("data"))
    whole = NamedSharding(over.mesh, P())
    params = jax.device_put({f"w{i}": normal(i, 4, 4) for i in range(5)}, whole)
    x = jax.device_put(normal(9, 12, 4), over)
    registry = curvature.register(deep_loss, params, x)
    # At once: which layers' turn it is depends on the number of devices.
    tx = make(registry, 0.1, refresh_every=1, refresh_over=over, gather="updates")
    places = jax.tree.map(lambda _: whole, params), curvature.state_shardings(tx, params)

    @functools.partial(jax.jit, out_shardings=places)
    def step(params, state, key):
        grads = jax.grad(deep_loss)(params, x)
        updates, state = tx.update(grads, state, params, loss_args=(x,), key=key)
        return optax.apply_updates(params, updates), state

    return (params, jax.jit(tx.init, out_shardings=places[1])(params)), step


@pytest.mark.parametrize("devices", [(1, 4), (4, 3), (3, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("make", [curvature.kfac, curvature.ekfac, curvature.eigen_adam])
def test_a_divided_state_goes_on_on_another_number_of_devices(tmp_path, make, devices):
    """What fills it up there is cut off or made anew by orbax, and changes no step."""
    starts, steps = zip(*(deep(make, count) for count in devices), strict=True)
    shapes = [jax.tree.map(jnp.shape, start) for start in starts]
    assert shapes[0] != shapes[1]
    here = starts[0]
    for i in range(HALF):
        here = steps[0](*here, jax.random.key(i))
    there = through_disk(tmp_path, here, starts[1], strict=False)
    for i in range(HALF, 3 * HALF):
        here = steps[0](*here, jax.random.key(i))
        there = steps[1](*there, jax.random.key(i))
    assert jax.tree.map(jnp.shape, there) == shapes[1]
    assert steps[1]._cache_size() == 1
    for name, w in here[0].items():
        np.testing.assert_allclose(there[0][name], w, rtol=1e-9, atol=1e-11)
