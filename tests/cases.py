"""Every way a layer can be written, each with a plain reference.

A case is (params, x, model(params, x), reference(params, x, tap), layers with a bias). The
reference computes the same outputs with `tap(name, a, y)` called at every layer: `a` is the layer's
input with its features last, `y` the output. Layers with members are named `name@member`.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

N = 6


def half(*lists):
    """All combinations, each with one of two that is not exhaustive: neighbours take turns."""
    indices = itertools.product(*(range(len(x)) for x in lists))
    combined = itertools.product(*lists)
    return [
        pytest.param(*values, marks=pytest.mark.exhaustive if sum(places) % 2 else ())
        for places, values in zip(indices, combined, strict=True)
    ]


def normal(seed, *shape):
    """By numpy: JAX compiles a program for each shape."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def same(name, a, y):
    return y


@jax.custom_jvp
def activation(x):
    return jnp.tanh(x)


activation.defjvps(lambda t, ans, x: t * (1 - ans**2))


# Each case: (params, x, model(params, x), reference(params, x, tap), layers with a bias).


def mlp(wrap=lambda f: f, tap=None):
    params = {"w": normal(0, 3, 4), "b": normal(1, 4), "v": normal(2, 4, 2)}

    def layers(p, x, tap=same):
        h = activation(tap("w", x, x @ p["w"] + p["b"]))
        return tap("v", h, h @ p["v"])

    return params, normal(3, N, 3), wrap(lambda p, x: layers(p, x)), layers, {"w"}


def in_custom_jvp():
    """The layer itself lies in a custom_jvp function."""

    @jax.custom_jvp
    def layer(w, x):
        return jnp.tanh(x @ w)

    @layer.defjvp
    def layer_jvp(primals, tangents):
        return jax.jvp(lambda w, x: jnp.tanh(x @ w), primals, tangents)

    def reference(p, x, tap):
        return jnp.tanh(tap("w", x, x @ p["w"]))

    return {"w": normal(0, 3, 4)}, normal(1, N, 3), lambda p, x: layer(p["w"], x), reference, ()


def sequence():
    """Positions are rows; a bias added through a reshape."""
    params = {"w": normal(0, 3, 4), "b": normal(1, 4)}

    def model(p, x):
        return jnp.tanh(x @ p["w"] + p["b"].reshape(1, 1, 4))

    def reference(p, x, tap):
        return jnp.tanh(tap("w", x, x @ p["w"] + p["b"]))

    return params, normal(2, N, 5, 3), model, reference, {"w"}


def heads():
    """A (d, heads, k) kernel, its (heads, k) bias added after a transpose."""
    params = {"w": normal(0, 3, 2, 4), "b": normal(1, 2, 4)}

    def model(p, x):
        y = jnp.einsum("btd,dhk->bthk", x, p["w"]).transpose(0, 2, 1, 3)
        return jnp.tanh(y + p["b"][None, :, None, :])

    def reference(p, x, tap):
        y = tap("w", x, (x @ p["w"].reshape(3, 8)) + p["b"].reshape(8))
        return jnp.tanh(y.reshape(*x.shape[:2], 2, 4).transpose(0, 2, 1, 3))

    return params, normal(2, N, 5, 3), model, reference, {"w"}


def heads_in():
    """Two contracted axes, as in the output projection of attention."""
    params = {"w": normal(0, 2, 4, 3)}

    def model(p, x):
        return jnp.tanh(jnp.einsum("bthk,hkd->btd", x, p["w"]))

    def reference(p, x, tap):
        flat = x.reshape(*x.shape[:2], 8)
        return jnp.tanh(tap("w", flat, flat @ p["w"].reshape(8, 3)))

    return params, normal(2, N, 3, 2, 4), model, reference, ()


