"""Flax linen models."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

import curvature
from zoo import (
    BATCH,
    classifier,
    cross_entropy,
    fill,
    integers,
    model,
    normal,
    regressor,
)


def init(module, *inputs, **options):
    """All variables of a module."""
    start = functools.partial(module.init, **options)
    return fill(jax.eval_shape(start, jax.random.key(0), *inputs))


def build(module, *inputs, head=classifier):
    """A module without state, with a loss."""
    params = init(module, *inputs)["params"]
    return head(lambda p, *xs: module.apply({"params": p}, *xs), params, *inputs)


NORM = {"*Norm*/scale": "scale", "*Norm*/bias": "shift"}
DENSE = {"*/kernel": "dense", "*/bias": "dense"}


# Transformers --------------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    dtype: object = None
    layer_scale: bool = False

    @nn.compact
    def __call__(self, x, mask=None):
        attention = nn.MultiHeadDotProductAttention(2, dtype=self.dtype)
        h = attention(nn.LayerNorm(dtype=self.dtype)(x), mask=mask)
        if self.layer_scale:
            h = h * self.param("gamma1", nn.initializers.ones, (x.shape[-1],))
        x = x + h
        h = nn.LayerNorm(dtype=self.dtype)(x)
        h = nn.Dense(x.shape[-1], dtype=self.dtype)(nn.gelu(nn.Dense(12, dtype=self.dtype)(h)))
        if self.layer_scale:
            h = h * self.param("gamma2", nn.initializers.ones, (x.shape[-1],))
        return x + h


@model(
    {
        "patches/*": "conv",
        "class_token": "shift",
        "positions": "shift",
        "*/gamma?": "scale",
        **NORM,
        **DENSE,
    }
)
def vision_transformer():
    class ViT(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(8, (4, 4), (4, 4), padding="VALID", name="patches")(x)
            x = x.reshape(len(x), -1, 8)
            token = self.param("class_token", nn.initializers.zeros, (1, 1, 8))
            x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], axis=1)
            x = x + self.param("positions", nn.initializers.zeros, (1, x.shape[1], 8))
            x = Block(layer_scale=True)(x)
            return nn.Dense(3)(nn.LayerNorm()(x)[:, 0])

    return build(ViT(), normal(BATCH, 8, 8, 3))


class LanguageModel(nn.Module):
    """Tied embedding and head, learned positions."""

    dtype: object = None

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8, dtype=self.dtype, name="embed")
        x = embed(tokens)
        x = x + self.param("positions", nn.initializers.zeros, (tokens.shape[1], 8)).astype(x.dtype)
        x = Block(self.dtype)(x, nn.make_causal_mask(tokens))
        return embed.attend(nn.LayerNorm(dtype=self.dtype)(x))


@model({"embed/*": "embedding", "positions": "shift", **NORM, **DENSE})
def tied_language_model():
    return build(LanguageModel(), integers(11, BATCH, 5))


@model({"embed/*": "embedding", "positions": "shift", **NORM, **DENSE})
def tied_language_model_bfloat16():
    """Computes in bfloat16, the parameters and the loss are float32."""
    module, tokens = LanguageModel(jnp.bfloat16), integers(11, BATCH, 5)
    params = init(module, tokens)["params"]

    def apply(p, tokens):
        return module.apply({"params": p}, tokens).astype(jnp.float32)

    return classifier(apply, params, tokens)


@model(
    {
        "tokens/*": "embedding",
        "segments/*": "embedding",
        "positions/*": {"shift", "embedding"},
        "output_bias": {"shift", "embedding"},
        **NORM,
        **DENSE,
    }
)
def bert():
    """Three embeddings, post-norm, tied output with a bias, loss on some positions only."""

    class Bert(nn.Module):
        @nn.compact
        def __call__(self, tokens, segments):
            table = nn.Embed(11, 8, name="tokens")
            positions = jnp.arange(tokens.shape[1])
            x = table(tokens) + nn.Embed(2, 8, name="segments")(segments)
            x = nn.LayerNorm()(x + nn.Embed(5, 8, name="positions")(positions))
            x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(2)(x))
            x = nn.LayerNorm()(x + nn.Dense(8)(nn.gelu(nn.Dense(12)(x))))
            return table.attend(x) + self.param("output_bias", nn.initializers.zeros, (11,))

    module, tokens, segments = Bert(), integers(11, BATCH, 5), integers(2, BATCH, 5)
    params = init(module, tokens, segments)["params"]

    def loss_fn(params, batch):
        logits = module.apply({"params": params}, batch["tokens"], batch["segments"])
        loss = cross_entropy(logits, batch["labels"])
        return (loss * batch["mask"]).sum() / jnp.maximum(batch["mask"].sum(), 1)

    mask = (integers(3, BATCH, 5, seed=3) == 0).astype(jnp.float32)
    labels = integers(11, BATCH, 5, seed=2)
    batch = {"labels": labels, "mask": mask, "segments": segments, "tokens": tokens}
    return loss_fn, params, (batch,), False


@model({"embed/*": "embedding", "head/*": "dense", **NORM, **DENSE})
def scanned_language_model():
    """`nn.scan` of `nn.remat`: every layer stacked."""

    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, mask):
            return Block()(x, mask), None

    class Stacked(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(11, 8, name="embed")(tokens)
            layers = nn.scan(
                nn.remat(Body, prevent_cse=False),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=3,
            )
            x, _ = layers(name="layers")(x, nn.make_causal_mask(tokens))
            return nn.Dense(11, name="head")(nn.LayerNorm()(x))

    return build(Stacked(), integers(11, BATCH, 5))


@model({"embed/*": "embedding", "*norm*/scale": "scale", "*": "dense"})
def llama():
    """Grouped-query attention with (d, heads, k) kernels, rotary positions, RMSNorm, SwiGLU."""

    def rotate(x):
        half = x.shape[-1] // 2
        angle = jnp.arange(x.shape[1])[:, None] / 10.0 ** jnp.arange(half)
        sin, cos = jnp.sin(angle)[:, None, :], jnp.cos(angle)[:, None, :]
        left, right = x[..., :half], x[..., half:]
        return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)

    class Llama(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            dense = functools.partial(nn.DenseGeneral, use_bias=False)
            x = nn.Embed(11, 8, name="embed")(tokens)
            h = nn.RMSNorm(name="norm1")(x)
            q = rotate(dense((4, 2), name="query")(h))
            k = rotate(dense((2, 2), name="key")(h))
            v = dense((2, 2), name="value")(h)
            q = q.reshape(*q.shape[:2], 2, 2, 2)
            weights = jnp.einsum("bqgrk,bsgk->bgrqs", q, k) / jnp.sqrt(2.0)
            mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
            weights = jax.nn.softmax(jnp.where(mask, weights, -1e9), axis=-1)
            h = jnp.einsum("bgrqs,bsgk->bqgrk", weights, v).reshape(*x.shape[:2], 4, 2)
            x = x + dense(8, axis=(-2, -1), name="out")(h)
            h = nn.RMSNorm(name="norm2")(x)
            h = nn.silu(dense(12, name="gate")(h)) * dense(12, name="up")(h)
            x = x + dense(8, name="down")(h)
            return dense(11, name="head")(nn.RMSNorm(name="norm3")(x))

    return build(Llama(), integers(11, BATCH, 5))


@model({"relative": "shift", **NORM, **DENSE})
def fused_attention():
    """One Dense for queries, keys and values; a learned bias of the attention logits."""

    class Fused(nn.Module):
        @nn.compact
        def __call__(self, x):
            b, t, d = x.shape
            h = nn.Dense(3 * d)(nn.LayerNorm()(x)).reshape(b, t, 3, 2, d // 2)
            q, k, v = h[:, :, 0], h[:, :, 1], h[:, :, 2]
            logits = jnp.einsum("bqhk,bshk->bhqs", q, k) / jnp.sqrt(d / 2)
            logits = logits + self.param("relative", nn.initializers.zeros, (2, t, t))
            h = jnp.einsum("bhqs,bshk->bqhk", jax.nn.softmax(logits), v).reshape(b, t, d)
            x = x + nn.Dense(d)(h)
            return nn.Dense(3)(x.mean(1))

    return build(Fused(), normal(BATCH, 5, 6))


@model({"gate/*": "dense", "experts_*": "dense", "bias_*": {"shift", "dense"}, "head/*": "dense"})
def mixture_of_experts():
    """Experts by einsum, tokens sent by one-hot matrices, an auxiliary balance term."""

    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x):
            gates = jax.nn.softmax(nn.Dense(3, use_bias=False, name="gate")(x))
            chosen = jax.nn.one_hot(gates.argmax(-1), 3) * gates
            put = (chosen > 0).astype(x.dtype)
            h = jnp.einsum("nd,ne->end", x, put)
            w = self.param("experts_in", nn.initializers.normal(), (3, 6, 8))
            b = self.param("bias_in", nn.initializers.zeros, (3, 1, 8))
            h = jax.nn.relu(jnp.einsum("end,edf->enf", h, w) + b)
            w = self.param("experts_out", nn.initializers.normal(), (3, 8, 6))
            h = jnp.einsum("end,edf->enf", h, w)
            x = x + jnp.einsum("end,ne->nd", h, chosen)
            self.sow("losses", "balance", (gates.mean(0) ** 2).sum())
            return nn.Dense(3, name="head")(x)

    module, x = Experts(), normal(6, 6)
    params = init(module, x)["params"]

    def loss_fn(params, x, y):
        logits, state = module.apply({"params": params}, x, mutable=["losses"])
        return cross_entropy(logits, y).mean() + 0.01 * state["losses"]["balance"][0]

    return loss_fn, params, (x, integers(3, 6)), False


@model({"latents": "shift", **NORM, **DENSE})
def perceiver():
    """Learned latents attend to the data: queries that see no data are dense layers as well."""

    class Perceiver(nn.Module):
        @nn.compact
        def __call__(self, x):
            z = self.param("latents", nn.initializers.normal(), (3, 8))
            z = jnp.broadcast_to(z, (len(x), 3, 8))
            z = z + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(z), nn.LayerNorm()(x))
            z = z + nn.Dense(8)(nn.gelu(nn.Dense(8)(nn.LayerNorm()(z))))
            return nn.Dense(3)(z.mean(1))

    return build(Perceiver(), normal(BATCH, 5, 6))


@model({"*Norm*/scale": "scale", "*Norm*/bias": "shift", "*": "dense"})
def mlp_mixer():
    class Mixer(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(6)(x)
            h = nn.LayerNorm()(x).swapaxes(1, 2)
            x = x + nn.Dense(5)(nn.gelu(nn.Dense(7)(h))).swapaxes(1, 2)
            x = x + nn.Dense(6)(nn.gelu(nn.Dense(8)(nn.LayerNorm()(x))))
            return nn.Dense(3)(nn.LayerNorm()(x).mean(1))

    return build(Mixer(), normal(BATCH, 5, 4))


# Convolutions --------------------------------------------------------------------------------


class ResNet(nn.Module):
    """Two residual blocks with batch normalisation."""

    train: bool

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=not self.train)
        x = nn.relu(norm(name="norm0")(conv(4, (3, 3), name="conv0")(x)))
        for i, (width, stride) in enumerate([(4, 1), (6, 2)]):
            h = conv(width, (3, 3), (stride, stride), name=f"conv{i}a")(x)
            h = nn.relu(norm(name=f"norm{i}a")(h))
            h = norm(name=f"norm{i}b")(conv(width, (3, 3), name=f"conv{i}b")(h))
            if h.shape != x.shape:
                x = norm(name=f"norm{i}c")(conv(width, (1, 1), (stride, stride), name="short")(x))
            x = nn.relu(x + h)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


RESNET = {
    "conv*/kernel": "conv",
    "short/kernel": "conv",
    "norm*/scale": "scale",
    "norm*/bias": "shift",
    "head/*": "dense",
}


@model(RESNET)
def resnet():
    """Batch statistics in and out, as `has_aux`."""
    module, x = ResNet(train=True), normal(BATCH, 6, 6, 3)
    variables = init(module, x)

    def loss_fn(params, state, x, y):
        variables = {"params": params, "batch_stats": state}
        logits, new = module.apply(variables, x, mutable=["batch_stats"])
        return cross_entropy(logits, y).mean(), new["batch_stats"]

    args = (variables["batch_stats"], x, integers(3, BATCH))
    return loss_fn, variables["params"], args, True


@model(RESNET)
def resnet_fine_tuned():
    """Batch statistics frozen."""
    module, x = ResNet(train=False), normal(BATCH, 6, 6, 3)
    variables = init(module, x)

    def apply(params, state, x):
        return module.apply({"params": params, "batch_stats": state}, x)

    return classifier(apply, variables["params"], variables["batch_stats"], x)


@model({"Conv_*/*": "conv", "*Norm*/scale": "scale", "*Norm*/bias": "shift", "Dense_*/*": "dense"})
def mobile_net():
    """Depthwise and pointwise convolutions, squeeze and excitation."""

    class Mobile(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), (2, 2))(x)
            h = nn.relu6(nn.LayerNorm()(nn.Conv(8, (1, 1))(x)))
            h = nn.relu6(nn.Conv(8, (3, 3), feature_group_count=8)(h))
            gate = nn.sigmoid(nn.Dense(8)(nn.relu(nn.Dense(2)(h.mean((1, 2))))))
            x = x + nn.Conv(4, (1, 1))(h * gate[:, None, None, :])
            x = nn.Conv(6, (3, 3), (2, 2), feature_group_count=2, use_bias=False)(x)
            return nn.Dense(3)(x.mean((1, 2)))

    return build(Mobile(), normal(BATCH, 8, 8, 3))


@model({"*Conv*": "conv", "*Norm*/scale": "scale", "*Norm*/bias": "shift"})
def u_net():
    """Transposed convolution, group normalisation, a skip, a loss on every pixel."""

    class UNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = skip = nn.swish(nn.GroupNorm(2)(nn.Conv(4, (3, 3))(x)))
            x = nn.swish(nn.GroupNorm(2)(nn.Conv(6, (3, 3), (2, 2))(x)))
            x = nn.ConvTranspose(4, (2, 2), (2, 2))(x)
            x = jnp.concatenate([x, skip], -1)
            return nn.Conv(2, (1, 1))(nn.swish(nn.GroupNorm(2)(x)))

    return build(UNet(), normal(BATCH, 6, 6, 3))


@model({"Conv*/*": "conv", "time_*/*": "dense", "*Norm*/scale": "scale", "*Norm*/bias": "shift"})
def diffusion():
    """A denoiser told the time by sinusoids, added and multiplied in; regression to the noise."""

    class Denoiser(nn.Module):
        @nn.compact
        def __call__(self, x, time):
            angle = time[:, None] * 2.0 ** jnp.arange(3)
            t = nn.silu(nn.Dense(6, name="time_in")(jnp.sin(angle)))
            shift, scale = jnp.split(nn.Dense(8, name="time_out")(t), 2, -1)
            h = nn.GroupNorm(2)(nn.Conv(4, (3, 3))(x))
            h = h * (1 + scale[:, None, None]) + shift[:, None, None]
            return nn.Conv(3, (3, 3))(nn.silu(h))

    return build(Denoiser(), normal(BATCH, 4, 4, 3), normal(BATCH), head=regressor)


@model({"Conv_*": "conv", "Dense_*": "dense"})
def wave_net():
    """Causal dilated convolutions in one dimension, gated."""

    class WaveNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (1,))(x)
            for dilation in (1, 2):
                conv = functools.partial(
                    nn.Conv, kernel_size=(2,), kernel_dilation=(dilation,), padding="CAUSAL"
                )
                h = jnp.tanh(conv(4)(x)) * nn.sigmoid(conv(4)(x))
                x = x + nn.Conv(4, (1,))(h)
            return nn.Dense(5)(nn.relu(x))

    return build(WaveNet(), normal(BATCH, 9, 1))


@model({"Conv_*": "conv", "Dense_*": "dense"})
def audio_net():
    """Strided convolutions in one dimension with pooling."""

    class Audio(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (5,), (2,), padding="VALID")(x))
            x = nn.max_pool(x, (2,), (2,))
            x = nn.relu(nn.Conv(5, 3, use_bias=False)(x))
            return nn.Dense(3)(x.reshape(len(x), -1))

    return build(Audio(), normal(BATCH, 20, 2))


@model({"Conv_*": "conv", "Dense_*": "dense"})
def video_net():
    """Three spatial dimensions."""

    class Video(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(3, (2, 3, 3), (1, 2, 2))(x))
            x = nn.relu(nn.Conv(4, (2, 2, 2), padding="VALID")(x))
            return nn.Dense(3)(x.mean((1, 2, 3)))

    return build(Video(), normal(BATCH, 3, 5, 5, 2))


@model({"Conv_*": "conv"})
def dilated_segmentation():
    """Dilated convolutions, a loss on the pixels of a mask."""

    class Atrous(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.relu(nn.Conv(4, (3, 3), kernel_dilation=(2, 2))(x))
            h = h + nn.Conv(4, (3, 3), kernel_dilation=(1, 3), use_bias=False)(h)
            return nn.Conv(1, (1, 1))(h)[..., 0]

    module, x = Atrous(), normal(BATCH, 7, 7, 2)
    params = init(module, x)["params"]

    def loss_fn(params, x, y, mask):
        z = module.apply({"params": params}, x)
        loss = curvature.losses.sigmoid_binary_cross_entropy(z, y)
        return jnp.sum(loss * mask) / mask.sum()

    y = (normal(BATCH, 7, 7, seed=1) > 0).astype(jnp.float32)
    mask = (normal(BATCH, 7, 7, seed=2) > -1).astype(jnp.float32)
    return loss_fn, params, (x, y, mask), False


@model({"*/kernel": "conv", "*/bias": "conv"})
def local_and_pixel_shuffle():
    """Super-resolution: convolutions, then a reshape of channels into space, a skip."""

    class Upscale(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.relu(nn.Conv(4, (3, 3), padding="CIRCULAR")(x))
            h = nn.Conv(4, (3, 3))(h)
            b, m, n, _ = h.shape
            h = h.reshape(b, m, n, 2, 2).transpose(0, 1, 3, 2, 4).reshape(b, 2 * m, 2 * n, 1)
            return h + jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)

    return build(Upscale(), normal(BATCH, 4, 4, 1), head=regressor)


# Recurrence ----------------------------------------------------------------------------------


@model({"embed/*": "embedding", "*/kernel": "dense", "*/bias": "dense"})
def lstm_classifier():
    """Two directions by `nn.RNN`, an LSTM and a simple cell, with lengths."""

    class Tagger(nn.Module):
        @nn.compact
        def __call__(self, tokens, lengths):
            x = nn.Embed(7, 4, name="embed")(tokens)
            forward = nn.RNN(nn.LSTMCell(4), name="forward")
            backward = nn.RNN(nn.SimpleCell(4), name="backward")
            x = nn.Bidirectional(forward, backward)(x, seq_lengths=lengths)
            return nn.Dense(3, name="head")(x)

    return build(Tagger(), integers(7, BATCH, 5), jnp.array([5, 3, 2, 4], jnp.int32))


@model(
    {
        "OptimizedLSTMCell_0/*": "dense",
        "Dense_0/*": "dense",
    }
)
def optimized_lstm():
    """A cell that concatenates its kernels: one block for the gates, a range for each."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.RNN(nn.OptimizedLSTMCell(4))(x)[:, -1])

    return build(Net(), normal(BATCH, 5, 3))


