"""Training through the adapters is training in plain JAX: same steps, same state of the model.

One network is written in every framework and by hand: a hidden layer, batch normalisation, dropout,
an output layer. Its optimizer evaluates the loss once more (for the damping) and wants the loss's
value, so that it notices whatever an adapter leaves out.
"""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import curvature
import curvature_flax.nnx
import curvature_haiku
from curvature_flax.linen import TrainState

pytestmark = pytest.mark.usefixtures("standard_promotion")  # the frameworks mix dtypes

STEPS, EXAMPLES, WIDTH, CLASSES, RATE, DECAY = 3, 12, 4, 3, 0.25, 0.9
ONES = jnp.ones((EXAMPLES, WIDTH))
KEYS = [jax.random.key(t) for t in range(STEPS)]


def batch(t):
    x = np.random.default_rng(t).normal(size=(EXAMPLES, 5))
    return {"x": jnp.asarray(x), "y": jnp.arange(EXAMPLES) % CLASSES}


def cross_entropy(logits, labels):
    return curvature.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def by_value():
    """Multiplies updates by the loss's value, which it insists on."""

    def update(updates, state, params=None, *, value, **extra):
        return jax.tree.map(lambda u: u * value, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def optimizer(registry):
    damping = curvature.LevenbergMarquardt(0.1, every=1)
    return optax.chain(curvature.kfac(registry, 0.1, damping=damping), by_value())


# By hand ------------------------------------------------------------------------------------------


def plain_loss(params, mask, batch):
    """The loss, and the mean and variance of the batch."""
    h = jnp.tanh(batch["x"] @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    moments = h.mean(0), (h**2).mean(0) - h.mean(0) ** 2
    if "norm" in params:
        scale = params["norm"]["scale"] * jax.lax.rsqrt(moments[1] + 1e-5)
        h = (h - moments[0]) * scale + params["norm"]["bias"]
    h = jnp.where(mask, h / (1 - RATE), 0)
    return cross_entropy(h @ params["out"]["kernel"] + params["out"]["bias"], batch["y"]), moments


def plain(params, masks, curvature_masks=None):
    """Parameters, running mean and variance, and losses; `masks` are those of the dropout."""
    registry = curvature.register(plain_loss, params, masks[0], batch(0), has_aux=True)
    tx = optimizer(registry)

    @jax.jit
    def step(params, state, mask, curvature_mask, batch, key):
        (value, moments), grads = jax.value_and_grad(plain_loss, has_aux=True)(params, mask, batch)
        extra = {"loss_args": (curvature_mask, batch), "key": key, "value": value}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state, value, moments

    state, running, losses = tx.init(params), (np.zeros(WIDTH), np.ones(WIDTH)), []
    for t, (mask, other) in enumerate(zip(masks, curvature_masks or masks, strict=True)):
        params, state, value, moments = step(params, state, mask, other, batch(t), KEYS[t])
        running = [DECAY * r + (1 - DECAY) * m for r, m in zip(running, moments, strict=True)]
        losses.append(value)
    return params, running, losses


def close(actual, expected, tolerance=1e-10):
    def compare(a, b):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)

    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(compare, actual, expected)


def in_double(x):
    """Flax starts batch statistics in float32."""
    return x.astype(jnp.float64) if x.dtype == jnp.float32 else x


# Flax linen ---------------------------------------------------------------------------------------


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        calls = self.variable("counters", "calls", jnp.zeros, (), jnp.int32)
        calls.value += 1
        h = jnp.tanh(nn.Dense(WIDTH, param_dtype=x.dtype, name="hidden")(x))
        norm = nn.BatchNorm(False, momentum=DECAY, param_dtype=x.dtype, name="norm")
        h = nn.Dropout(RATE, deterministic=False, name="dropout")(norm(h))
        return nn.Dense(CLASSES, param_dtype=x.dtype, name="out")(h)


class LinenDropout(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(RATE, deterministic=False, name="dropout")(x)


def test_linen():
    """Batch statistics, dropout, another mutable collection, and an extra argument."""
    model = Linen()
    variables = model.init({"params": KEYS[0], "dropout": KEYS[0]}, batch(0)["x"])
    variables = jax.tree.map(in_double, variables)
    params = variables.pop("params")

    def loss_fn(params, model_state, batch, key):
        logits, model_state = model.apply(
            {"params": params, **model_state},
            batch["x"],
            rngs={"dropout": key},
            mutable=["batch_stats", "counters"],
        )
        return cross_entropy(logits, batch["y"]), model_state

    registry = curvature.register(loss_fn, params, variables, batch(0), KEYS[0], has_aux=True)
    state = TrainState.create(
        apply_fn=model.apply, params=params, model_state=variables, tx=optimizer(registry)
    )

    @jax.jit
    def step(state, batch, key):
        args = (state.model_state, batch, key)
        (value, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, *args)
        state = state.apply_gradients(
            grads=grads, loss_args=args, key=key, value=value, model_state=new
        )
        return state, value

    losses = []
    for t, key in enumerate(KEYS):
        state, value = step(state, batch(t), key)
        losses.append(value)

    masks = [LinenDropout().apply({}, ONES, rngs={"dropout": key}) != 0 for key in KEYS]
    expected, (mean, var), expected_losses = plain(params, masks)
    close(losses, expected_losses)
    close(state.params, expected)
    close(state.model_state["batch_stats"]["norm"], {"mean": mean, "var": var})
    assert state.model_state["counters"]["calls"] == variables["counters"]["calls"] + STEPS
    assert state.step == STEPS


def test_a_train_state_takes_multi_steps():
    """Which optax does not count among its transformations."""
    params = {"hidden": {"kernel": jnp.ones((5, WIDTH)), "bias": jnp.ones(WIDTH)}}
    params["out"] = {"kernel": jnp.ones((WIDTH, CLASSES)), "bias": jnp.ones(CLASSES)}
    args = (ONES > 0, batch(0))
    registry = curvature.register(plain_loss, params, *args, has_aux=True)
    tx = optax.MultiSteps(optimizer(registry), 2, accumulator_dtype=jnp.float64)
    state = TrainState.create(apply_fn=None, params=params, tx=tx)

    def step(state):
        return state.apply_gradients(grads=params, loss_args=args, key=KEYS[0], value=jnp.ones(()))

    assert jax.eval_shape(step, state).tx is tx


# Flax NNX -----------------------------------------------------------------------------------------


class NNX(nnx.Module):
    def __init__(self):
        rngs, dtype = nnx.Rngs(params=0, dropout=1), jnp.float64
        self.hidden = nnx.Linear(5, WIDTH, param_dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, momentum=DECAY, param_dtype=dtype, rngs=rngs)
        self.norm.mean, self.norm.var = jax.tree.map(in_double, (self.norm.mean, self.norm.var))
        self.dropout = nnx.Dropout(RATE, rngs=rngs)
        self.out = nnx.Linear(WIDTH, CLASSES, param_dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(self.norm(jnp.tanh(self.hidden(x)))))


def nnx_loss(model, batch):
    return cross_entropy(model(batch["x"]), batch["y"])


@pytest.mark.parametrize("before", [False, True], ids=["adapter", "nnx.Optimizer"])
def test_nnx(before):
    """Our optimizer takes the state after the gradient, Flax's own can be given the one before."""
    model = NNX()
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    kind = nnx.Optimizer if before else curvature_flax.nnx.Optimizer
    tx = optimizer(curvature_flax.nnx.register(nnx_loss, model, batch(0)))
    trainer = kind(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, trainer, batch, key):
        rest = (nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param))),) if before else ()
        value, grads = nnx.value_and_grad(nnx_loss)(model, batch)
        trainer.update(model, grads, loss_args=(*rest, batch), key=key, value=value)
        return value

    losses = [step(model, trainer, batch(t), key) for t, key in enumerate(KEYS)]

    dropout = NNX().dropout
    masks = [dropout(ONES) != 0 for _ in range(STEPS + 1)]
    here = masks[:STEPS]
    expected, (mean, var), expected_losses = plain(params, here, here if before else masks[1:])
    close(losses, expected_losses)
    close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), expected)
    close((model.norm.mean[...], model.norm.var[...]), (mean, var))
    assert model.dropout.rngs.count[...] == STEPS
    assert trainer.step[...] == STEPS