def weight_left():
    """`W x` on columns, the bias a column."""
    params = {"w": normal(0, 4, 3), "b": normal(1, 4)}

    def model(p, x):
        return jnp.tanh(p["w"] @ x.T + p["b"][:, None]).T

    def reference(p, x, tap):
        return jnp.tanh(tap("w", x, x @ p["w"].T + p["b"]))

    return params, normal(2, N, 3), model, reference, {"w"}


def transposed():
    params = {"w": normal(0, 4, 3)}

    def reference(p, x, tap):
        return jnp.tanh(tap("w", x, x @ p["w"].T))

    return params, normal(1, N, 3), lambda p, x: jnp.tanh(x @ p["w"].T), reference, ()


def vmapped():
    """Equinox's style: a single-example `W x + b` under vmap."""
    params = {"w": normal(0, 4, 3), "b": normal(1, 4)}

    def model(p, x):
        return jax.vmap(lambda v: jnp.tanh(p["w"] @ v + p["b"]))(x)

    def reference(p, x, tap):
        return jnp.tanh(tap("w", x, x @ p["w"].T + p["b"]))

    return params, normal(2, N, 3), model, reference, {"w"}


def joined():
    """Kernels and biases of two gates, concatenated into one operand: columns of one block."""
    params = {"w": normal(0, 3, 2), "v": normal(1, 3, 4), "b": normal(2, 2), "c": normal(3, 4)}

    def both(p):
        return jnp.concatenate([p["w"], p["v"]], 1), jnp.concatenate([p["b"], p["c"]])

    def model(p, x):
        kernel, bias = both(p)
        return jnp.tanh(x @ kernel + bias)

    def reference(p, x, tap):
        kernel, bias = both(p)
        return jnp.tanh(tap("{w,v}", x, x @ kernel + bias))

    return params, normal(4, N, 3), model, reference, {"{w,v}"}


def joined_rows():
    """A kernel stacked from the rows of one leaf and the columns of another, then transposed."""
    params = {"w": normal(0, 2, 3), "v": normal(1, 3, 2)}

    def kernel(p):
        return jnp.concatenate([p["w"], p["v"].T], 0)

    def model(p, x):
        return jnp.tanh(jnp.einsum("nti,oi->nto", x, kernel(p).T))

    def reference(p, x, tap):
        return jnp.tanh(tap("{w,v}", x, x @ kernel(p)))

    return params, normal(2, N, 5, 4), model, reference, ()


def stacked_in_the_model():
    """Layers kept apart and stacked to be scanned."""
    params = {"u": normal(0, 3, 3), "v": normal(1, 3, 3)}

    def model(p, x):
        step = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
        return jax.lax.scan(step, x, jnp.stack([p["u"], p["v"]]))[0]

    def reference(p, x, tap):
        for i, name in enumerate("uv"):
            x = jnp.tanh(tap(f"{{u,v}}@{i}", x, x @ p[name]))
        return x

    return params, normal(2, N, 3), model, reference, ()


def one_vector():
    """All parameters in one vector, as `ravel_pytree` makes it: a weight, its bias, a weight."""
    params = {"all": normal(0, 12 + 4 + 8)}

    def parts(p):
        w, b, v = jnp.split(p["all"], [12, 16])
        return w.reshape(3, 4), b, v.reshape(4, 2)

    def model(p, x):
        w, b, v = parts(p)
        return jnp.tanh(x @ w + b) @ v

    def reference(p, x, tap):
        w, b, v = parts(p)
        return tap("all#1", h := jnp.tanh(tap("all#0", x, x @ w + b)), h @ v)

    return params, normal(2, N, 3), model, reference, {"all#0"}


def straight_through():
    """A weight rounded, with the gradient of the identity; and `1 - w`."""
    params = {"w": normal(0, 3, 4), "v": normal(1, 4, 2)}

    def quantised(w):
        return w + jax.lax.stop_gradient(jnp.round(4 * w) / 4 - w)

    def model(p, x):
        return jnp.tanh(jnp.tanh(x @ quantised(p["w"])) @ (1 - p["v"]))

    def reference(p, x, tap):
        h = jnp.tanh(tap("w", x, x @ quantised(p["w"])))
        return jnp.tanh(tap("v", -h, h @ (1 - p["v"])))

    return params, normal(2, N, 3), model, reference, ()


