"""Models that a well known K-FAC library for JAX was tried on, one case for each, with our result.

Some of them raise there, some fall back to a diagonal without a word, some get wrong factors. Here
every one must register with the kinds given below. Where the other library raises or is silently
wrong, one pass of the sampled Fisher is run as well (`runs`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import jmp
import numpy as np
import pytest
import zoo
import zoo.haiku
import zoo.linen
import zoo.nnx
import zoo.plain
from flax import nnx
from zoo import BATCH, MODELS, classifier, cross_entropy, integers, normal, regressor
from zoo.linen import build, init
from zoo.plain import column, dense, linear, random

import curvature


@dataclasses.dataclass(frozen=True)
class Row:
    """One model: how it is made, what is expected, whether it is also run."""

    make: Callable
    expected: Mapping
    runs: bool = False

    def register(self):
        return zoo.Model("", self.make, self.expected).register()


ROWS: dict[str, Row] = {}
ALL_DENSE = {"*": "dense"}
CNN = {"*onv*": "conv", "*": "dense"}


def row(name, expected, *, runs=False):
    """Decorator: a row of the table; `runs`: it crashes or is wrong over there."""

    def add(make):
        assert name not in ROWS, name
        ROWS[name] = Row(make, expected, runs)
        return make

    return add


def in_zoo(name, model):
    """A row that is a model of the zoo, where it is run."""
    ROWS[name] = Row(MODELS[model].make, MODELS[model].expected)


def sequential(name, layers, expected, *inputs, runs=False):
    """A row made of linen layers and functions, applied in turn."""
    row(name, expected, runs=runs)(lambda: build(nn.Sequential(layers()), *inputs))


def haiku_row(name, function, expected, *inputs, runs=False):
    """A row made of a function of Haiku modules."""
    row(name, expected, runs=runs)(lambda: zoo.haiku.build(function, *inputs))


def mean_space(x):
    return x.mean(tuple(range(1, x.ndim - 1)))


# MLPs, CNNs, plain dense layers --------------------------------------------------------------

sequential(
    "linen MLP, bias, relu", lambda: [nn.Dense(5), nn.relu, nn.Dense(3)], ALL_DENSE, normal(4, 3)
)
sequential(
    "linen MLP, no bias, tanh",
    lambda: [nn.Dense(5, use_bias=False), nn.tanh, nn.Dense(3, use_bias=False)],
    ALL_DENSE,
    normal(4, 3),
)
for _name, _options in {
    "SAME": {},
    "strided": {"strides": (2, 2)},
    "VALID": {"padding": "VALID"},
}.items():
    sequential(
        f"linen CNN, {_name}, pool, dense",
        lambda options=_options: [
            nn.Conv(4, (3, 3), **options),
            functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2)),
            lambda x: nn.relu(x).reshape(len(x), -1),
            nn.Dense(3),
        ],
        {"layers_0/*": "conv", "layers_3/*": "dense"},
        normal(BATCH, 6, 6, 2),
    )
for _shape in ((BATCH, 5, 3), (BATCH, 3, 3, 2), (BATCH, 2, 3, 2, 2)):
    sequential(
        f"linen dense on {len(_shape)} dimensions",
        lambda: [nn.Dense(4), nn.tanh, nn.Dense(3)],
        ALL_DENSE,
        normal(*_shape),
    )


# Norms ---------------------------------------------------------------------------------------

for _name, _norm, _kinds in (
    ("LayerNorm", nn.LayerNorm, {"*/scale": "scale", "layers_1/bias": "shift"}),
    ("RMSNorm", nn.RMSNorm, {"*/scale": "scale"}),
    ("GroupNorm", lambda: nn.GroupNorm(2), {"*/scale": "scale", "layers_1/bias": "shift"}),
):
    sequential(
        f"linen {_name}",
        lambda norm=_norm: [nn.Dense(4), norm(), nn.tanh, nn.Dense(3)],
        {**_kinds, "*": "dense"},
        normal(BATCH, 5, 3),
    )


class BatchNormNet(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(not self.train, name="norm")(nn.Dense(4)(x))
        return nn.Dense(3)(nn.relu(x))


def batch_norm(train):
    module, x = BatchNormNet(train), normal(BATCH, 3)
    variables = init(module, x)

    def loss_fn(params, stats, x, y):
        variables = {"params": params, "batch_stats": stats}
        logits, stats = module.apply(variables, x, mutable=["batch_stats"])
        return cross_entropy(logits, y).mean(), stats["batch_stats"]

    return loss_fn, variables["params"], (variables["batch_stats"], x, integers(3, BATCH)), True


for _train in (True, False):
    _name = f"linen BatchNorm, {'train' if _train else 'eval'}"
    row(_name, {"norm/scale": "scale", "norm/bias": "shift", "*": "dense"})(
        functools.partial(batch_norm, _train)
    )


# Attention and kernels with several dimensions -----------------------------------------------

sequential(
    "linen MultiHeadDotProductAttention",
    lambda: [nn.MultiHeadDotProductAttention(2), nn.Dense(3)],
    ALL_DENSE,
    normal(BATCH, 5, 4),
    runs=True,
)


@row("NNX MultiHeadAttention", ALL_DENSE, runs=True)
def nnx_attention():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)

        def __call__(self, x):
            return self.attention(x)

    return zoo.nnx.build(Net, normal(BATCH, 5, 4))


sequential(
    "linen DenseGeneral, two free dimensions",
    lambda: [nn.DenseGeneral((2, 3)), nn.tanh, nn.DenseGeneral(3)],
    ALL_DENSE,
    normal(BATCH, 4),
    runs=True,
)
sequential(
    "linen DenseGeneral, two contracted dimensions",
    lambda: [nn.DenseGeneral(3, axis=(-2, -1))],
    ALL_DENSE,
    normal(BATCH, 2, 4),
    runs=True,
)
sequential(
    "linen DenseGeneral, axis=1",
    lambda: [nn.DenseGeneral(3, axis=1)],
    ALL_DENSE,
    normal(BATCH, 5, 4),
    runs=True,
)
sequential(
    "linen Einsum btd,dhk->bthk",
    lambda: [nn.Einsum((4, 2, 3), "btd,dhk->bthk")],
    ALL_DENSE,
    normal(BATCH, 5, 4),
    runs=True,
)


@row("fused qkv, split(x @ w, 3)", ALL_DENSE)
def fused_qkv():
    params = random(w=(4, 12), out=linear(4, 3))

    def apply(p, x):
        q, k, v = jnp.split(x @ p["w"], 3, -1)
        return dense(p["out"], jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v)

    return classifier(apply, params, normal(BATCH, 5, 4))


haiku_row(
    "hk.MultiHeadAttention",
    lambda x: hk.MultiHeadAttention(2, 2, w_init=hk.initializers.VarianceScaling())(x, x, x),
    ALL_DENSE,
    normal(BATCH, 5, 4),
)


# Embeddings ----------------------------------------------------------------------------------

sequential(
    "linen Embed and MLP",
    lambda: [nn.Embed(7, 4), nn.Dense(3)],
    {"layers_0/*": "embedding", "layers_1/*": "dense"},
    integers(7, BATCH, 5),
)
in_zoo("linen Embed tied with attend", "linen/tied_language_model")
in_zoo("NNX Embed tied", "nnx/tied_transformer")
for _style in ("ARRAY_INDEX", "ONE_HOT"):
    haiku_row(
        f"hk.Embed {_style}",
        lambda x, style=_style: hk.Linear(3)(hk.Embed(7, 4, lookup_style=style, name="embed")(x)),
        {"embed/*": "embedding", "linear/*": "dense"},
        integers(7, BATCH, 5),
    )


# Scans ---------------------------------------------------------------------------------------


class ScanBody(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(4)(x)), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            ScanBody, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return nn.Dense(3)(layers()(x, None)[0])


@row("linen nn.scan of layers", ALL_DENSE, runs=True)
def linen_scan():
    return build(Scanned(), normal(BATCH, 4))


in_zoo("NNX scan over stacked layers", "nnx/scanned_layers")
in_zoo("hk.experimental.layer_stack", "haiku/stacked_transformer")
in_zoo("hk.scan with a shared layer", "haiku/scan_with_shared_layer")
in_zoo("hk.LSTM dynamic_unroll", "haiku/lstm_dynamic")
in_zoo("nn.RNN(LSTMCell)", "linen/lstm_classifier")
in_zoo("lax.fori_loop fixed point", "plain/deep_equilibrium_unrolled")


@row("a layer written in the body of a scan", ALL_DENSE)
def plain_scan():
    params = random(stack={"w": (3, 4, 4), "b": (3, 4)}, head=linear(4, 2))

    def apply(p, x):
        def body(h, layer):
            return jnp.tanh(dense(layer, h)), None

        return dense(p["head"], jax.lax.scan(body, x, p["stack"])[0])

    return classifier(apply, params, normal(BATCH, 4))


# Sharing, remat, jit, precision --------------------------------------------------------------

in_zoo("hk.LSTM static_unroll", "haiku/lstm_static_two_deep")
in_zoo("siamese, two forward passes", "linen/siamese")


@row("linen Dense used twice", ALL_DENSE)
def shared_dense():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(4)
            return layer(nn.tanh(layer(x)))

    return build(Twice(), normal(BATCH, 4))


sequential(
    "linen nn.remat(Dense)",
    lambda: [nn.remat(nn.Dense)(4), nn.tanh, nn.Dense(3)],
    ALL_DENSE,
    normal(BATCH, 4),
)
haiku_row(
    "hk.remat",
    lambda x: hk.Linear(3)(hk.remat(lambda x: jnp.tanh(hk.Linear(4)(x)))(x)),
    ALL_DENSE,
    normal(BATCH, 4),
)
sequential(
    "linen nn.jit(Dense)",
    lambda: [nn.jit(nn.Dense)(4), nn.tanh, nn.Dense(3)],
    ALL_DENSE,
    normal(BATCH, 4),
)


def mlp(apply_wrap=lambda f: f, loss_wrap=lambda f: f, **options):
    module = nn.Sequential([nn.Dense(4, **options), nn.tanh, nn.Dense(3, **options)])
    x = normal(BATCH, 4)
    params = init(module, x)["params"]
    apply = apply_wrap(module.apply)
    found = classifier(lambda p, x: apply({"params": p}, x).astype(jnp.float32), params, x)
    return loss_wrap(found[0]), *found[1:]


row("jax.jit(model.apply)", ALL_DENSE)(lambda: mlp(jax.jit))
row("jax.jit(loss)", ALL_DENSE, runs=True)(lambda: mlp(loss_wrap=jax.jit))
row("linen Dense(dtype=bfloat16)", ALL_DENSE)(lambda: mlp(dtype=jnp.bfloat16))
row("bfloat16 parameters", ALL_DENSE, runs=True)(lambda: mlp(param_dtype=jnp.bfloat16))


@row("hk mixed precision", ALL_DENSE)
def haiku_mixed_precision():
    def forward(x):
        half = jmp.get_policy("params=float32,compute=bfloat16,output=float32")
        with hk.mixed_precision.push_policy(hk.nets.MLP, half):
            return hk.nets.MLP([4, 3])(x)

    return zoo.haiku.build(forward, normal(BATCH, 4))


# NNX and Haiku as their users have them ------------------------------------------------------


class NNXMLP(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(3, 4, rngs=rngs)
        self.outer = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.outer(nnx.tanh(self.inner(x)))


@row("NNX MLP, nnx.State as parameters", ALL_DENSE)
def nnx_state():
    graph, params = nnx.split(NNXMLP(nnx.Rngs(0)))
    return classifier(lambda p, x: nnx.merge(graph, p)(x), params, normal(BATCH, 3))


@row("NNX MLP, pure dict as parameters", ALL_DENSE)
def nnx_dict():
    return zoo.nnx.build(NNXMLP, normal(BATCH, 3))


@row("NNX MLP, the module as parameters", ALL_DENSE)
def nnx_module():
    return classifier(lambda model, x: model(x), NNXMLP(nnx.Rngs(0)), normal(BATCH, 3))


in_zoo("NNX Conv and BatchNorm", "nnx/batch_norm_cnn")
haiku_row("Haiku MLP", lambda x: hk.nets.MLP([5, 3])(x), ALL_DENSE, normal(BATCH, 4))
haiku_row(
    "Haiku CNN",
    lambda x: hk.Linear(3)(mean_space(jax.nn.relu(hk.Conv2D(4, 3, stride=2)(x)))),
    CNN,
    normal(BATCH, 6, 6, 2),
)


@row(
    "Haiku ResNet18",
    {"*norm*/scale": "scale", "*norm*/offset": "shift", "*conv*": "conv", "*logits*": "dense"},
)
def resnet18():
    """Only traced, at its published size."""
    net = hk.transform_with_state(lambda x: hk.nets.ResNet18(10)(x, is_training=True))
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    params, state = jax.eval_shape(net.init, jax.random.key(0), x)

    def loss_fn(params, state, x, y):
        logits, state = net.apply(params, state, None, x)
        return cross_entropy(logits, y).mean(), state

    return loss_fn, params, (state, x, jax.ShapeDtypeStruct((2,), jnp.int32)), True


# One example under vmap, and Equinox's style -------------------------------------------------


def vmapped(loss_inside):
    module, x = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(3)]), normal(BATCH, 4)
    params = init(module, x[0])["params"]

    def loss_fn(params, x, y):
        def one(x, y):
            logits = module.apply({"params": params}, x)
            return cross_entropy(logits, y) if loss_inside else logits

        out = jax.vmap(one)(x, y)
        return out.mean() if loss_inside else cross_entropy(out, y).mean()

    return loss_fn, params, (x, integers(3, BATCH)), False


row("vmapped linen MLP, loss inside", ALL_DENSE)(lambda: vmapped(True))
row("vmapped linen MLP, loss outside", ALL_DENSE)(lambda: vmapped(False))


@row("vmapped linen CNN", {"layers_0/*": "conv", "layers_2/*": "dense"})
def vmapped_cnn():
    module = nn.Sequential([nn.Conv(4, (3, 3)), lambda x: nn.relu(x).mean((0, 1)), nn.Dense(3)])
    x = normal(BATCH, 5, 5, 2)
    params = init(module, x[0])["params"]
    return classifier(jax.vmap(lambda p, x: module.apply({"params": p}, x), (None, 0)), params, x)


def layers_of(layer):
    params = random(inner={"weight": (5, 3), "bias": (5,)}, outer={"weight": (2, 5), "bias": (2,)})

    def apply(p, x):
        return layer(p["outer"], jnp.tanh(layer(p["inner"], x)))

    return params, apply


@row("Equinox: vmapped weight @ x + bias", ALL_DENSE)
def equinox():
    params, apply = layers_of(column)
    return classifier(jax.vmap(apply, (None, 0)), params, normal(BATCH, 3))


@row("torch: x @ weight.T + bias", ALL_DENSE)
def torch():
    params, apply = layers_of(lambda p, x: x @ p["weight"].T + p["bias"])
    return classifier(apply, params, normal(BATCH, 3))


in_zoo("Equinox attention", "plain/equinox_attention")
in_zoo("Equinox NCHW conv", "plain/equinox_cnn")
in_zoo("vmapped ensemble of dense layers", "plain/ensemble")


@row("MoE einsum btd,edf->btef", ALL_DENSE)
def experts():
    params = random(gate=(4, 3), up=(3, 4, 5), down=(3, 5, 2))

    def apply(p, x):
        gates = jax.nn.softmax(x @ p["gate"])
        h = jax.nn.relu(jnp.einsum("btd,edf->btef", x, p["up"]))
        return jnp.einsum("btef,efd,bte->btd", h, p["down"], gates)

    return classifier(apply, params, normal(BATCH, 5, 4))


# Convolutions --------------------------------------------------------------------------------

for _name, _groups in {"grouped": 2, "depthwise": 4}.items():
    sequential(
        f"linen {_name} conv",
        lambda groups=_groups: [nn.Conv(4, (3, 3), feature_group_count=groups), nn.relu],
        {"*": "conv"},
        normal(BATCH, 4, 4, 4),
        runs=True,
    )
haiku_row(
    "hk grouped conv",
    lambda x: hk.Conv2D(4, 3, feature_group_count=2)(x),
    {"*": "conv"},
    normal(BATCH, 4, 4, 4),
)
haiku_row(
    "hk depthwise conv",
    lambda x: hk.DepthwiseConv2D(2, 3)(x),
    {"*": "conv"},
    normal(BATCH, 4, 4, 3),
)
for _name, _window, _shape in (("Conv1D", (3,), (7, 2)), ("Conv3D", (2, 2, 2), (3, 3, 3, 2))):
    sequential(
        f"linen {_name}",
        lambda window=_window: [nn.Conv(3, window)],
        {"*": "conv"},
        normal(BATCH, *_shape),
    )
sequential(
    "linen ConvTranspose",
    lambda: [nn.ConvTranspose(3, (3, 3), (2, 2))],
    {"*": "conv"},
    normal(BATCH, 3, 3, 2),
    runs=True,
)
haiku_row(
    "hk.Conv2DTranspose",
    lambda x: hk.Conv2DTranspose(3, 3, stride=2)(x),
    {"*": "conv"},
    normal(BATCH, 3, 3, 2),
    runs=True,
)
for _padding in ("SAME", "VALID"):
    sequential(
        f"linen dilated conv, {_padding}",
        lambda padding=_padding: [nn.Conv(3, (3, 3), kernel_dilation=(2, 2), padding=padding)],
        {"*": "conv"},
        normal(BATCH, 6, 6, 2),
        runs=True,
    )


# Control flow and weights with a twist -------------------------------------------------------


@row("cond around activations", ALL_DENSE)
def cond_activation():
    params = random(a=linear(3, 4), b=linear(4, 2))

    def apply(p, x, flag):
        h = jax.lax.cond(flag, jnp.tanh, jax.nn.relu, dense(p["a"], x))
        return dense(p["b"], h)

    return classifier(apply, params, normal(BATCH, 3), jnp.asarray(True))


in_zoo("cond with parameters inside", "plain/layer_drop")


def twisted(twist, w=(3, 4)):
    params = random(w=w, head=linear(4, 2))

    def apply(p, x):
        return dense(p["head"], jnp.tanh(x @ twist(p["w"])))

    return classifier(apply, params, normal(BATCH, 3))


for _name, _twist, _shape, _kind in (
    ("scaled", lambda w: 0.5 * w, (3, 4), "dense"),
    ("transposed", lambda w: w.T, (4, 3), "dense"),
    ("in two slices", lambda w: jnp.concatenate([w[:1], w[1:]]), (3, 4), {"dense", "generic"}),
    ("sliced in part", lambda w: w[:3], (5, 4), {"dense", "generic"}),
    ("cast", lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), (3, 4), "dense"),
    ("weight-normalised", lambda w: w / jnp.linalg.norm(w, axis=0), (3, 4), "dense"),
):
    row(f"weight {_name}", {"w": _kind, "head/*": "dense"})(
        functools.partial(twisted, _twist, _shape)
    )


@row("weight sliced, every slice used", ALL_DENSE)
def sliced():
    params = random(w=(3, 8), head=linear(4, 2))

    def apply(p, x):
        return dense(p["head"], jnp.tanh(x @ p["w"][:, :4]) * (x @ p["w"][:, 4:]))

    return classifier(apply, params, normal(BATCH, 3))


in_zoo("linen WeightNorm", "linen/weight_norm")
in_zoo("unused and frozen parameters", "plain/frozen_and_unused")
in_zoo("LoRA, x @ w + (x @ a) @ b", "plain/low_rank_beside")
in_zoo("LoRA, x @ (w + a @ b)", "plain/low_rank_merged")


@row("gradient accumulation by lax.scan", ALL_DENSE, runs=True)
def accumulation_scanned():
    return MODELS["plain/micro_batches"].make()


@row("gradient accumulation unrolled", ALL_DENSE)
def accumulation_unrolled():
    params = random(a=linear(3, 4), b=linear(4, 2))

    def loss_fn(params, x, y):
        total = 0.0
        for i in range(2):
            part = slice(3 * i, 3 * i + 3)
            logits = dense(params["b"], jnp.tanh(dense(params["a"], x[part])))
            total += cross_entropy(logits, y[part]).mean() / 2
        return total

    return loss_fn, params, (normal(6, 3), integers(2, 6)), False


# Layouts of the data -------------------------------------------------------------------------


@row("tokens flattened into the batch", ALL_DENSE, runs=True)
def flattened():
    params = random(a=linear(3, 4), b=linear(4, 2))

    def apply(p, x):
        h = jnp.tanh(dense(p["a"], x.reshape(-1, 3)))
        return dense(p["b"], h).reshape(*x.shape[:2], 2)

    return classifier(apply, params, normal(BATCH, 5, 3))


@row("time first", ALL_DENSE, runs=True)
def time_first():
    params = random(a=linear(3, 4), b=linear(4, 2))

    def apply(p, x):
        return dense(p["b"], jnp.tanh(dense(p["a"], x)))

    return classifier(apply, params, normal(5, BATCH, 3))


@row("batch whose first leaf is a scalar", ALL_DENSE, runs=True)
def scalar_in_batch():
    params = random(a=linear(3, 4), b=linear(4, 2))

    def loss_fn(params, batch):
        logits = dense(params["b"], jnp.tanh(dense(params["a"], batch["x"])))
        return batch["a_scalar"] * cross_entropy(logits, batch["y"]).mean()

    batch = {"a_scalar": jnp.float32(0.5), "x": normal(BATCH, 3), "y": integers(2, BATCH)}
    return loss_fn, params, (batch,), False


# Losses and the rest -------------------------------------------------------------------------

ANY = frozenset(("dense", "scale", "shift", "generic"))


@row("PINN, Laplacian of an MLP", {"*": ANY}, runs=True)
def pinn():
    params = random(a=linear(2, 5), b=linear(5, 5), c=linear(5, 1))

    def loss_fn(params, inside, border):
        def u(x):
            h = jnp.tanh(dense(params["b"], jnp.tanh(dense(params["a"], x))))
            return dense(params["c"], h)[0]

        residual = jax.vmap(lambda x: jnp.trace(jax.hessian(u)(x)) + x.sum())(inside)
        loss = curvature.losses.squared_error(residual).mean()
        return loss + 10.0 * curvature.losses.squared_error(jax.vmap(u)(border)).mean()

    return loss_fn, params, (normal(5, 2), normal(3, 2, seed=1)), False


in_zoo("two losses and dropout", "linen/dropout_and_two_losses")


@row("1x1 parameters", {"w": "dense", "b": "dense", "v": "dense"})
def one_by_one():
    params = random(w=(1, 1), b=(1,), v=(1, 1))
    return regressor(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["v"], params, normal(BATCH, 1))


in_zoo("while loop inside custom_vjp", "plain/deep_equilibrium_implicit")


@row("while loop behind stop_gradient", {"w": "generic", "head/*": "dense"}, runs=True)
def while_loop():
    params = random(w=(3, 3), head=linear(3, 2))

    def apply(p, x):
        def body(state):
            h, i = state
            return jnp.tanh(h @ p["w"]), i + 1

        h, _ = jax.lax.while_loop(lambda s: (jnp.abs(s[0]).max() > 0.5) & (s[1] < 9), body, (x, 0))
        return dense(p["head"], jax.lax.stop_gradient(h))

    return classifier(apply, params, normal(BATCH, 3))


@row("shard_map over one device", ALL_DENSE, runs=True)
def shard_map():
    params = random(inner=linear(3, 4), head=linear(4, 2))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("data")

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(replicated, split), out_specs=split)
    def layer(p, x):
        return jnp.tanh(dense(p, x))

    def apply(p, x):
        return dense(p["head"], layer(p["inner"], x))

    return classifier(apply, params, normal(BATCH, 3))


# The tests -----------------------------------------------------------------------------------


def fisher(registry, params, args):
    """The sampled Fisher of one sample; all of it must be finite, and some of it not zero."""
    estimator = curvature.Estimator(registry, curvature.Fisher(samples=1))
    run = zoo.jit(lambda params, args, key: estimator.statistics(params, *args, key=key))
    statistics = run(params, args, jax.random.key(1))
    zoo.check_finite(statistics)
    assert any(bool(np.any(np.asarray(s))) for s in jax.tree.leaves(statistics))


@pytest.mark.parametrize("name", ROWS)
def test_row(name):
    with zoo.defaults():
        registry, params, args = ROWS[name].register()
        if ROWS[name].runs:
            fisher(registry, params, args)
        zoo.check_kinds(registry, params, ROWS[name].expected)


def test_reasons_of_leaves_without_curvature():
    """The table says which parameters are unused and which are frozen."""
    with zoo.defaults():
        registry, _, _ = ROWS["unused and frozen parameters"].register()
    reasons = {layer.parameters: layer.reason for layer in registry.layers}
    assert "stop_gradient" in reasons[("['frozen']['w']",)]
    assert "no tagged loss" in reasons[("['unused']['w']",)]


@pytest.mark.parametrize("pattern", ["stack/*", "*"])
def test_escape_hatches_for_a_scan(pattern):
    """Its stack as a diagonal, or everything: one line, and it runs."""
    with zoo.defaults():
        registry, params, args = ROWS["a layer written in the body of a scan"].register()
        registry = registry.override(pattern, block="diagonal")
        blocks = {layer.name: layer.block for layer in registry.layers}
        assert blocks.pop("head") == ("diagonal" if pattern == "*" else "kronecker")
        assert set(blocks.values()) == {"diagonal"}
        fisher(registry, params, args)


def test_entries_that_meet_no_data_follow_their_plain_gradient():
    """Half of a weight is used; a penalty moves the other half as curvature does the used one."""

    def loss_fn(params, x, y):
        return curvature.losses.l2_loss(x @ params["w"][:3], y).mean() + params["w"].sum()

    params, x, y = {"w": jnp.ones((5, 2))}, jnp.eye(4, 3), jnp.zeros((4, 2))
    registry = curvature.register(loss_fn, params, x, y)
    zoo.check_kinds(registry, params, {"w": {"dense", "generic"}})
    tx = curvature.scale_by_curvature(registry, damping=0.5)
    grads = jax.grad(loss_fn)(params, x, y)
    key = jax.random.key(0)
    update = jax.jit(tx.update)
    updates, _ = update(grads, tx.init(params), params, loss_args=(x, y), key=key)
    used, moved = np.asarray(grads["w"][:3]), np.asarray(updates["w"][:3])
    scale = np.sum(used * moved) / np.sum(used**2)
    np.testing.assert_allclose(updates["w"][3:], scale, rtol=1e-6)


def test_last_smaller_batch():
    """Another batch size is another compilation, nothing else."""
    with zoo.defaults():
        registry, params, (x, y) = ROWS["tokens flattened into the batch"].register()
        fisher(registry, params, (x[:3], y[:3]))