# Haiku --------------------------------------------------------------------------------------------


def haiku_functions(with_state):
    """The loss and the logits, with modules of their own."""
    hidden, out = hk.Linear(WIDTH, name="hidden"), hk.Linear(CLASSES, name="out")
    norm = hk.BatchNorm(True, True, DECAY, name="norm") if with_state else None

    def logits(x):
        h = jnp.tanh(hidden(x))
        h = norm(h, is_training=True) if norm else h
        return out(hk.dropout(hk.next_rng_key(), RATE, h))

    def loss(batch):
        return cross_entropy(logits(batch["x"]), batch["y"])

    return loss, {"loss": loss, "logits": logits}


def transformed(with_state, multi):
    """The loss as a transformed function."""
    if not multi:
        transform = hk.transform_with_state if with_state else hk.transform
        return transform(lambda batch: haiku_functions(with_state)[0](batch))
    transform = hk.multi_transform_with_state if with_state else hk.multi_transform
    functions = transform(lambda: haiku_functions(with_state))
    pair = hk.TransformedWithState if with_state else hk.Transformed
    return pair(functions.init, functions.apply["loss"])


def to_plain(params):
    names = {"w": "kernel", "b": "bias", "offset": "bias"}
    return {
        layer: {names.get(k, k): x.squeeze() for k, x in arrays.items()}
        for layer, arrays in params.items()
    }


