"""Four nets as newcomers bring them, one in each style, with data and a batch size, untuned.

Each has its loss as its framework's users write it. A run is one compiled loop over steps, so that
a setting is compiled once and run at many rates and from many seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_diabetes, load_digits

import curvature

cross_entropy = curvature.losses.softmax_cross_entropy_with_integer_labels


@dataclasses.dataclass(frozen=True)
class Newcomer:
    """A model, its data, and how it is trained.

    Attributes:
      init: from a seed to (params, model state).
      loss_fn: `loss_fn(params, state, batch, key)`, a loss and the new state.
      data: arrays with examples in front.
      batch_size: examples in a batch.
      evaluate: `evaluate(params, state)`, the loss on all of the data, in training mode.
    """

    init: Callable[[int], tuple[Any, Any]]
    loss_fn: Callable[..., tuple[jax.Array, Any]]
    data: tuple[jax.Array, ...]
    batch_size: int

    def batch(self, key: jax.Array) -> tuple[jax.Array, ...]:
        index = jax.random.randint(key, (self.batch_size,), 0, len(self.data[0]))
        return tuple(x[index] for x in self.data)

    def evaluate(self, params: Any, state: Any) -> jax.Array:
        return self.loss_fn(params, state, self.data, jax.random.key(0))[0]

    def register(self) -> curvature.Registry:
        params, state = self.init(0)
        batch = self.batch(jax.random.key(0))
        args = (state, batch, jax.random.key(0))
        return curvature.register(self.loss_fn, params, *args, has_aux=True)


def runner(
    problem: Newcomer, make: Callable[[jax.Array], Any], steps: int
) -> Callable[[float, int], tuple[float, float, Any]]:
    """From a rate and a seed to the losses before and after, and the optimizer's last state."""

    @jax.jit
    def run(rate: jax.Array, key: jax.Array, params: Any, state: Any) -> Any:
        tx = make(rate)

        def step(carry: Any, i: jax.Array) -> Any:
            params, state, opt = carry
            keys = jax.random.split(jax.random.fold_in(key, i), 3)
            args = (state, problem.batch(keys[0]), keys[1])
            (value, new), grads = jax.value_and_grad(problem.loss_fn, has_aux=True)(params, *args)
            updates, opt = tx.update(grads, opt, params, loss_args=args, key=keys[2])
            return (optax.apply_updates(params, updates), new, opt), value

        start = (params, state, tx.init(params))
        (params, state, opt), values = jax.lax.scan(step, start, jnp.arange(steps))
        return params, state, opt, values

    evaluate = jax.jit(problem.evaluate)

    def one(rate: float, seed: int) -> tuple[float, float, Any]:
        params, state = problem.init(seed)
        before = float(evaluate(params, state))
        params, state, opt, values = run(jnp.float32(rate), jax.random.key(seed), params, state)
        return before, float(evaluate(params, state)), (opt, values)

    return one


class _CNN(nn.Module):
    """Convolutions with batch norm and dropout, in linen."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (8, 16):
            x = nn.Conv(width, (3, 3))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=False, momentum=0.9)(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(32)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(nn.Dropout(0.2, deterministic=False)(x))


def linen_cnn() -> Newcomer:
    images, labels = load_digits(return_X_y=True)
    images = jnp.asarray(images.reshape(-1, 8, 8, 1) / 16, jnp.float32)
    model = _CNN()

    def init(seed: int) -> tuple[Any, Any]:
        keys = jax.random.split(jax.random.key(seed))
        rngs = {"params": keys[0], "dropout": keys[1]}
        variables = dict(model.init(rngs, images[:2]))
        return variables.pop("params"), variables

    def loss_fn(params: Any, state: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        x, y = batch
        logits, state = model.apply(
            {"params": params, **state}, x, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        return cross_entropy(logits, y).mean(), state

    return Newcomer(init, loss_fn, (images, jnp.asarray(labels)), 64)


class _Block(nnx.Module):
    """Attention and a perceptron, each behind a layer norm."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        mask = nnx.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + self.attention(self.norms[0](x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class _Transformer(nnx.Module):
    """A small causal language model, in NNX."""

    def __init__(self, rngs: nnx.Rngs, size: int = 128, width: int = 32, length: int = 32) -> None:
        self.tokens = nnx.Embed(size, width, rngs=rngs)
        self.places = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List([_Block(width, rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, size, rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:
        x = self.tokens(text) + self.places(jnp.arange(text.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def nnx_transformer() -> Newcomer:
    text = np.frombuffer(inspect.getsource(argparse).encode("ascii", "replace"), np.uint8)
    text = jnp.asarray(text[: 33 * 512].reshape(512, 33), jnp.int32)
    graph, _, _ = nnx.split(_Transformer(nnx.Rngs(0)), nnx.Param, ...)

    def init(seed: int) -> tuple[Any, Any]:
        _, params, rest = nnx.split(_Transformer(nnx.Rngs(seed)), nnx.Param, ...)
        return nnx.as_pure(params), nnx.as_pure(rest)

    def loss_fn(params: Any, state: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        (tokens,) = batch
        logits = nnx.merge(graph, params, state)(tokens[:, :-1])
        return cross_entropy(logits, tokens[:, 1:]).mean(), state

    return Newcomer(init, loss_fn, (text,), 16)


def haiku_recurrent() -> Newcomer:
    """A recurrent net reads images row by row, in Haiku."""
    images, labels = load_digits(return_X_y=True)
    images = jnp.asarray(images.reshape(-1, 8, 8) / 16, jnp.float32)

    def network(x: jax.Array, y: jax.Array) -> jax.Array:
        cell = hk.GRU(32)
        rows = jnp.moveaxis(x, 1, 0)
        _, state = hk.dynamic_unroll(cell, rows, cell.initial_state(len(x)))
        return cross_entropy(hk.Linear(10)(state), y).mean()

    loss = hk.transform(network)

    def init(seed: int) -> tuple[Any, Any]:
        return loss.init(jax.random.key(seed), images[:2], jnp.asarray(labels)[:2]), ()

    def loss_fn(params: Any, state: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        return loss.apply(params, key, *batch), state

    return Newcomer(init, loss_fn, (images, jnp.asarray(labels)), 50)


def plain_regression() -> Newcomer:
    """Disease progression, 25 to 346, as it comes; plain JAX."""
    inputs, targets = load_diabetes(return_X_y=True)
    inputs, targets = jnp.asarray(inputs * 20, jnp.float32), jnp.asarray(targets, jnp.float32)

    def init(seed: int) -> tuple[Any, Any]:
        sizes = (10, 32, 32, 1)
        keys = jax.random.split(jax.random.key(seed), len(sizes))
        shapes = zip(keys, sizes, sizes[1:], strict=False)
        layers = [(jax.random.normal(k, (m, n)) / m**0.5, jnp.zeros(n)) for k, m, n in shapes]
        return layers, ()

    def loss_fn(params: Any, state: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        x, y = batch
        for i, (w, b) in enumerate(params):
            x = (jax.nn.relu(x) if i else x) @ w + b
        return curvature.losses.squared_error(x[:, 0], y).mean(), state

    return Newcomer(init, loss_fn, (inputs, targets), 32)


NEWCOMERS: dict[str, Callable[[], Newcomer]] = {
    "linen CNN": functools.cache(linen_cnn),
    "NNX transformer": functools.cache(nnx_transformer),
    "Haiku recurrent": functools.cache(haiku_recurrent),
    "plain regression": functools.cache(plain_regression),
}
