"""Haiku models."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import jmp

import curvature
from zoo import BATCH, classifier, cross_entropy, fill, integers, model, normal


def build(function, *inputs):
    """A function of modules, with a classifier's loss."""
    transformed = hk.without_apply_rng(hk.transform(function))
    params = fill(jax.eval_shape(transformed.init, jax.random.key(0), *inputs))
    return classifier(transformed.apply, params, *inputs)


@model({"*conv*/*": "conv", "*norm*/scale": "scale", "*norm*/offset": "shift", "linear/*": "dense"})
def batch_norm_cnn():
    def forward(x, train):
        x = hk.Conv2D(4, 3, with_bias=False)(x)
        x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(x, train))
        x = hk.Conv2D(4, 3, stride=2, padding="VALID")(x)
        x = hk.DepthwiseConv2D(1, 3)(jax.nn.relu(hk.GroupNorm(2)(x)))
        return hk.Linear(3)(x.mean((1, 2)))

    net = hk.without_apply_rng(hk.transform_with_state(forward))
    x, y = normal(BATCH, 6, 6, 2), integers(3, BATCH)
    start = functools.partial(net.init, train=True)
    params, state = fill(jax.eval_shape(start, jax.random.key(0), x))

    def loss_fn(params, state, x, y):
        logits, state = net.apply(params, state, x, True)
        return cross_entropy(logits, y).mean(), state

    return loss_fn, params, (state, x, y), True


@model(
    {
        "embed/*": "embedding",
        "*/positions": "shift",
        "*norm*/scale": "scale",
        "*norm*/offset": "shift",
        "*": "dense",
    }
)
def stacked_transformer():
    """`hk.experimental.layer_stack` with remat."""

    def forward(tokens):
        x = hk.Embed(11, 8, name="embed")(tokens)
        x = x + hk.get_parameter("positions", (tokens.shape[1], 8), init=jnp.zeros)
        mask = jnp.tril(jnp.ones((1, 1, tokens.shape[1], tokens.shape[1])))

        @hk.experimental.layer_stack(3)
        @hk.remat
        def layer(x):
            init = hk.initializers.VarianceScaling()
            h = hk.LayerNorm(-1, True, True)(x)
            x = x + hk.MultiHeadAttention(2, 4, w_init=init)(h, h, h, mask)
            h = hk.LayerNorm(-1, True, True)(x)
            return x + hk.Linear(8)(jax.nn.gelu(hk.Linear(12)(h)))

        return hk.Linear(11)(hk.RMSNorm(-1)(layer(x)))

    return build(forward, integers(11, BATCH, 5))


@model({"embed/*": "embedding", "*": "dense"})
def lstm_dynamic():
    def forward(tokens):
        x = hk.Embed(7, 4, name="embed")(tokens)
        core = hk.LSTM(4)
        outputs, _ = hk.dynamic_unroll(core, x, core.initial_state(len(x)), time_major=False)
        return hk.BatchApply(hk.Linear(7))(outputs)

    return build(forward, integers(7, BATCH, 5))


@model({"*": "dense"})
def lstm_static_two_deep():
    """Two cells, unrolled statically, time first."""

    def forward(x):
        core = hk.DeepRNN([hk.LSTM(4), jnp.tanh, hk.VanillaRNN(3)])
        outputs, _ = hk.static_unroll(core, x, core.initial_state(x.shape[1]))
        return hk.Linear(3)(outputs[-1])

    return build(forward, normal(3, BATCH, 3))


@model(
    {
        "gru/w_*": "dense",
        "gru/b": {"shift", "dense"},
        "*/start": "shift",
        "linear/*": "dense",
    }
)
def gru_with_trainable_state():
    """A GRU whose first state is learned and repeated over the batch."""

    def forward(x):
        core = hk.GRU(4)
        start = hk.get_parameter("start", (4,), init=jnp.zeros)
        start = jnp.broadcast_to(start, (len(x), 4))
        outputs, _ = hk.dynamic_unroll(core, x, start, time_major=False)
        return hk.Linear(3)(outputs[:, -1])

    return build(forward, normal(BATCH, 4, 3))


@model({"embed/*": "embedding", "*": "dense"})
def one_hot_embedding():
    """`hk.Embed` by a product with one-hot vectors, then attention with flat kernels."""

    def forward(tokens):
        x = hk.Embed(7, 4, lookup_style="ONE_HOT", name="embed")(tokens)
        init = hk.initializers.VarianceScaling()
        x = x + hk.MultiHeadAttention(2, 2, model_size=4, w_init=init)(x, x, x)
        return hk.nets.MLP([5, 3])(x.mean(1))

    return build(forward, integers(7, BATCH, 5))


@model({"*conv*/*": "conv", "linear*/*": "dense"})
def conv_transpose_autoencoder():
    def forward(x):
        z = jax.nn.relu(hk.Conv2D(3, 3, stride=2)(x))
        z = hk.Linear(4)(z.reshape(len(x), -1))
        h = jax.nn.relu(hk.Linear(27)(z)).reshape(len(x), 3, 3, 3)
        return hk.Conv2DTranspose(1, 3, stride=2)(h)

    net = hk.without_apply_rng(hk.transform(forward))
    x = normal(BATCH, 6, 6, 1)
    params = fill(jax.eval_shape(net.init, jax.random.key(0), x))

    def loss_fn(params, x):
        return curvature.losses.squared_error(net.apply(params, x), x).mean()

    return loss_fn, params, (x,), False


@model({"*conv*/*": "conv", "*norm*/scale": "scale", "*norm*/offset": "shift", "*": "dense"})
def mixed_precision():
    """jmp: float32 parameters, bfloat16 inside, float32 normalisation and loss."""

    def forward(x):
        class Net(hk.Module):
            def __call__(self, x):
                x = jax.nn.relu(Norm()(hk.Conv2D(4, 3)(x)))
                return hk.Linear(3)(x.mean((1, 2)))

        class Norm(hk.LayerNorm):
            def __init__(self):
                super().__init__(-1, True, True, name="norm")

        half = jmp.get_policy("params=float32,compute=bfloat16,output=float32")
        full = jmp.get_policy("params=float32,compute=float32,output=bfloat16")
        with hk.mixed_precision.push_policy(Net, half), hk.mixed_precision.push_policy(Norm, full):
            return Net()(x)

    return build(forward, normal(BATCH, 4, 4, 2))


@model({"*": "dense"})
def scan_with_shared_layer():
    """`hk.scan` with a layer that all iterations share, under `hk.remat`."""

    def forward(x):
        layer, head = hk.Linear(4), hk.Linear(3)

        @hk.remat
        def body(h, _):
            return jnp.tanh(h + layer(h)), None

        h, _ = hk.scan(body, x, None, length=3)
        return head(h)

    return build(forward, normal(BATCH, 4))
