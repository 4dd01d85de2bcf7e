"""Losses, and dense brute force for the operators of them, in float64.

A case gives the same loss twice: `tagged(module)` is written as models are (scans, remat, jit,
cond, tied weights); `outputs` and `losses` are plain: all network outputs, and each head's values
with their weights. Dense Jacobians, Hessians and per-example gradients are taken of the plain one.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cases import normal
from jax.flatten_util import ravel_pytree

import curvature
from curvature import operators

N = 5
SOFTMAX = "softmax_cross_entropy_with_integer_labels"


@dataclasses.dataclass(frozen=True)
class Case:
    params: Any
    args: Callable[[int, int], tuple]  # (seed, number of examples) -> args
    tagged: Callable  # module of losses -> loss_fn(params, *args)
    outputs: Callable  # (params, *args) -> list of z, examples leading
    losses: Callable  # (list of z, *args) -> list of (values, weights), from optax

    def total(self, zs, *args):
        return sum(jnp.sum(values * weights) for values, weights in self.losses(zs, *args))


def mlp():
    """Dense layers; a weighted mean with some weights zero."""
    params = {"w": normal(0, 3, 4), "b": normal(1, 4), "v": normal(2, 4, 3)}

    def outputs(p, x, y, m):
        return [jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]]

    def args(seed, n):
        mask = jnp.where(jnp.arange(n) % 3 != 1, jnp.linspace(0.5, 2, n), 0)
        return normal(seed, n, 3), jnp.arange(n) % 3, mask

    def tagged(module):
        def loss_fn(p, x, y, m):
            return (m * getattr(module, SOFTMAX)(*outputs(p, x, y, m), y)).mean()

        return loss_fn

    def losses(zs, x, y, m):
        return [(getattr(optax.losses, SOFTMAX)(zs[0], y), m / len(m))]

    return Case(params, args, tagged, outputs, losses)


def conv():
    """A convolution with a squared error at every pixel and channel, summed over them."""
    params = {"k": normal(0, 3, 2, 2), "v": normal(1, 2, 1)}

    conv_dims = ("NWC", "WIO", "NWC")

    def outputs(p, x, y):
        h = jax.lax.conv_general_dilated(x, p["k"], (1,), "SAME", dimension_numbers=conv_dims)
        return [jax.nn.sigmoid(h) @ p["v"]]

    def tagged(module):
        def loss_fn(p, x, y):
            values = module.squared_error(*outputs(p, x, y), y)
            return values.sum(axis=(1, 2)).mean() + 0.1 * jnp.sum(p["v"] ** 2), {"aux": values}

        return loss_fn

    def losses(zs, x, y):
        return [(optax.losses.squared_error(zs[0], y), jnp.full((), 1 / len(x)))]

    def args(seed, n):
        return normal(seed, n, 4, 2), normal(seed + 1, n, 4, 1)

    return Case(params, args, tagged, outputs, losses)


def chunked():
    """A recurrent net with its loss in the scan, in remat, in jit; the head is tied."""
    params = {"w": normal(0, 3, 2), "u": normal(1, 2, 2)}
    length = 3

    def step(p, h, x):
        h = jnp.tanh(x @ p["w"] + h @ p["u"])
        return h, h @ p["w"].T

    def outputs(p, x, y):  # [n, t, 3]
        h, zs = jnp.zeros((len(x), 2)), []
        for t in range(length):
            h, z = step(p, h, x[:, t])
            zs.append(z)
        return [jnp.stack(zs, axis=1)]

    def tagged(module):
        def loss_fn(p, x, y):
            @jax.checkpoint
            def one(carry, xs):
                h, total = carry
                x, y = xs
                h, z = step(p, h, x)
                values = jax.jit(lambda z, y: getattr(module, SOFTMAX)(z, y))(z, y)
                return (h, total + values.sum()), None

            start = (jnp.zeros((len(x), 2)), jnp.zeros(()))
            (_, total), _ = jax.lax.scan(one, start, (x.swapaxes(0, 1), y.T))
            return total / len(x)

        return loss_fn

    def losses(zs, x, y):
        return [(getattr(optax.losses, SOFTMAX)(zs[0], y), jnp.full((), 1 / len(x)))]

    def args(seed, n):
        return normal(seed, n, length, 3), jnp.arange(n * length).reshape(n, length) % 3

    return Case(params, args, tagged, outputs, losses)


def heads():
    """Two heads with coefficients, one of them chosen by a cond, behind a shared trunk."""
    params = {"w": normal(0, 2, 3), "a": normal(1, 3, 2), "b": normal(2, 3)}

    def outputs(p, x, y, t, which):
        h = jnp.sin(x @ p["w"])
        return [h @ p["a"], h @ p["b"]]

    def tagged(module):
        def loss_fn(p, x, y, t, which):
            z, s = outputs(p, x, y, t, which)
            first = getattr(module, SOFTMAX)(z, y).mean()
            second = jax.lax.cond(
                which,
                lambda s: module.sigmoid_binary_cross_entropy(s, t).mean(),
                lambda s: module.l2_loss(s[:, None], t[:, None]).sum(),
                s,
            )
            return first + 0.3 * second

        return loss_fn

    def losses(zs, x, y, t, which):
        sigmoid = optax.losses.sigmoid_binary_cross_entropy(zs[1], t)
        second = jnp.where(which, sigmoid, optax.losses.l2_loss(zs[1], t))
        weight = jnp.where(which, 0.3 / len(x), 0.3)
        return [
            (getattr(optax.losses, SOFTMAX)(zs[0], y), jnp.full((), 1 / len(x))),
            (second, weight),
        ]

    def args(seed, n):
        return normal(seed, n, 2), jnp.arange(n) % 2, jnp.linspace(0, 1, n), jnp.array(seed % 2 > 0)

    return Case(params, args, tagged, outputs, losses)


CASES = {"mlp": mlp, "conv": conv, "chunked": chunked, "heads": heads}
AUX = ("conv",)


@functools.cache
def setup(name):
    case = CASES[name]()
    return case, case.tagged(curvature.losses), {"has_aux": name in AUX}


def pulled(function, params):
    """`function` of the flat parameters."""
    flat, unravel = ravel_pytree(params)
    return flat, lambda x: function(unravel(x))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """Brute force: J' H J of the plain total loss, sums over examples, the Hessian of the loss."""

    gauss_newton: Any
    empirical_fisher: Any
    hessian: Any


