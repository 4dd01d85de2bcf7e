"""Networks in plain JAX: each is `init(key) -> params` and `apply(params, x) -> logits`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

PyTree = Any
FLOAT = jnp.float32


class Network(NamedTuple):
    """`init(key) -> params`, `apply(params, x) -> logits`."""

    init: Callable[[Array], PyTree]
    apply: Callable[[PyTree, Array], Array]


def _dense(key: Array, inputs: int, outputs: int) -> dict[str, Array]:
    kernel = jax.random.normal(key, (inputs, outputs), FLOAT) / inputs**0.5
    return {"kernel": kernel, "bias": jnp.zeros(outputs, FLOAT)}


def _affine(params: dict[str, Array], x: Array) -> Array:
    return x @ params["kernel"] + params["bias"]


def dense(sizes: Sequence[int], linear: int | None = None) -> Network:
    """Dense layers with tanh between them, but for layer `linear`, whose units are its inputs."""

    def init(key: Array) -> PyTree:
        keys = jax.random.split(key, len(sizes) - 1)
        return [_dense(k, *pair) for k, pair in zip(keys, pairwise(sizes), strict=True)]

    def apply(params: PyTree, x: Array) -> Array:
        for position, layer in enumerate(params):
            x = _affine(layer, x)
            if position not in (linear, len(params) - 1):
                x = jnp.tanh(x)
        return x

    return Network(init, apply)


def autoencoder(sizes: Sequence[int]) -> Network:
    """Encoder of these sizes, tanh, with linear code units, and its mirror image."""
    return dense([*sizes, *sizes[-2::-1]], linear=len(sizes) - 2)


def residual_cnn(channels: Sequence[int], classes: int) -> Network:
    """A convolution, a residual block for each change of channels, mean over space, dense layer.

    Blocks halve the resolution. There is no normalisation; the second convolution of a block starts
    small instead.
    """
    pairs = list(pairwise(channels))

    def conv_init(key: Array, window: int, inputs: int, outputs: int, gain: float) -> dict:
        scale = gain * (2 / (window**2 * inputs)) ** 0.5
        kernel = scale * jax.random.normal(key, (window, window, inputs, outputs), FLOAT)
        return {"kernel": kernel, "bias": jnp.zeros(outputs, FLOAT)}

    def init(key: Array) -> PyTree:
        first, last, *keys = jax.random.split(key, 2 + 3 * len(pairs))
        blocks = [
            {
                "first": conv_init(keys[3 * i], 3, inputs, outputs, 1.0),
                "second": conv_init(keys[3 * i + 1], 3, outputs, outputs, 0.3),
                "shortcut": conv_init(keys[3 * i + 2], 1, inputs, outputs, 0.7),
            }
            for i, (inputs, outputs) in enumerate(pairs)
        ]
        stem = conv_init(first, 3, 1, channels[0], 1.0)
        return {"stem": stem, "blocks": blocks, "out": _dense(last, channels[-1], classes)}

    def conv(params: dict[str, Array], x: Array, stride: int = 1) -> Array:
        dimensions = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, params["kernel"], (stride, stride), "SAME", dimension_numbers=dimensions
        )
        return y + params["bias"]

    def apply(params: PyTree, x: Array) -> Array:
        x = jax.nn.relu(conv(params["stem"], x))
        for block in params["blocks"]:
            y = conv(block["second"], jax.nn.relu(conv(block["first"], x, 2)))
            x = jax.nn.relu(y + conv(block["shortcut"], x, 2))
        return _affine(params["out"], x.mean((1, 2)))

    return Network(init, apply)


def transformer(vocabulary: int, context: int, width: int, layers: int, heads: int) -> Network:
    """A causal transformer: layer norms in front, learned positions, an output of its own."""

    def init(key: Array) -> PyTree:
        token, place, last, *keys = jax.random.split(key, 3 + layers)
        return {
            "tokens": 0.1 * jax.random.normal(token, (vocabulary, width), FLOAT),
            "positions": 0.1 * jax.random.normal(place, (context, width), FLOAT),
            "blocks": [_block_init(k, width) for k in keys],
            "norm": _norm_init(width),
            "out": _dense(last, width, vocabulary),
        }

    def apply(params: PyTree, x: Array) -> Array:
        h = params["tokens"][x] + params["positions"]
        for block in params["blocks"]:
            h = h + _attention(block, _norm(block["norm1"], h), heads)
            h = h + _affine(
                block["down"], jax.nn.gelu(_affine(block["up"], _norm(block["norm2"], h)))
            )
        return _affine(params["out"], _norm(params["norm"], h))

    return Network(init, apply)


def _block_init(key: Array, width: int) -> PyTree:
    shapes = {
        **dict.fromkeys(("query", "key", "value", "mix"), (width, width)),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }
    keys = jax.random.split(key, len(shapes))
    layers = {name: _dense(k, *shapes[name]) for name, k in zip(shapes, keys, strict=True)}
    return {**layers, "norm1": _norm_init(width), "norm2": _norm_init(width)}


def _norm_init(width: int) -> dict[str, Array]:
    return {"scale": jnp.ones(width, FLOAT), "shift": jnp.zeros(width, FLOAT)}


def _norm(params: dict[str, Array], x: Array) -> Array:
    return jax.nn.standardize(x, epsilon=1e-5) * params["scale"] + params["shift"]


def _attention(params: PyTree, x: Array, heads: int) -> Array:
    def split(name: str) -> Array:
        return _affine(params[name], x).reshape(*x.shape[:2], heads, -1)

    mixed = jax.nn.dot_product_attention(
        split("query"), split("key"), split("value"), is_causal=True
    )
    return _affine(params["mix"], mixed.reshape(x.shape))