def constrained():
    """Sharding constraints on weight and product, as partitioned models have them."""
    params = {"w": normal(0, 3, 4), "b": normal(1, 4)}

    def model(p, x):
        mesh = jax.sharding.Mesh(jax.devices()[:1], "d")
        spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "d"))
        w = jax.lax.with_sharding_constraint(p["w"], spec)
        return jnp.tanh(jax.lax.with_sharding_constraint(x @ w, spec) + p["b"])

    def reference(p, x, tap):
        return jnp.tanh(tap("w", x, x @ p["w"] + p["b"]))

    return params, normal(2, N, 3), model, reference, {"w"}


def reshaped():
    """A flat parameter vector."""
    params = {"w": normal(0, 12)}

    def reference(p, x, tap):
        return jnp.tanh(tap("w", x, x @ p["w"].reshape(3, 4)))

    return params, normal(1, N, 3), lambda p, x: jnp.tanh(x @ p["w"].reshape(3, 4)), reference, ()


def fused():
    """One kernel and one bias cut in two: two layers."""
    params = {"w": normal(0, 3, 8), "b": normal(1, 8)}

    def model(p, x):
        w, v = jnp.split(p["w"], 2, axis=1)
        return jnp.tanh(x @ w + p["b"][:4]) * (x @ v + p["b"][4:])

    def reference(p, x, tap):
        first = tap("w#0", x, x @ p["w"][:, :4] + p["b"][:4])
        return jnp.tanh(first) * tap("w#1", x, x @ p["w"][:, 4:] + p["b"][4:])

    return params, normal(2, N, 3), model, reference, {"w#0", "w#1"}


def shared():
    """One weight used twice: one block, pooled."""
    params = {"w": normal(0, 3, 3) / 2, "b": normal(1, 3)}

    def layers(p, x, tap=same):
        h = jnp.tanh(tap("w", x, x @ p["w"] + p["b"]))
        return tap("w", h, h @ p["w"] + p["b"])

    return params, normal(2, N, 3), lambda p, x: layers(p, x), layers, {"w"}


def recurrent():
    """A weight that is constant over a scan: one block, summed over time."""
    params = {"w": normal(0, 3, 3) / 2, "u": normal(1, 2, 3), "b": normal(2, 3)}

    def cell(p, h, x, tap=same):
        return jnp.tanh(tap("w", h, h @ p["w"] + p["b"]) + tap("u", x, x @ p["u"]))

    def model(p, x):
        def step(h, x):
            h = cell(p, h, x)
            return h, h

        return jax.lax.scan(step, jnp.zeros((len(x), 3)), x.swapaxes(0, 1))[1].swapaxes(0, 1)

    def reference(p, x, tap):
        h, hs = jnp.zeros((len(x), 3)), []
        for t in range(x.shape[1]):
            h = cell(p, h, x[:, t], tap)
            hs.append(h)
        return jnp.stack(hs, 1)

    return params, normal(3, N, 4, 2), model, reference, {"w"}


def scaled():
    """Equalised learning rate: the weight times a constant, without a bias."""

    def reference(p, x, tap):
        return jnp.tanh(tap("w", x * 0.5, (x * 0.5) @ p["w"]))

    return (
        {"w": normal(0, 3, 4)},
        normal(2, N, 3),
        lambda p, x: jnp.tanh(x @ (p["w"] * 0.5)),
        reference,
        (),
    )


def experts():
    """A weight and bias with a batch axis shared with the data: one factor pair for each expert."""
    params = {"w": normal(0, 2, 3, 4), "b": normal(1, 2, 4)}

    def model(p, x):
        return jnp.tanh(jnp.einsum("ntei,eio->nteo", x, p["w"]) + p["b"])

    def reference(p, x, tap):
        ys = [tap(f"w@{e}", x[:, :, e], x[:, :, e] @ p["w"][e] + p["b"][e]) for e in range(2)]
        return jnp.tanh(jnp.stack(ys, 2))

    return params, normal(2, N, 5, 2, 3), model, reference, {"w@0", "w@1"}


