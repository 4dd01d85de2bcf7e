"""Flax NNX models."""

import jax
import jax.numpy as jnp
from flax import nnx

import curvature
from zoo import BATCH, classifier, cross_entropy, fill, integers, model, normal

NORM = {"*norm*/scale": "scale", "*norm*/bias": "shift"}


def split(make):
    """The graph, parameters and other state of `make(rngs)`, with random parameters."""
    graph, params, rest = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...)
    return graph, fill(nnx.to_pure_dict(params)), fill(nnx.to_pure_dict(rest))


def build(make, *inputs):
    """A module with a classifier's loss."""
    graph, params, rest = split(make)

    def apply(params, *inputs):
        return nnx.merge(graph, params, rest)(*inputs)

    return classifier(apply, params, *inputs)


@model({"conv*/*": "conv", "norm/scale": "scale", "norm/bias": "shift", "head/*": "dense"})
def batch_norm_cnn():
    """The loss function returns the new batch statistics."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv1 = nnx.Conv(2, 4, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.conv2 = nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=rngs)
            self.head = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.norm(self.conv1(x)))
            return self.head(nnx.relu(self.conv2(x)).mean((1, 2)))

    graph, params, rest = split(Net)

    def loss_fn(params, rest, x, y):
        net = nnx.merge(graph, params, rest)
        loss = cross_entropy(net(x), y).mean()
        _, _, rest = nnx.split(net, nnx.Param, ...)
        return loss, nnx.to_pure_dict(rest)

    return loss_fn, params, (rest, normal(BATCH, 5, 5, 2), integers(3, BATCH)), True


@model({"embed/*": "embedding", "positions": "shift", **NORM, "*": "dense"})
def tied_transformer():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(11, 8, rngs=rngs)
            self.positions = nnx.Param(jnp.zeros((5, 8)))
            self.norm1 = nnx.LayerNorm(8, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.norm2 = nnx.RMSNorm(8, rngs=rngs)
            self.up = nnx.Linear(8, 12, rngs=rngs)
            self.down = nnx.Linear(12, 8, rngs=rngs)

        def __call__(self, tokens):
            x = self.embed(tokens) + self.positions[...]
            x = x + self.attention(self.norm1(x), mask=nnx.make_causal_mask(tokens))
            x = x + self.down(nnx.gelu(self.up(self.norm2(x))))
            return self.embed.attend(x)

    return build(Net, integers(11, BATCH, 5))


@model({"embed/*": "embedding", "head/*": "dense", **NORM, "layers/*": "dense"})
def scanned_layers():
    """`nnx.vmap` of the constructor, `nnx.scan` over the layers, with remat."""

    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.LayerNorm(6, rngs=rngs)
            self.up = nnx.Linear(6, 8, rngs=rngs)
            self.down = nnx.Linear(8, 6, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return x + self.down(nnx.gelu(self.up(self.norm(x))))

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(11, 6, rngs=rngs)
            self.head = nnx.Linear(6, 11, rngs=rngs)

            @nnx.split_rngs(splits=3)
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def stack(rngs):
                return Layer(rngs)

            self.layers = stack(rngs)

        def __call__(self, tokens):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            @nnx.remat
            def forward(x, layer):
                return layer(x)

            return self.head(forward(self.embed(tokens), self.layers))

    return build(Net, integers(11, BATCH, 5))


@model({"rnn/*": {"dense", "generic", "shift"}, "gru/*": "dense", "head/*": "dense"})
def recurrent():
    """`nnx.RNN` with an LSTM that fuses its kernels, then a GRU."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(nnx.LSTMCell(3, 4, rngs=rngs))
            self.gru = nnx.RNN(nnx.SimpleCell(4, 4, rngs=rngs))
            self.head = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.head(self.gru(self.rnn(x))[:, -1])

    return build(Net, normal(BATCH, 5, 3))


@model({"*": "dense"})
def low_rank_adapters():
    """LoRA beside frozen weights: only the adapters are parameters."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.LoRALinear(4, 6, lora_rank=2, rngs=rngs)
            self.outer = nnx.LoRALinear(6, 3, lora_rank=2, rngs=rngs)

        def __call__(self, x):
            return self.outer(nnx.relu(self.inner(x)))

    shapes = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    graph, adapters, rest = nnx.split(shapes, nnx.LoRAParam, ...)
    adapters, rest = fill(nnx.to_pure_dict(adapters)), fill(nnx.to_pure_dict(rest))

    def apply(adapters, rest, x):
        return nnx.merge(graph, adapters, rest)(x)

    return classifier(apply, adapters, rest, normal(BATCH, 4))


@model({"encoder/*": "conv", "decoder/*": "conv", "norm/scale": "scale", "norm/bias": "shift"})
def convolutional_autoencoder():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.encoder = nnx.Conv(1, 3, (3, 3), strides=2, rngs=rngs)
            self.norm = nnx.GroupNorm(3, num_groups=1, rngs=rngs)
            self.decoder = nnx.ConvTranspose(3, 1, (3, 3), strides=2, rngs=rngs)

        def __call__(self, x):
            return self.decoder(nnx.relu(self.norm(self.encoder(x))))

    graph, params, rest = split(Net)

    def loss_fn(params, x):
        z = nnx.merge(graph, params, rest)(x)
        return (
            curvature.losses.sigmoid_binary_cross_entropy(z, jax.nn.sigmoid(x)).sum((1, 2)).mean()
        )

    return loss_fn, params, (normal(BATCH, 6, 6, 1),), False