@pytest.mark.parametrize(
    "with_state, multi",
    [
        (True, True),
        pytest.param(True, False, marks=pytest.mark.slow),
        pytest.param(False, True, marks=pytest.mark.slow),
        pytest.param(False, False, marks=pytest.mark.slow),
    ],
)
def test_haiku(with_state, multi):
    loss = transformed(with_state, multi)
    params, states = loss.init(KEYS[0], batch(0)), ()
    if with_state:
        params, *states = params
    start = params
    registry = curvature_haiku.register(loss, params, *states, KEYS[0], batch(0))
    tx = optimizer(registry)
    function = jax.value_and_grad(curvature_haiku.loss_function(loss), has_aux=True)

    @jax.jit
    def step(params, states, opt_state, batch, key):
        args = (*states, key, batch)
        (value, new), grads = function(params, *args)
        updates, opt_state = tx.update(
            grads, opt_state, params, loss_args=args, key=key, value=value
        )
        states = (new,) if with_state else ()
        return optax.apply_updates(params, updates), states, opt_state, value

    opt_state, losses = tx.init(params), []
    for t, key in enumerate(KEYS):
        params, states, opt_state, value = step(params, states, opt_state, batch(t), key)
        losses.append(value)

    dropout = hk.transform(lambda: hk.dropout(hk.next_rng_key(), RATE, ONES))
    masks = [dropout.apply({}, key) != 0 for key in KEYS]
    expected, running, expected_losses = plain(to_plain(start), masks)
    close(losses, expected_losses)
    close(to_plain(params), expected)
    if with_state:
        # Haiku's averages start at zero.
        offset = DECAY**STEPS * np.array([0.0, 1.0])
        for name, value, start in zip(("mean_ema", "var_ema"), running, offset, strict=True):
            average = states[0][f"norm/~/{name}"]
            close(average["hidden"].squeeze(), value - start)
            assert average["counter"] == STEPS


def test_haiku_is_given_a_transformed_loss():
    with pytest.raises(TypeError, match=r"expected what hk.transform or hk.transform_with_state"):
        curvature_haiku.register(lambda x: x.sum(), {}, jnp.ones(2))