@functools.cache
def brute_force(name, seed=3, n=N):
    """The dense matrices of a case at `case.args(seed, n)`."""
    case, _, aux = setup(name)
    args = case.args(seed, n)

    def scores(p):
        """For each example, the sum of its units' losses times the root of their weights."""
        rows = 0.0
        for values, weights in case.losses(case.outputs(p, *args), *args):
            weighted = values * jax.lax.stop_gradient(jnp.sqrt(weights))
            rows += weighted.reshape(len(values), -1).sum(1)
        return rows

    def loss(p):
        out = case.tagged(optax.losses)(p, *args)
        return out[0] if aux["has_aux"] else out

    _, unravel = ravel_pytree(case.outputs(case.params, *args))
    flat, outputs = pulled(lambda p: ravel_pytree(case.outputs(p, *args))[0], case.params)
    _, rows = pulled(scores, case.params)
    _, value = pulled(loss, case.params)

    @jax.jit
    def all_of_them(flat):
        j, s = jax.jacrev(outputs)(flat), jax.jacrev(rows)(flat)
        h = jax.hessian(lambda z: case.total(unravel(z), *args))(outputs(flat))
        return Dense(j.T @ h @ j, s.T @ s, jax.hessian(value)(flat))

    return all_of_them(flat)


def close(found, expected, tolerance=1e-10):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# Matrices ----------------------------------------------------------------------------------------


def check(name, batches, expected):
    """Operators against {name: dense matrix}."""
    case, loss_fn, aux = setup(name)
    for matrix, want in expected.items():
        op = getattr(operators, matrix)(loss_fn, case.params, batches, **aux)
        close(operators.to_dense(op), want)
