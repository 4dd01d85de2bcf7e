"""Plain JAX, and single-example models in the style of Equinox, under `vmap`."""

import functools

import jax
import jax.numpy as jnp

import curvature
from zoo import BATCH, classifier, cross_entropy, fill, integers, model, normal, regressor


def random(**shapes):
    """Parameters of the given shapes; a dict gives a dict."""

    def one(shape):
        return {k: one(s) for k, s in shape.items()} if isinstance(shape, dict) else struct(shape)

    def struct(shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    return fill(one(shapes))


def linear(d_in, d_out):
    """A kernel and a bias."""
    return {"w": (d_in, d_out), "b": (d_out,)}


def dense(p, x):
    """`x @ w + b`."""
    return x @ p["w"] + p["b"]


# Equinox's style: weights are (out, in) and meet one example ----------------------------------


def column(p, x):
    """`weight @ x + bias` on one vector."""
    return p["weight"] @ x + p["bias"]


@model({"*norm*/weight": "scale", "*norm*/bias": "shift", "*": "dense"})
def equinox_attention():
    """Attention and MLP from vmapped `weight @ x + bias`; the norm sees one vector."""
    square = {"weight": (6, 6), "bias": (6,)}
    params = random(
        norm1={"weight": (6,), "bias": (6,)},
        q={"weight": (6, 6)},
        k={"weight": (6, 6)},
        v={"weight": (6, 6)},
        out=square,
        norm2={"weight": (6,), "bias": (6,)},
        up={"weight": (8, 6), "bias": (8,)},
        down={"weight": (6, 8), "bias": (6,)},
        head={"weight": (3, 6), "bias": (3,)},
    )

    def norm(p, x):
        x = (x - x.mean()) * jax.lax.rsqrt(x.var() + 1e-5)
        return x * p["weight"] + p["bias"]

    def one(p, x):  # [positions, 6]
        h = jax.vmap(functools.partial(norm, p["norm1"]))(x)
        q, k, v = (jax.vmap(lambda t, w=p[n]["weight"]: w @ t)(h) for n in "qkv")
        q, k, v = (z.reshape(len(z), 2, 3) for z in (q, k, v))

        def head(q, k, v):
            return jax.nn.softmax(q @ k.T / jnp.sqrt(3.0)) @ v

        h = jax.vmap(head, in_axes=1, out_axes=1)(q, k, v).reshape(len(x), 6)
        x = x + jax.vmap(functools.partial(column, p["out"]))(h)
        h = jax.vmap(functools.partial(norm, p["norm2"]))(x)
        h = jax.vmap(lambda t: column(p["down"], jax.nn.gelu(column(p["up"], t))))(h)
        return column(p["head"], (x + h).mean(0))

    return classifier(jax.vmap(one, (None, 0)), params, normal(BATCH, 5, 6))


@model({"conv*": "conv", "slope": "scale", "head*": "dense"})
def equinox_cnn():
    """Channels first, one image at a time, the bias of shape (out, 1, 1)."""
    params = random(
        conv1={"weight": (4, 2, 3, 3), "bias": (4, 1, 1)},
        conv2={"weight": (5, 4, 2, 2), "bias": (5, 1, 1)},
        slope=(),
        head={"weight": (3, 20), "bias": (3,)},
    )

    def conv(p, x, **options):
        options = {"window_strides": (1, 1), "padding": "SAME", **options}
        return jax.lax.conv_general_dilated(x[None], p["weight"], **options)[0] + p["bias"]

    def one(p, x):
        h = conv(p["conv1"], x)
        h = jnp.where(h > 0, h, p["slope"] * h)
        h = jax.nn.relu(conv(p["conv2"], h, window_strides=(2, 2), padding="VALID"))
        return column(p["head"], h.reshape(-1))

    return classifier(jax.vmap(one, (None, 0)), params, normal(BATCH, 2, 5, 5))


@model({"cell*": "dense", "start": "shift", "head*": "dense"})
def equinox_rnn():
    """A scan over one sequence, vmapped; the learned start is the carry."""
    params = random(
        cell={"hidden": {"weight": (4, 4)}, "input": {"weight": (4, 3), "bias": (4,)}},
        start=(4,),
        head={"weight": (2, 4), "bias": (2,)},
    )

    def one(p, x):
        def step(h, x):
            h = jnp.tanh(p["cell"]["hidden"]["weight"] @ h + column(p["cell"]["input"], x))
            return h, None

        return column(p["head"], jax.lax.scan(step, p["start"], x)[0])

    return classifier(jax.vmap(one, (None, 0)), params, normal(BATCH, 5, 3))


@model({"*/w": "dense", "*/b": {"dense", "shift"}})
def ensemble():
    """Three networks under `vmap`, trained together."""
    params = random(inner={"w": (3, 4, 5), "b": (3, 5)}, outer={"w": (3, 5, 2), "b": (3, 2)})

    def one(p, x):
        return dense(p["outer"], jnp.tanh(dense(p["inner"], x)))

    def loss_fn(params, x, y):
        logits = jax.vmap(one, (0, None))(params, x)  # [members, batch, classes]
        return jax.vmap(cross_entropy, (0, None))(logits, y).mean(1).sum()

    return loss_fn, params, (normal(BATCH, 4), integers(2, BATCH)), False


# Graphs and sets -----------------------------------------------------------------------------


@model({"*": "dense"})
def message_passing():
    """A graph network: gathers, segment sums, edges of all graphs in one list."""
    params = random(node=linear(3, 5), edge=linear(12, 5), update1=linear(10, 5), head=linear(5, 2))

    def apply(p, nodes, edges, senders, receivers, graph):
        h = jnp.tanh(dense(p["node"], nodes))
        for _ in range(2):
            m = jnp.concatenate([h[senders], h[receivers], edges], -1)
            m = jax.nn.relu(dense(p["edge"], m))
            m = jax.ops.segment_sum(m, receivers, len(nodes))
            h = h + jnp.tanh(dense(p["update1"], jnp.concatenate([h, m], -1)))
        return dense(p["head"], jax.ops.segment_sum(h, graph, 2))

    senders, receivers = integers(6, 9), integers(6, 9, seed=1)
    graph = jnp.array([0, 0, 0, 1, 1, 1], jnp.int32)
    return classifier(apply, params, normal(6, 3), normal(9, 2), senders, receivers, graph)


@model({"left": "dense", "right": "dense", "attention": {"dense", "scale"}, "head/*": "dense"})
def graph_attention():
    """GAT: scores from sums of two projections and a vector, a softmax over each receiver."""
    params = random(left=(3, 4), right=(3, 4), attention=(4,), head=linear(4, 3))

    def apply(p, x, senders, receivers):
        left, right = x @ p["left"], x @ p["right"]
        score = jax.nn.leaky_relu(left[senders] + right[receivers]) @ p["attention"]
        score = jnp.exp(score - score.max())
        total = jax.ops.segment_sum(score, receivers, len(x))
        weight = score / (total[receivers] + 1e-9)
        h = jax.ops.segment_sum(weight[:, None] * left[senders], receivers, len(x))
        return dense(p["head"], jax.nn.elu(h))

    return classifier(apply, params, normal(5, 3), integers(5, 9), integers(5, 9, seed=1))


@model({"*": "dense"})
def deep_sets():
    """A sum over the members of a set; sizes differ, the rest is masked."""
    params = random(phi1=linear(3, 5), phi2=linear(5, 4), rho1=linear(4, 5), rho2=linear(5, 1))

    def apply(p, x, mask):
        h = dense(p["phi2"], jnp.tanh(dense(p["phi1"], x)))
        return dense(p["rho2"], jnp.tanh(dense(p["rho1"], (h * mask[..., None]).sum(1))))

    mask = jnp.arange(5)[None, :] < jnp.array([5, 3, 2, 4])[:, None]
    return regressor(apply, params, normal(BATCH, 5, 3), mask.astype(jnp.float32))


# Weights with a twist ------------------------------------------------------------------------


@model({"w?": {"dense", "generic"}, "[bc]?": {"dense", "shift", "generic"}})
def tied_autoencoder():
    """The decoder is the encoder's transpose: one leaf in two layouts."""
    params = random(w1=(6, 4), b1=(4,), w2=(4, 2), b2=(2,), c1=(6,), c2=(4,))

    def apply(p, x):
        z = jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
        return jnp.tanh(z @ p["w2"].T + p["c2"]) @ p["w1"].T + p["c1"]

    return regressor(apply, params, normal(BATCH, 6))


@model({"code": {"shift", "dense", "generic"}, "make_*": {"dense", "generic"}, "head/*": "dense"})
def hypernetwork():
    """The weights of the main network are the output of another one, on a learned code."""
    params = random(code=(3,), make_w=(3, 20), make_b=(3, 5), head=linear(5, 2))

    def apply(p, x):
        w, b = jnp.tanh(p["code"] @ p["make_w"]).reshape(4, 5), p["code"] @ p["make_b"]
        return dense(p["head"], jnp.tanh(x @ w + b))

    return classifier(apply, params, normal(BATCH, 4))


@model({"*": "dense"})
def conditional_hypernetwork():
    """Weights made from each example's context."""
    params = random(inner=linear(3, 6), make=linear(6, 20), head=linear(5, 2))

    def apply(p, x, context):
        w = dense(p["make"], jnp.tanh(dense(p["inner"], context))).reshape(len(x), 4, 5)
        return dense(p["head"], jnp.tanh(jnp.einsum("ni,nio->no", x, w)))

    return classifier(apply, params, normal(BATCH, 4), normal(BATCH, 3, seed=1))


@model({"used/*": "dense", "head/*": "dense", "frozen/*": "generic", "unused/*": "generic"})
def frozen_and_unused():
    params = random(used=linear(3, 4), frozen=linear(4, 4), unused=linear(4, 2), head=linear(4, 2))

    def apply(p, x):
        h = jnp.tanh(dense(p["used"], x))
        return dense(p["head"], h + dense(jax.lax.stop_gradient(p["frozen"]), h))

    return classifier(apply, params, normal(BATCH, 3))


@model({"w": "dense", "a": "dense", "b": "dense", "head/*": "dense"})
def low_rank_beside():
    """LoRA by `x @ w + (x @ a) @ b`."""
    params = random(w=(4, 5), a=(4, 2), b=(2, 5), head=linear(5, 2))

    def apply(p, x):
        return dense(p["head"], jnp.tanh(x @ p["w"] + 2.0 * (x @ p["a"]) @ p["b"]))

    return classifier(apply, params, normal(BATCH, 4))


@model({"*": "dense"})
def low_rank_merged():
    """LoRA by `x @ (w + a @ b)`."""
    params = random(w=(4, 5), a=(4, 2), b=(2, 5), head=linear(5, 2))

    def apply(p, x):
        return dense(p["head"], jnp.tanh(x @ (p["w"] + p["a"] @ p["b"])))

    return classifier(apply, params, normal(BATCH, 4))


@model({"hidden/*": "dense", "head/*": "dense"})
def equalised_rate():
    """Weights times a constant, as in style-based generators, and depth by a constant 1/L."""
    params = random(hidden=linear(4, 5), head=linear(5, 2))

    def apply(p, x):
        h = jax.nn.leaky_relu(x @ (p["hidden"]["w"] / jnp.sqrt(4.0)) + p["hidden"]["b"])
        return h @ (0.5 * p["head"]["w"]) + p["head"]["b"]

    return classifier(apply, params, normal(BATCH, 4))


@model({"sigma": "scale", "b1": "shift", "w?": "dense"})
def spectral_norm():
    """One step of the power iteration on the weight, vectors kept as state."""
    params = random(w1=(4, 5), b1=(5,), w2=(5, 2), sigma=())

    def loss_fn(params, u, x, y):
        v = jax.lax.stop_gradient(params["w1"]).T @ u
        v = v / (jnp.linalg.norm(v) + 1e-6)
        u = jax.lax.stop_gradient(params["w1"]) @ v
        u = u / (jnp.linalg.norm(u) + 1e-6)
        w = params["w1"] / (u @ params["w1"] @ v)
        h = jnp.tanh(x @ w * params["sigma"] + params["b1"])
        return cross_entropy(h @ params["w2"], y).mean(), u

    return loss_fn, params, (normal(4), normal(BATCH, 4, seed=1), integers(2, BATCH)), True


@model({"decay": {"scale", "shift", "generic"}, "*": "dense"})
def state_space():
    """A diagonal linear state space: decay in (0, 1) by a sigmoid, an associative scan."""
    params = random(embed=(2, 4), decay=(4,), out=linear(4, 3))

    def apply(p, x):  # [batch, time, 2]
        u = x @ p["embed"]
        a = jnp.broadcast_to(jax.nn.sigmoid(p["decay"]), u.shape)

        def combine(left, right):
            return left[0] * right[0], right[0] * left[1] + right[1]

        _, h = jax.lax.associative_scan(combine, (a, u), axis=1)
        return dense(p["out"], h)

    return classifier(apply, params, normal(BATCH, 4, 2))


@model({"centres": "shift", "width": "scale", "out/*": "dense"})
def radial_basis():
    """Distances to learned centres."""
    params = random(centres=(5, 3), width=(5,), out=linear(5, 2))

    def apply(p, x):
        distance = ((x[:, None, :] - p["centres"]) ** 2).sum(-1)
        return dense(p["out"], jnp.exp(-distance * p["width"]))

    return classifier(apply, params, normal(BATCH, 3))


@model({"scale": "scale", "shift": "shift", "w?": "dense", "mixture": "generic"})
def flow_with_mixture():
    """An affine coupling layer, actnorm, and a mixture of two output losses."""
    params = random(scale=(4,), shift=(4,), w1=(2, 5), w2=(5, 4), mixture=(2,))

    def loss_fn(params, x):
        x = x * params["scale"] + params["shift"]
        log_s, t = jnp.split(jnp.tanh(x[:, :2] @ params["w1"]) @ params["w2"], 2, -1)
        z = jnp.concatenate([x[:, :2], x[:, 2:] * jnp.exp(log_s) + t], -1)
        near = curvature.losses.l2_loss(z).sum(-1)
        far = curvature.losses.squared_error(z, jnp.ones_like(z)).sum(-1)
        weight = jax.nn.softmax(jax.lax.stop_gradient(params["mixture"]))
        prior = 0.01 * (params["mixture"] ** 2).sum()
        return (weight[0] * near + weight[1] * far - log_s.sum(-1)).mean() + prior

    return loss_fn, params, (normal(BATCH, 4),), False


# Control flow --------------------------------------------------------------------------------


@model({"*": "dense"})
def loss_in_chunks():
    """The head and the loss in a scan over chunks of the sequence."""
    params = random(body=linear(3, 4), head=linear(4, 5))

    def loss_fn(params, x, y):
        h = jnp.tanh(dense(params["body"], x))
        chunks = jax.tree.map(lambda z: jnp.stack(jnp.split(z, 3, axis=1)), (h, y))

        def step(total, chunk):
            h, y = chunk
            return total + cross_entropy(dense(params["head"], h), y).sum(), None

        return jax.lax.scan(step, jnp.zeros(()), chunks)[0] / y.size

    return loss_fn, params, (normal(BATCH, 6, 3), integers(5, BATCH, 6)), False


@model({"*": "dense"})
def micro_batches():
    """The whole model in a scan over micro-batches, with remat."""
    params = random(body=linear(3, 4), head=linear(4, 5))

    def loss_fn(params, x, y):
        @jax.checkpoint
        def step(total, batch):
            x, y = batch
            logits = dense(params["head"], jnp.tanh(dense(params["body"], x)))
            return total + cross_entropy(logits, y).mean(), None

        batches = jax.tree.map(lambda z: z.reshape(3, 2, *z.shape[1:]), (x, y))
        return jax.lax.scan(step, jnp.zeros(()), batches)[0] / 3

    return loss_fn, params, (normal(6, 3), integers(5, 6)), False


@model({"*": "dense"})
def layer_drop():
    """Layers inside `cond`."""
    params = random(first=linear(3, 4), middle=linear(4, 4), last=linear(4, 2))

    def apply(p, x, keep):
        h = jnp.tanh(dense(p["first"], x))
        h = jax.lax.cond(keep, lambda h: h + jnp.tanh(dense(p["middle"], h)), lambda h: h, h)
        return dense(p["last"], h)

    return classifier(apply, params, normal(BATCH, 3), jnp.asarray(True))


@model({"*": "dense"})
def deep_equilibrium_unrolled():
    """A fixed number of steps of `fori_loop`, one shared layer."""
    params = random(w=(4, 4), u=linear(3, 4), head=linear(4, 2))

    def apply(p, x):
        inject = dense(p["u"], x)
        h = jax.lax.fori_loop(0, 4, lambda _, h: jnp.tanh(h @ p["w"] + inject), inject)
        return dense(p["head"], h)

    return classifier(apply, params, normal(BATCH, 3))


@model({"w": "generic", "u/*": {"dense", "generic"}, "head/*": "dense"})
def deep_equilibrium_implicit():
    """A `while` loop to the fixed point inside `custom_vjp`, differentiated implicitly."""
    params = random(w=(4, 4), u=linear(3, 4), head=linear(4, 2))

    def cell(w, inject, h):
        return jnp.tanh(0.5 * h @ w + inject)

    def iterate(step, h):
        def on(state):
            old, new, i = state
            return (jnp.abs(new - old).max() > 1e-4) & (i < 20)

        def move(state):
            _, h, i = state
            return h, step(h), i + 1

        return jax.lax.while_loop(on, move, (h + 1.0, h, 0))[1]

    @jax.custom_vjp
    def solve(w, inject):
        return iterate(lambda h: cell(w, inject, h), jnp.zeros_like(inject))

    def forward(w, inject):
        h = solve(w, inject)
        return h, (w, inject, h)

    def backward(kept, g):
        w, inject, h = kept
        _, pull = jax.vjp(lambda h: cell(w, inject, h), h)
        v = iterate(lambda v: g + pull(v)[0], g)
        _, pull = jax.vjp(lambda w, inject: cell(w, inject, h), w, inject)
        return pull(v)

    solve.defvjp(forward, backward)

    def apply(p, x):
        return dense(p["head"], solve(p["w"], dense(p["u"], x)))

    return classifier(apply, params, normal(BATCH, 3))


@model({"*": "dense"})
def switched_experts():
    """One of two layers by `switch`, chosen for the whole batch."""
    params = random(expert0=linear(3, 4), expert1=linear(3, 4), head=linear(4, 2))

    def apply(p, x, index):
        branches = [lambda x, e=p[name]: dense(e, x) for name in ("expert0", "expert1")]
        return dense(p["head"], jnp.tanh(jax.lax.switch(index, branches, x)))

    return classifier(apply, params, normal(BATCH, 3), jnp.asarray(1, jnp.int32))


@model({"kernel": "conv", "depthwise": "conv", "bias": "conv", "head/*": "dense"})
def channels_first_cnn():
    """NCHW data with OIHW kernels; one depthwise convolution in NHWC between transposes."""
    params = random(kernel=(4, 2, 3, 3), bias=(4,), depthwise=(3, 3, 1, 4), head=linear(4, 3))

    def apply(p, x):
        conv = jax.lax.conv_general_dilated
        layout = ("NCHW", "OIHW", "NCHW")
        h = conv(x, p["kernel"], (1, 1), "SAME", dimension_numbers=layout)
        h = jax.nn.relu(h + p["bias"][None, :, None, None]).transpose(0, 2, 3, 1)
        layout = ("NHWC", "HWIO", "NHWC")
        h = conv(
            h, p["depthwise"], (2, 2), "VALID", dimension_numbers=layout, feature_group_count=4
        )
        return dense(p["head"], h.mean((1, 2)))

    return classifier(apply, params, normal(BATCH, 2, 5, 5))


@model({"table": "embedding", "*": "dense"})
def padded_tagger():
    """A tagger of tokens by `vmap` over examples and positions; padding has no loss."""
    params = random(table=(7, 4), q=(4, 4), k=(4, 4), v=(4, 4), head=linear(4, 3))

    def one(p, tokens, length):
        x = jax.vmap(lambda token: p["table"][token])(tokens)
        scores = jnp.where(jnp.arange(5) < length, (x @ p["q"]) @ (x @ p["k"]).T, -1e9)
        return dense(p["head"], x + jax.nn.softmax(scores) @ (x @ p["v"]))

    def loss_fn(p, tokens, lengths, labels):
        logits = jax.vmap(one, (None, 0, 0))(p, tokens, lengths)
        mask = jnp.arange(5) < lengths[:, None]
        return jnp.where(mask, cross_entropy(logits, labels), 0.0).sum() / mask.sum()

    lengths = jnp.array([5, 2, 3, 4], jnp.int32)
    return loss_fn, params, (integers(7, BATCH, 5), lengths, integers(3, BATCH, 5)), False


@model({"*": "dense"})
def data_parallel():
    """The loss inside `shard_map`, averaged over devices."""
    params = random(inner=linear(3, 4), head=linear(4, 2))
    mesh = jax.sharding.Mesh(jax.devices()[:2], "data")
    whole, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("data")

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(whole, split, split), out_specs=whole)
    def loss_fn(p, x, y):
        logits = dense(p["head"], jnp.tanh(dense(p["inner"], x)))
        return jax.lax.pmean(cross_entropy(logits, y).mean(), "data")

    return loss_fn, params, (normal(BATCH, 3), integers(2, BATCH)), False


@model({"*": "dense"})
def one_operand_from_many_leaves():
    """Gates kept apart and joined to be used; layers kept apart and stacked to be scanned."""
    gate = {"w": (3, 4), "b": (4,)}
    params = random(a=gate, b=gate, layers={"0": (8, 8), "1": (8, 8)}, head=linear(8, 2))

    def apply(p, x):
        w, b = (jnp.concatenate([p["a"][name], p["b"][name]], -1) for name in ("w", "b"))
        h = jnp.tanh(x @ w + b)
        stack = jnp.stack([p["layers"]["0"], p["layers"]["1"]])
        return dense(p["head"], jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, stack)[0])

    return classifier(apply, params, normal(BATCH, 3))


@model({"*": "dense"})
def actor_of_trajectories():
    """Steps of a trajectory flattened in front of the batch, as `hk.BatchApply` does it."""
    params = random(torso=linear(3, 4), policy=linear(4, 2))

    def apply(p, x):
        flat = x.swapaxes(0, 1).reshape(-1, 3)
        h = jnp.tanh(dense(p["torso"], flat)).reshape(5, -1, 4).swapaxes(0, 1)
        return dense(p["policy"], h)

    return classifier(apply, params, normal(BATCH, 5, 3))
