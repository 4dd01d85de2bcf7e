"""Models on meshes: each loss as written for one device, or with shardings spelt out.

A case is a function from the mesh to `(loss_fn, params, args, divided)`, with `divided` the
partition specs of params and args. The same loss with whole arrays on one device is the reference;
where a loss spells shardings out, `mesh=None` gives the loss without them.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from cases import normal
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import curvature

P = PartitionSpec
MODES = ("auto", "explicit", "explicit, set")
N = 8


def make_mesh(mode):
    """2 x 2 devices, `data` and `model`, as `jax.make_mesh` makes them: explicit."""
    kind = AxisType.Auto if mode == "auto" else AxisType.Explicit
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    return jax.sharding.Mesh(devices, ("data", "model"), axis_types=(kind,) * 2)


def entered(mode, mesh):
    return jax.set_mesh(mesh) if mode.endswith("set") else contextlib.nullcontext()


def put(mesh, tree, specs):
    """A tree on the mesh; `specs` is a prefix of it."""
    specs = jax.tree.map(
        lambda spec, part: jax.tree.map(lambda _: NamedSharding(mesh, spec), part),
        specs,
        tree,
        is_leaf=lambda x: isinstance(x, P),
    )
    return jax.device_put(tree, specs)


DATA = P("data")


def mlp(mesh):
    """Dense layers with biases, a gain, one that is shared over time, and a generic parameter."""
    params = {
        "w": normal(2, 3, 4),
        "b": normal(3, 4),
        "gain": normal(4, 4),
        "again": normal(5, 4, 4),
        "head": normal(6, 4, 2),
        "odd": normal(7, 2),
    }

    def loss_fn(p, x, y):
        h = jnp.tanh(x @ p["w"] + p["b"]) * p["gain"]
        h = jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["again"]), None), h, None, length=2)[0]
        return curvature.losses.l2_loss(h @ p["head"] + jnp.cumsum(p["odd"]), y).mean()

    return loss_fn, params, (normal(0, N, 3), normal(1, N, 2)), (P(), (DATA, DATA))


def scanned(mesh):
    """A stack of residual blocks with remat inside and a loss in chunks of positions."""
    params = {
        "stack": {"up": normal(1, 3, 4, 6), "b": normal(2, 3, 6), "down": normal(3, 3, 6, 4)},
        "head": normal(4, 4, 5),
    }

    def loss_fn(p, x, y):
        @jax.checkpoint
        def block(h, w):
            return h + jnp.tanh(h @ w["up"] + w["b"]) @ w["down"], None

        h, _ = jax.lax.scan(block, x, p["stack"])

        def chunk(total, part):
            h, y = part
            z = h @ p["head"]
            return total + curvature.losses.softmax_cross_entropy(z, y).sum(), None

        parts = [jnp.moveaxis(a, 1, 0) for a in (h, y)]
        return jax.lax.scan(chunk, jnp.zeros(()), tuple(parts))[0] / N

    y = jax.nn.softmax(normal(5, N, 3, 5))
    return loss_fn, params, (normal(0, N, 3, 4), y), (P(), (DATA, DATA))


def masked(mesh):
    """Positions without weight, and integer labels."""
    params = {"w": normal(1, 3, 4), "head": normal(2, 4, 5)}

    def loss_fn(p, x, y, mask):
        z = jnp.tanh(x @ p["w"]) @ p["head"]
        one_hot = jax.nn.one_hot(y, 5, dtype=z.dtype)
        losses = curvature.losses.softmax_cross_entropy(z, one_hot)
        return (losses * mask).sum() / N

    mask = (jnp.arange(3) < jnp.array([3, 2, 1, 3, 1, 2, 3, 2])[:, None]).astype(float)
    y = jax.random.randint(jax.random.key(3), (N, 3), 0, 5)
    return loss_fn, params, (normal(0, N, 3, 3), y, mask), (P(), (DATA, DATA, DATA))


def convolution(mesh):
    params = {"kernel": normal(1, 3, 3, 2, 4), "bias": normal(2, 4), "head": normal(3, 4, 3)}

    def loss_fn(p, x, y):
        h = jax.lax.conv_general_dilated(
            x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        h = jax.nn.relu(h + p["bias"]).mean((1, 2))
        return curvature.losses.l2_loss(h @ p["head"], y).mean()

    return loss_fn, params, (normal(0, N, 4, 4, 2), normal(4, N, 3)), (P(), (DATA, DATA))


def sharded_parameters(mesh):
    """Each weight divided over the axis `model` (FSDP): gathered where it is used."""
    params = {"w": normal(1, 4, 6), "b": normal(2, 6), "head": normal(3, 6, 2)}

    def whole(w):
        explicit = mesh is not None and AxisType.Explicit in mesh.axis_types
        return jax.reshard(w, NamedSharding(mesh, P())) if explicit else w

    def loss_fn(p, x, y):
        h = jnp.tanh(x @ whole(p["w"]) + whole(p["b"]))
        return curvature.losses.l2_loss(h @ whole(p["head"]), y).mean()

    specs = {"w": P("model"), "b": P("model"), "head": P("model", None)}
    return loss_fn, params, (normal(0, N, 4), normal(4, N, 2)), (specs, (DATA, DATA))


def tensor_parallel(mesh):
    """Columns, then rows, of two weights over `model`; the product is told how to come out."""
    params = {
        "table": normal(5, 7, 4),
        "up": normal(1, 4, 6),
        "b": normal(2, 6),
        "down": normal(3, 6, 4),
    }
    explicit = mesh is not None and AxisType.Explicit in mesh.axis_types
    out = {"out_sharding": NamedSharding(mesh, P("data", None))} if explicit else {}

    def loss_fn(p, x, y):
        h = p["table"].at[x].get(**out)
        up = jnp.tanh(jnp.einsum("nd,df->nf", h, p["up"]) + p["b"])
        z = h + jnp.einsum("nf,fd->nd", up, p["down"], **out)
        return curvature.losses.l2_loss(z, y).mean()

    x = jax.random.randint(jax.random.key(6), (N,), 0, 7)
    specs = {"table": P(), "up": P(None, "model"), "b": P("model"), "down": P("model", None)}
    return loss_fn, params, (x, normal(4, N, 4)), (specs, (DATA, DATA))


CASES = {
    f.__name__: f for f in (mlp, scanned, masked, convolution, sharded_parameters, tensor_parallel)
}
