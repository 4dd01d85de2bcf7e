"""The same three networks in Flax linen, Flax NNX and Haiku, behind one interface.

Every builder returns a `Problem`: plain functions of parameters, model state (batch-norm
statistics, or nothing) and a key. The loss is the one thing that differs from code written for
any other optimizer: it comes from `curvature.losses` instead of `optax.losses`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import curvature
from digits.data import CLASSES, FEATURES, Batch

PyTree = Any
Aux = tuple[PyTree, Array]
Activation = Callable[[Array], Array]


@dataclass(frozen=True)
class Architecture:
    """A fully connected network, described without a framework."""

    widths: tuple[int, ...]
    activation: Activation
    batch_norm: bool = False
    dropout: float = 0.0

    def __str__(self) -> str:
        extras = ", batch norm" if self.batch_norm else ""
        extras += f", dropout {self.dropout:g}" if self.dropout else ""
        return "-".join(map(str, (FEATURES, *self.widths, CLASSES))) + extras


ARCHITECTURES: Mapping[str, Architecture] = {
    "mlp": Architecture((64, 64), jax.nn.relu),
    "deep": Architecture((20, 20, 20, 20, 20), jnp.tanh),
    "batchnorm": Architecture((64, 64), jax.nn.relu, batch_norm=True, dropout=0.1),
}
FRAMEWORKS = ("linen", "nnx", "haiku")


@dataclass(frozen=True)
class Problem:
    """A model and its loss as pure functions; the training loop knows nothing else.

    `loss_fn` is what is differentiated and registered: batch statistics of the current batch,
    dropout on. `evaluate` is the trained model's own loss and accuracy: running statistics, no
    dropout.
    """

    name: str
    architecture: Architecture
    init: Callable[[Array], tuple[PyTree, PyTree]]
    loss_fn: Callable[[PyTree, PyTree, Batch, Array], tuple[Array, Aux]]
    evaluate: Callable[[PyTree, PyTree, Batch], tuple[Array, Array]]


Apply = Callable[[PyTree, PyTree, Array, bool, Array], tuple[Array, PyTree]]
"""(params, model_state, x, train, key) -> (logits, new_model_state)."""


def make(framework: str, model: str) -> Problem:
    """Builds one of the networks in one of the frameworks."""
    builders = {"linen": _linen, "nnx": _nnx, "haiku": _haiku}
    if framework not in builders:
        raise ValueError(f"framework {framework!r} is not one of {', '.join(builders)}")
    if model not in ARCHITECTURES:
        raise ValueError(f"model {model!r} is not one of {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[model]
    init, apply = builders[framework](architecture)
    return _problem(f"{framework} {model}", architecture, init, apply)


def _problem(
    name: str,
    architecture: Architecture,
    init: Callable[[Array], tuple[PyTree, PyTree]],
    apply: Apply,
) -> Problem:
    def loss_fn(params: PyTree, model_state: PyTree, batch: Batch, key: Array) -> tuple[Array, Aux]:
        logits, model_state = apply(params, model_state, batch.x, True, key)
        losses = curvature.losses.softmax_cross_entropy_with_integer_labels(logits, batch.y)
        return losses.mean(), (model_state, _accuracy(logits, batch.y))

    def evaluate(params: PyTree, model_state: PyTree, batch: Batch) -> tuple[Array, Array]:
        logits, _ = apply(params, model_state, batch.x, False, jax.random.key(0))
        losses = curvature.losses.softmax_cross_entropy_with_integer_labels(logits, batch.y)
        return losses.mean(), _accuracy(logits, batch.y)

    return Problem(name, architecture, init, loss_fn, evaluate)


def _accuracy(logits: Array, y: Array) -> Array:
    return jnp.mean(jnp.argmax(logits, axis=-1) == y)


# Each framework is imported only when it is asked for: any one of them is enough to train.


def _linen(net: Architecture) -> tuple[Callable[[Array], tuple[PyTree, PyTree]], Apply]:
    from flax import linen as nn

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x: Array, train: bool) -> Array:
            for width in net.widths:
                x = nn.Dense(width)(x)
                if net.batch_norm:
                    x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
                x = net.activation(x)
                if net.dropout:
                    x = nn.Dropout(net.dropout, deterministic=not train)(x)
            return nn.Dense(CLASSES)(x)

    module = Network()

    def init(key: Array) -> tuple[PyTree, PyTree]:
        variables = module.init(key, jnp.zeros((1, FEATURES), jnp.float32), train=False)
        return variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def apply(
        params: PyTree, model_state: PyTree, x: Array, train: bool, key: Array
    ) -> tuple[Array, PyTree]:
        variables = {"params": params, **model_state}
        rngs = {"dropout": key}
        logits, changed = module.apply(variables, x, train, rngs=rngs, mutable=list(model_state))
        return logits, changed

    return init, apply


def _nnx(net: Architecture) -> tuple[Callable[[Array], tuple[PyTree, PyTree]], Apply]:
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            sizes = (FEATURES, *net.widths)
            pairs = itertools.pairwise(sizes)
            self.hidden = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in pairs])
            norms = net.widths if net.batch_norm else ()
            self.norms = nnx.List([nnx.BatchNorm(n, momentum=0.9, rngs=rngs) for n in norms])
            # Without a stream of its own the dropout layer holds no state: its key is passed in.
            self.dropout = nnx.Dropout(net.dropout)
            self.head = nnx.Linear(sizes[-1], CLASSES, rngs=rngs)

        def __call__(self, x: Array, train: bool, key: Array) -> Array:
            for i, layer in enumerate(self.hidden):
                x = layer(x)
                if net.batch_norm:
                    x = self.norms[i](x, use_running_average=not train)
                x = net.activation(x)
                if net.dropout:
                    drop_key = jax.random.fold_in(key, i)
                    x = self.dropout(x, deterministic=not train, rngs=drop_key)
            return self.head(x)

    def build(key: Array) -> nnx.Module:
        return Network(nnx.Rngs(key))

    graph = nnx.graphdef(nnx.eval_shape(lambda: build(jax.random.key(0))))

    def init(key: Array) -> tuple[PyTree, PyTree]:
        _, params, model_state = nnx.split(build(key), nnx.Param, ...)
        return params, model_state

    def apply(
        params: PyTree, model_state: PyTree, x: Array, train: bool, key: Array
    ) -> tuple[Array, PyTree]:
        # A copy, because batch norm writes its statistics, inside a transform, to what it is given.
        model = nnx.merge(graph, params, model_state, copy=True)
        logits = model(x, train, key)
        return logits, nnx.state(model, nnx.Not(nnx.Param))

    return init, apply


def _haiku(net: Architecture) -> tuple[Callable[[Array], tuple[PyTree, PyTree]], Apply]:
    import haiku as hk

    def forward(x: Array, train: bool) -> Array:
        for width in net.widths:
            x = hk.Linear(width)(x)
            if net.batch_norm:
                norm = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)
                x = norm(x, is_training=train)
            x = net.activation(x)
            if net.dropout and train:
                x = hk.dropout(hk.next_rng_key(), net.dropout, x)
        return hk.Linear(CLASSES)(x)

    transformed = hk.transform_with_state(forward)

    def init(key: Array) -> tuple[PyTree, PyTree]:
        params, model_state = transformed.init(key, jnp.zeros((1, FEATURES), jnp.float32), True)
        return params, model_state

    def apply(
        params: PyTree, model_state: PyTree, x: Array, train: bool, key: Array
    ) -> tuple[Array, PyTree]:
        logits, model_state = transformed.apply(params, model_state, key, x, train)
        return logits, model_state

    return init, apply