@model({"start": "shift", "*/kernel": "dense", "*/bias": "dense"})
def gru_with_learned_start():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            start = self.param("start", nn.initializers.zeros, (4,))
            start = jnp.broadcast_to(start, (len(x), 4))
            h = nn.RNN(nn.GRUCell(4))(x, initial_carry=start)
            return nn.Dense(3)(h[:, -1])

    return build(Net(), normal(BATCH, 5, 3))


@model({"*/kernel": "dense", "*/bias": "dense"})
def unrolled_gru():
    """The cell called in a Python loop: one weight, many uses."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            cell, h = nn.GRUCell(4), jnp.zeros((len(x), 4))
            for t in range(x.shape[1]):
                h, _ = cell(h, x[:, t])
            return nn.Dense(3)(h)

    return build(Net(), normal(BATCH, 3, 3))


@model({"embed/*": "embedding", "*": "dense"})
def sequence_to_sequence():
    """Encoder and decoder with attention between them, teacher forcing, a masked loss."""

    class Seq2Seq(nn.Module):
        @nn.compact
        def __call__(self, source, target):
            embed = nn.Embed(7, 4, name="embed")
            memory = nn.RNN(nn.SimpleCell(4))(embed(source))
            h = nn.RNN(nn.SimpleCell(4))(embed(target))
            weights = jax.nn.softmax(jnp.einsum("btd,bsd->bts", nn.Dense(4)(h), memory))
            h = jnp.concatenate([h, jnp.einsum("bts,bsd->btd", weights, memory)], -1)
            return nn.Dense(7)(jnp.tanh(nn.Dense(4)(h)))

    module, source, target = Seq2Seq(), integers(7, BATCH, 4), integers(7, BATCH, 4, seed=1)
    params = init(module, source, target[:, :-1])["params"]

    def loss_fn(params, source, target):
        logits = module.apply({"params": params}, source, target[:, :-1])
        mask = (target[:, 1:] != 0).astype(logits.dtype)
        loss = cross_entropy(logits, target[:, 1:]) * mask
        return (loss.sum(1) / jnp.maximum(mask.sum(1), 1)).mean()

    return loss_fn, params, (source, target), False


# Heads, conditions, functions of weights -----------------------------------------------------


@model({"*": "dense"})
def variational_autoencoder():
    """Reconstruction and 0.3 times a penalty of the code, two heads, noise as an argument."""

    class VAE(nn.Module):
        @nn.compact
        def __call__(self, x, noise):
            h = nn.tanh(nn.Dense(6)(x))
            mean, log_var = nn.Dense(2)(h), nn.Dense(2)(h)
            z = mean + jnp.exp(0.5 * log_var) * noise
            return nn.Dense(8)(nn.tanh(nn.Dense(6)(z))), mean, log_var

    module, x, noise = VAE(), normal(BATCH, 8), normal(BATCH, 2, seed=1)
    params = init(module, x, noise)["params"]

    def loss_fn(params, x, noise):
        logits, mean, log_var = module.apply({"params": params}, x, noise)
        pixels = curvature.losses.sigmoid_binary_cross_entropy(logits, jax.nn.sigmoid(x))
        penalty = curvature.losses.l2_loss(mean).sum(-1)
        rest = 0.5 * (jnp.exp(log_var) - log_var).sum(-1)
        return pixels.sum(-1).mean() + 0.3 * (penalty + rest).mean()

    return loss_fn, params, (x, noise), False


@model({"log_std": {"shift", "scale", "generic"}, "*": "dense"})
def actor_critic():
    """Policy and value on one trunk; a state-independent log standard deviation."""

    class Agent(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.tanh(nn.Dense(6)(x))
            log_std = self.param("log_std", nn.initializers.zeros, (2,))
            return nn.Dense(3)(h), nn.Dense(2)(h), log_std, nn.Dense(1)(h)[..., 0]

    module, x = Agent(), normal(BATCH, 4)
    params = init(module, x)["params"]

    def loss_fn(params, batch):
        logits, mean, log_std, value = module.apply({"params": params}, batch["x"])
        policy = cross_entropy(logits, batch["action"]) * batch["advantage"]
        z = (mean - batch["move"]) * jnp.exp(-log_std)
        moves = curvature.losses.l2_loss(z).sum(-1) + log_std.sum()
        values = curvature.losses.l2_loss(value, batch["return"])
        entropy = -(jax.nn.softmax(logits) * jax.nn.log_softmax(logits)).sum(-1)
        return policy.mean() + moves.mean() + 0.5 * values.mean() - 0.01 * entropy.mean()

    batch = {
        "x": x,
        "action": integers(3, BATCH),
        "advantage": normal(BATCH, seed=1),
        "move": normal(BATCH, 2, seed=2),
        "return": normal(BATCH, seed=3),
    }
    return loss_fn, params, (batch,), False


@model({"Conv_*": "conv", "Dense_*": "dense", "temperature": "scale"})
def siamese():
    """One encoder on two views; cosine similarities times a temperature, softmax over the batch."""

    class Encoder(nn.Module):
        @nn.compact
        def __call__(self, a, b):
            conv, dense = nn.Conv(4, (3, 3)), nn.Dense(5)

            def encode(x):
                z = dense(nn.relu(conv(x)).mean((1, 2)))
                return z / jnp.sqrt((z**2).sum(-1, keepdims=True) + 1e-6)

            temperature = self.param("temperature", nn.initializers.ones, ())
            return encode(a) @ encode(b).T * temperature

    module, a, b = Encoder(), normal(BATCH, 4, 4, 2), normal(BATCH, 4, 4, 2, seed=1)
    params = init(module, a, b)["params"]

    def loss_fn(params, a, b):
        logits = module.apply({"params": params}, a, b)
        targets = jnp.arange(len(logits))
        return (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)).mean() / 2

    return loss_fn, params, (a, b), False


@model({"log_temperature": {"scale", "generic"}, "text/*": "embedding", "*": "dense"})
def clip():
    """Two towers and the exponential of a learned logarithm."""

    class Clip(nn.Module):
        @nn.compact
        def __call__(self, image, text):
            a = nn.Dense(4)(nn.relu(nn.Dense(6)(image)))
            b = nn.Dense(4)(nn.Embed(7, 4, name="text")(text).mean(1))
            a, b = (z / jnp.linalg.norm(z, axis=-1, keepdims=True) for z in (a, b))
            return jnp.exp(self.param("log_temperature", nn.initializers.zeros, ())) * a @ b.T

    module, image, text = Clip(), normal(BATCH, 5), integers(7, BATCH, 3)
    params = init(module, image, text)["params"]

    def loss_fn(params, image, text):
        return cross_entropy(module.apply({"params": params}, image, text), jnp.arange(BATCH)).sum()

    return loss_fn, params, (image, text), False


@model({"Conv_*": "conv", "Dense_*": "dense"})
def film():
    """Feature-wise linear modulation by a condition."""

    class FiLM(nn.Module):
        @nn.compact
        def __call__(self, x, condition):
            h = nn.relu(nn.Conv(4, (3, 3))(x))
            gamma, beta = jnp.split(nn.Dense(8)(condition), 2, axis=-1)
            h = nn.relu(gamma[:, None, None, :] * nn.Conv(4, (1, 1))(h) + beta[:, None, None, :])
            return nn.Dense(3)(h.mean((1, 2)))

    return build(FiLM(), normal(BATCH, 4, 4, 2), normal(BATCH, 3))


@model({"PReLU_*/*": "scale", "Conv_*": "conv", "Dense_*": "dense"})
def parametric_relu():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.PReLU()(nn.Conv(4, (3, 3))(x))
            return nn.Dense(3)(nn.PReLU()(nn.Dense(5)(x.mean((1, 2)))))

    return build(Net(), normal(BATCH, 4, 4, 2))


@model({"Conv_0/kernel": "conv", "Conv_0/bias": "shift", "Dense_0/*": "dense"})
def weight_standardisation():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            def standard(variables):
                def one(path, leaf):
                    if path[-1].key != "kernel":
                        return leaf
                    return (leaf - leaf.mean((0, 1, 2))) / (leaf.std((0, 1, 2)) + 1e-4)

                return jax.tree_util.tree_map_with_path(one, variables)

            conv = nn.map_variables(nn.Conv, "params", standard, init=self.is_initializing())
            x = nn.relu(conv(4, (3, 3), name="Conv_0")(x))
            return nn.Dense(3)(x.mean((1, 2)))

    return build(Net(), normal(BATCH, 4, 4, 2))


@model(
    {
        "WeightNorm_0/*/scale": "scale",
        "hidden/kernel": "dense",
        "hidden/bias": "shift",
        "head/*": "dense",
    }
)
def weight_norm():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.WeightNorm(nn.Dense(5, name="hidden"))(x))
            return nn.Dense(3, name="head")(x)

    return build(Net(), normal(BATCH, 4))


@model({"*": "dense"})
def dropout_and_two_losses():
    """Dropout keys as an argument; an auxiliary classifier."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dropout(0.5, deterministic=False)(nn.relu(nn.Dense(6)(x)))
            return nn.Dense(3)(nn.relu(nn.Dense(5)(h))), nn.Dense(2)(h)

    module, x = Net(), normal(BATCH, 4)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = fill(jax.eval_shape(module.init, keys, x))["params"]

    def loss_fn(params, x, y, key):
        main, side = module.apply({"params": params}, x, rngs={"dropout": key})
        return cross_entropy(main, y).mean() + 0.4 * cross_entropy(side, y % 2).mean()

    return loss_fn, params, (x, integers(3, BATCH), jax.random.key(3)), False