def ensemble():
    """vmap over weights and not over data: one layer with more outputs."""
    params = {"w": normal(0, 2, 3, 4)}

    def model(p, x):
        return jax.vmap(lambda w: jnp.tanh(x @ w))(p["w"]).swapaxes(0, 1)

    def reference(p, x, tap):
        y = tap("w", x, x @ p["w"].swapaxes(0, 1).reshape(3, 8))
        return jnp.tanh(y.reshape(N, 2, 4))

    return params, normal(2, N, 3), model, reference, ()


def conv(spatial, window, strides, padding, *, groups=1, dilate=None, spread=None, order="NHWC"):
    """A convolution; the reference makes patches by slicing the padded, dilated input."""
    dims = len(spatial)
    dilate, spread = dilate or (1,) * dims, spread or (1,) * dims
    c_in, c_out = 2 * groups, 3 * groups
    params = {"w": normal(0, *window, c_in // groups, c_out), "b": normal(1, c_out)}
    letters = "DHW"[3 - dims :]
    layouts = {
        "NHWC": (f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        "NCHW": (f"NC{letters}", f"OI{letters}", f"NC{letters}"),
    }[order]
    numbers = jax.lax.conv_dimension_numbers((1,) * (dims + 2), (1,) * (dims + 2), layouts)
    first = order == "NCHW"

    def model(p, x):
        w = p["w"].transpose(dims + 1, dims, *range(dims)) if first else p["w"]
        x = jnp.moveaxis(x, -1, 1) if first else x
        y = jax.lax.conv_general_dilated(
            x, w, strides, padding, spread, dilate, numbers, feature_group_count=groups
        )
        b = p["b"].reshape(-1, *[1] * dims) if first else p["b"]
        y = jnp.tanh(y + b)
        return jnp.moveaxis(y, 1, -1) if first else y

    def patches(x):
        for axis in range(dims):
            if spread[axis] > 1:
                size = (x.shape[1 + axis] - 1) * spread[axis] + 1
                shape = list(x.shape)
                shape[1 + axis] = size
                every = [slice(None)] * x.ndim
                every[1 + axis] = slice(None, None, spread[axis])
                x = jnp.zeros(shape).at[tuple(every)].set(x)
        x = jnp.pad(x, [(0, 0), *padding, (0, 0)])
        reach = [(k - 1) * d + 1 for k, d in zip(window, dilate, strict=True)]
        out = [(n - r) // s + 1 for n, r, s in zip(x.shape[1:-1], reach, strides, strict=True)]
        parts = []
        for offset in np.ndindex(*window):
            cut = [
                slice(o * d, o * d + (n - 1) * s + 1, s)
                for o, d, n, s in zip(offset, dilate, out, strides, strict=True)
            ]
            parts.append(x[(slice(None), *cut)])
        return jnp.stack(parts, -1)  # (n, *out, channels, window entries)

    def reference(p, x, tap):
        ys, all_patches = [], patches(x)
        for g in range(groups):
            mine = all_patches[..., 2 * g : 2 * g + 2, :]
            a = mine.reshape(*mine.shape[:-2], -1)
            w = p["w"][..., 3 * g : 3 * g + 3]
            w = jnp.moveaxis(w, dims, 0).reshape(-1, 3)
            name = f"w@{g}" if groups > 1 else "w"
            ys.append(tap(name, a, a @ w + p["b"][3 * g : 3 * g + 3]))
        return jnp.tanh(jnp.concatenate(ys, -1))

    biased = {f"w@{g}" for g in range(groups)} if groups > 1 else {"w"}
    return params, normal(2, N, *spatial, c_in), model, reference, biased


def transposed_conv():
    """`jax.lax.conv_transpose` with its flipped kernel."""
    params = {"w": normal(0, 3, 3, 2)}

    def model(p, x):
        return jnp.tanh(
            jax.lax.conv_transpose(
                x, p["w"], (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"),
                transpose_kernel=True,
            )
        )  # fmt: skip

    def reference(p, x, tap):
        # kernel (width, out, in), flipped in space: y[t] = sum_k spread(x)[t + k - 2] w[2 - k]
        spread = jnp.zeros((N, 2 * x.shape[1] - 1, 2)).at[:, ::2].set(x)
        spread = jnp.pad(spread, [(0, 0), (2, 2), (0, 0)])
        width = spread.shape[1] - 2
        a = jnp.stack([spread[:, k : k + width] for k in range(3)], -1)
        a = a.reshape(N, width, -1)
        w = p["w"][::-1].transpose(2, 0, 1).reshape(-1, 3)
        return jnp.tanh(tap("w", a, a @ w))

    return params, normal(1, N, 4, 2), model, reference, ()


LOOKUPS = {
    "array": lambda w, x: w[x],
    "one-hot": lambda w, x: jax.nn.one_hot(x, 7, dtype=float) @ w,
    "token by token": lambda w, x: jax.vmap(jax.vmap(lambda token: w[token]))(x),
    "dynamic slice": lambda w, x: jax.vmap(
        jax.vmap(lambda token: jax.lax.dynamic_index_in_dim(w, token, keepdims=False))
    )(x),
}


def embedding(lookup="array"):
    """A table looked up; some tokens repeat within an example, some never occur."""
    params = {"w": normal(0, 7, 3)}
    tokens = jax.random.randint(jax.random.key(1), (N, 4), 0, 5)

    def model(p, x):
        return jnp.tanh(LOOKUPS[lookup](p["w"], x))

    def reference(p, x, tap):
        a = jnp.eye(7)[x]
        return jnp.tanh(tap("w", a, a @ p["w"]))

    return params, tokens, model, reference, ()


CASES = {
    "plain": mlp,
    "jit": functools.partial(mlp, jax.jit),
    "nested jit": functools.partial(mlp, lambda f: jax.jit(jax.jit(f))),
    "remat": functools.partial(mlp, jax.checkpoint),
    "remat with a policy": functools.partial(
        mlp, functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    ),
    "in custom_jvp": in_custom_jvp,
    "sequence": sequence,
    "heads": heads,
    "heads in": heads_in,
    "weight on the left": weight_left,
    "transposed": transposed,
    "vmapped": vmapped,
    "joined": joined,
    "joined rows": joined_rows,
    "stacked in the model": stacked_in_the_model,
    "one vector": one_vector,
    "straight-through": straight_through,
    "sharding constraints": constrained,
    "reshaped": reshaped,
    "fused": fused,
    "shared": shared,
    "recurrent": recurrent,
    "scaled": scaled,
    "experts": experts,
    "ensemble": ensemble,
    "conv 2d same": lambda: conv((5, 4), (3, 3), (1, 1), [(1, 1), (1, 1)]),
    "conv 2d strided": lambda: conv((6, 5), (3, 2), (2, 2), [(0, 1), (0, 0)]),
    "conv 2d dilated": lambda: conv((7, 6), (3, 2), (1, 1), [(0, 0), (1, 0)], dilate=(2, 3)),
    "conv 2d spread": lambda: conv((3, 3), (3, 3), (1, 1), [(1, 2), (2, 1)], spread=(2, 2)),
    "conv 2d channels first": lambda: conv((5, 4), (3, 3), (1, 1), [(1, 1), (1, 1)], order="NCHW"),
    "conv 2d grouped": lambda: conv((4, 4), (3, 3), (1, 1), [(1, 1), (1, 1)], groups=2),
    "conv 1d": lambda: conv((7,), (3,), (2,), [(1, 1)]),
    "conv 3d": lambda: conv((3, 3, 2), (2, 2, 2), (1, 1, 1), [(0, 0), (1, 0), (0, 0)]),
    "conv transposed": transposed_conv,
    "embedding": embedding,
    "embedding one-hot": lambda: embedding("one-hot"),
    "embedding token by token": lambda: embedding("token by token"),
    "embedding by slices": lambda: embedding("dynamic slice"),
}


# Elementwise parameters: (params, x, model).


def norm(train=True):
    """Batch normalisation: the scale meets `rsqrt(variance)`, which has no batch axis, first."""
    params = {"scale": normal(0, 3) + 1, "offset": normal(1, 3)}

    def model(p, x):
        mean, variance = (x.mean((0, 1)), x.var((0, 1))) if train else (0.1, jnp.full(3, 2.0))
        factor = jax.lax.rsqrt(variance + 1e-5).reshape(1, 1, 3) * p["scale"].reshape(1, 1, 3)
        y = (x - mean) * factor + p["offset"].reshape(1, 1, 3)
        return jnp.tanh(y)

    return params, normal(2, N, 4, 3), model


def layer_norm():
    params = {"scale": normal(0, 3), "offset": normal(1, 3)}

    def model(p, x):
        x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True))
        return jnp.tanh(x * (1 + p["scale"]) + p["offset"])

    return params, normal(2, N, 4, 3), model


def slopes():
    """PReLU, a temperature on the log scale, a sigmoid gate."""
    params = {"slope": normal(0, 3), "temperature": normal(1), "gate": normal(2, 4, 1)}

    def model(p, x):
        x = jnp.where(x > 0, x, x * p["slope"]) / jnp.exp(p["temperature"])
        return x * jax.nn.sigmoid(p["gate"])

    return params, normal(3, N, 4, 3), model


def tokens():
    """A class token joined in front, a positional table of which a part is used."""
    params = {"token": normal(0, 1, 3), "table": normal(1, 5, 3)}

    def model(p, x):
        token = jnp.broadcast_to(p["token"], (x.shape[0], 1, 3))
        return jnp.tanh(jnp.concatenate([token, x], axis=1) + p["table"][jnp.arange(5)])

    return params, normal(2, N, 4, 3), model


def initial_state():
    params = {"h": normal(0, 3)}

    def model(p, x):
        def step(h, x):
            h = jnp.tanh(0.5 * h + x)
            return h, h

        start = jnp.broadcast_to(p["h"], (x.shape[0], 3))
        return jax.lax.scan(step, start, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    return params, normal(1, N, 4, 3), model


def shared_offset():
    """One offset added in two places, one of them in every step of a scan."""
    params = {"b": normal(0, 3)}

    def model(p, x):
        def step(h, x):
            return jnp.tanh(h + x + p["b"]), None

        return jax.lax.scan(step, x[:, 0] + p["b"], x.swapaxes(0, 1))[0]

    return params, normal(1, N, 4, 3), model


CURVED = {
    "twice exp": lambda g: 2 * jnp.exp(g),
    "minus exp": lambda g: -jnp.exp(g),
    "exp plus one": lambda g: 1 + jnp.exp(g),
    "picked": lambda g: jnp.exp(g)[jnp.arange(3)],
    "split": lambda g: jnp.concatenate(jnp.split(jnp.exp(2 * g), [1])[::-1])[::-1],
}


def curved(function):
    """A scale that is a function of the parameter, moved or scaled after that."""
    params = {"g": normal(0, 3)}
    return params, normal(1, N, 4, 3), lambda p, x: jnp.tanh(x * CURVED[function](p["g"]))


ELEMENTWISE = {
    **{name: functools.partial(curved, name) for name in CURVED if name != "split"},
    "batch norm": norm,
    "batch norm in evaluation": lambda: norm(train=False),
    "layer norm": layer_norm,
    "slopes": slopes,
    "tokens": tokens,
    "initial state": initial_state,
    "shared offset": shared_offset,
}
