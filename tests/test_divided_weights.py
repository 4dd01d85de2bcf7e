"""Weights that are divided over devices in a `shard_map`: parts are copies, gathered ones whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from jax.sharding import Mesh, PartitionSpec

import curvature

P = PartitionSpec
X, Y = normal(0, 8, 3), normal(1, 8, 2)
KINDS = ("kronecker", "ekfac", "dense")


def mesh(*shape, names=("data", "model")):
    return Mesh(np.array(jax.devices()).reshape(shape), names)


def operator(loss_fn, params, block, x=X, y=Y):
    registry = curvature.register(loss_fn, params, x, y).with_blocks(block)
    estimate = jax.jit(curvature.Estimator(registry, curvature.EmpiricalFisher()))
    return registry, estimate(params, x, y)


def matrix(op, params, name):
    zero = jax.tree.map(jnp.zeros_like, params)
    eye = jnp.eye(params[name].size).reshape(-1, *params[name].shape)
    return jax.jit(jax.vmap(lambda e: (op @ (zero | {name: e}))[name].ravel()))(eye)


def check_same(one, other, params, block, x=X, y=Y):
    """Two losses have the same blocks."""
    (first, found), (second, expected) = (operator(f, params, block, x, y) for f in (one, other))
    assert first.coverage == second.coverage == 1, str(first)
    for name in params:
        np.testing.assert_allclose(
            matrix(found, params, name), matrix(expected, params, name), rtol=1e-9, atol=1e-12
        )
    return first


# Fully sharded: gathered where they are used --------------------------------------------------

WHOLE = {"w": normal(2, 3, 4), "b": normal(3, 4), "v": normal(4, 4, 2)}


def whole(p, x, y):
    h = jnp.tanh(x @ p["w"] + p["b"])
    return curvature.losses.squared_error(h @ p["v"], y).sum(-1).mean()


@pytest.mark.parametrize(
    ("block", "check_vma"), [("kronecker", False), ("ekfac", True), ("dense", True)]
)
def test_gathered_weights_are_whole(block, check_vma):
    """FSDP by hand: parameters are divided over the batch's axis, and gathered in the loss."""

    def local(p, x, y):
        gathered = {
            "w": jax.lax.all_gather(p["w"], "data", axis=1, tiled=True),
            "b": jax.lax.all_gather(p["b"], "data", axis=0, tiled=True),
            "v": jax.lax.all_gather(p["v"], "data", axis=0).reshape(4, 2),
        }
        return jax.lax.pmean(whole(gathered, x, y), "data")

    specs = {"w": P(None, "data"), "b": P("data"), "v": P("data")}
    loss_fn = jax.shard_map(
        local,
        mesh=mesh(2, 2),
        in_specs=(specs, P("data"), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    registry = check_same(loss_fn, whole, WHOLE, block)
    assert {layer.stack for layer in registry.layers} == {()}


# Tensor parallel: every part a copy -----------------------------------------------------------


def parts(p, x, y):
    """Two columns of the first weight and two rows of the second at a time."""
    out = 0.0
    for i in range(2):
        w, b, v = p["w"][:, 2 * i : 2 * i + 2], p["b"][2 * i : 2 * i + 2], p["v"][2 * i : 2 * i + 2]
        out = out + jnp.tanh(x @ w + b) @ v
    return curvature.losses.squared_error(out, y).sum(-1).mean()


@pytest.mark.parametrize("block", KINDS)
def test_parts_of_weights_are_copies(block):
    """Tensor parallelism: columns, then rows, and a sum over devices."""

    def local(p, x, y):
        h = jnp.tanh(x @ p["w"] + p["b"])
        z = jax.lax.psum(h @ p["v"], "model")
        return jax.lax.pmean(curvature.losses.squared_error(z, y).sum(-1).mean(), "data")

    specs = {"w": P(None, "model"), "b": P("model"), "v": P("model")}
    loss_fn = jax.shard_map(
        local, mesh=mesh(2, 2), in_specs=(specs, P("data"), P("data")), out_specs=P()
    )
    registry = check_same(loss_fn, parts, WHOLE, block)
    assert {layer.stack for layer in registry.layers} == {(2,)}


# Experts --------------------------------------------------------------------------------------

EXPERTS = {"up": normal(2, 4, 3, 5), "down": normal(3, 4, 5, 2)}


def experts(p, x, y):
    """Example n is expert n // 2's."""
    h = jnp.tanh(jnp.einsum("eni,eio->eno", x.reshape(4, 2, 3), p["up"]))
    z = jnp.einsum("eno,eok->enk", h, p["down"]).reshape(8, 2)
    return curvature.losses.squared_error(z, y).sum(-1).mean()


def divided(ragged=False):
    """The same loss, two of the four experts and their examples on each of two devices."""

    def local(p, x, y):
        if ragged:
            sizes = jnp.array([2, 2])
            h = jnp.tanh(jax.lax.ragged_dot(x, p["up"], sizes))
            z = jax.lax.ragged_dot(h, p["down"], sizes)
        else:
            h = jnp.tanh(jnp.einsum("eni,eio->eno", x.reshape(2, 2, 3), p["up"]))
            z = jnp.einsum("eno,eok->enk", h, p["down"]).reshape(4, 2)
        losses = curvature.losses.squared_error(z, y).sum(-1)
        return jax.lax.pmean(losses.mean(), "data")

    return jax.shard_map(
        local,
        mesh=mesh(2, 2),
        in_specs=({"up": P("data"), "down": P("data")}, P("data"), P("data")),
        out_specs=P(),
    )


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("block", ["kronecker", "kronecker_weighted"])
def test_experts_are_divided(block, ragged):
    """Each of two devices has two of four experts, and their examples."""
    registry = check_same(divided(ragged), experts, EXPERTS, block)
    assert {layer.stack for layer in registry.layers} == {(2, 2)}


def test_divided_weights_of_scanned_layers():
    """A scan over layers, each a shard_map with divided weights."""
    params = {"w": normal(2, 3, 4, 4) / 2, "head": normal(3, 4, 2)}
    x = normal(0, 8, 4)

    def layer(w, h):
        return jax.lax.all_gather(jnp.tanh(h @ w), "model", axis=1, tiled=True)

    many = jax.shard_map(
        layer,
        mesh=mesh(2, 2),
        in_specs=(P(None, "model"), P("data")),
        out_specs=P("data"),
        check_vma=False,
    )

    def parallel(p, x, y):
        h = jax.lax.scan(lambda h, w: (many(w, h), None), x, p["w"])[0]
        return curvature.losses.squared_error(h @ p["head"], y).sum(-1).mean()

    def plain(p, x, y):
        def one(h, w):
            return jnp.concatenate([jnp.tanh(h @ w[:, :2]), jnp.tanh(h @ w[:, 2:])], 1), None

        h = jax.lax.scan(one, x, p["w"])[0]
        return curvature.losses.squared_error(h @ p["head"], y).sum(-1).mean()

    check_same(parallel, plain, params, "kronecker", x)


def test_a_step_with_divided_weights():
    """K-FAC steps on experts of two devices as on one."""
    updates = []
    for f in (divided(), experts):
        registry = curvature.register(f, EXPERTS, X, Y)
        tx = curvature.kfac(registry, 0.1, kind=curvature.EmpiricalFisher())

        @jax.jit
        def step(params, state, f=f, tx=tx):
            grads = jax.grad(f)(params, X, Y)
            return tx.update(grads, state, params, loss_args=(X, Y))[0]

        updates.append(step(EXPERTS, tx.init(EXPERTS)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-10), *updates)
