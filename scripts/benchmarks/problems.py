"""The benchmark problems: a network, its loss and its training data."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import curvature
from benchmarks.networks import Network, autoencoder, dense, residual_cnn, transformer
from curvature import examples
from digits import data as digits_data
from digits.data import Batch

PyTree = Any


@dataclass(frozen=True)
class Problem:
    """What is trained; the same for all optimizers.

    `steps` is how long optimizers with curvature train, `first_order_steps` the others: ten times
    as many, or fewer where K-FAC was not at Adam's loss then and had time left of half of Adam's.
    Where `scheduled`, learning rates warm up and decay, settings are tried at full length, and what
    counts is the loss on `held_out`. `family` is the distribution of the targets given the logits:
    `bernoulli` (sum over pixels, mean over images) or `categorical` (mean over labels).

    The methods below are what other problems do in another way (physics.py): `double` is float64,
    and where `chosen_rate`, K-FAC is given learning rates and does not choose them.
    """

    double = False
    chosen_rate = False

    name: str
    description: str
    network: Network
    family: str
    data: Batch
    batch_size: int
    steps: int
    first_order_steps: int
    held_out: Batch | None = None
    scheduled: bool = False

    @property
    def judged_on(self) -> Batch:
        """The data whose loss is reported."""
        return self.data if self.held_out is None else self.held_out

    @property
    def measured(self) -> str | None:
        """What is reported as the loss, where it is not that of the training data."""
        held_out = self.held_out
        return None if held_out is None else f"loss on {held_out.size} held-out examples"

    @property
    def points(self) -> int:
        """How often it is evaluated in a run."""
        return 30 if self.scheduled else 100

    def batches(self, seed: int) -> Callable[[PyTree], Batch]:
        """Gives the batch of the next step at its parameters, which a data set does not need."""
        found = digits_data.batches(self.data, self.batch_size, seed)
        return lambda params: next(found)

    def __post_init__(self) -> None:
        if self.data.size % self.batch_size:
            raise ValueError(
                f"{self.name} has {self.data.size} examples, expected a multiple of the batch size "
                f"{self.batch_size}: the objective is evaluated a batch at a time."
            )

    def loss_fn(self, params: PyTree, batch: Batch) -> Array:
        """The training objective on a batch, with the tags that `curvature.register` looks for."""
        logits = self.network.apply(params, batch.x)
        if self.family == "bernoulli":
            losses = curvature.losses.sigmoid_binary_cross_entropy(logits, batch.y).sum(-1)
        else:
            losses = curvature.losses.softmax_cross_entropy_with_integer_labels(logits, batch.y)
        return losses.mean()

    def evaluate(self, params: PyTree, data: Batch) -> dict[str, Array]:
        """The objective on all of the data, and what else is reported beside it."""
        chunked = jax.tree.map(lambda a: a.reshape(-1, self.batch_size, *a.shape[1:]), data)
        measured = jax.lax.map(lambda batch: self._measure(params, batch), chunked)
        return jax.tree.map(jnp.mean, measured)

    def _measure(self, params: PyTree, batch: Batch) -> dict[str, Array]:
        logits = self.network.apply(params, batch.x)
        if self.family == "bernoulli":
            loss = optax.sigmoid_binary_cross_entropy(logits, batch.y).sum(-1)
            error = jnp.square(jax.nn.sigmoid(logits) - batch.y).sum(-1)
            return {"loss": loss.mean(), "squared_error": error.mean()}
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.y)
        return {"loss": loss.mean(), "accuracy": jnp.mean(logits.argmax(-1) == batch.y)}


def curves() -> Problem:
    """Martens' (2010) benchmark on generated curves."""
    images = jnp.asarray(examples.curves(20_000))
    return Problem(
        name="curves",
        description="autoencoder 784-400-200-100-50-25-6 and back, tanh, linear code, on curves",
        network=autoencoder([784, 400, 200, 100, 50, 25, 6]),
        family="bernoulli",
        data=Batch(images, images),
        batch_size=1000,
        steps=500,
        first_order_steps=5000,
    )


def digits_autoencoder() -> Problem:
    """A deep autoencoder on digits of 8 x 8 pixels."""
    images = digits_data.load().train.x
    return Problem(
        name="digits_autoencoder",
        description="autoencoder 64-100-50-25-6 and back, tanh, linear code, on digits",
        network=autoencoder([64, 100, 50, 25, 6]),
        family="bernoulli",
        data=Batch(images, images),
        batch_size=500,
        steps=1500,
        first_order_steps=5000,
    )


def digits_classifier() -> Problem:
    """A narrow and deep classifier of digits."""
    return Problem(
        name="digits_classifier",
        description="classifier 64-20-20-20-20-20-10, tanh, on digits",
        network=dense([64, 20, 20, 20, 20, 20, 10]),
        family="categorical",
        data=digits_data.load().train,
        batch_size=500,
        steps=200,
        first_order_steps=2000,
    )


def residual() -> Problem:
    """A small residual convolutional network on digits enlarged to 16 x 16 pixels."""
    digits = digits_data.load().train
    images = digits.x.reshape(-1, 8, 8, 1)
    enlarged = jax.image.resize(images, (digits.size, 16, 16, 1), "linear")
    return Problem(
        name="residual_cnn",
        description="residual CNN, 16-32-64 channels, on digits enlarged to 16 x 16",
        network=residual_cnn([16, 32, 64], digits_data.CLASSES),
        family="categorical",
        data=Batch(enlarged, digits.y),
        batch_size=250,
        steps=150,
        first_order_steps=1500,
    )


SOURCES = ("argparse", "ast", "bdb", "calendar", "cmd", "codecs", "configparser", "contextlib")
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
CONTEXT = 64
WINDOWS = 2048


def char_transformer() -> Problem:
    """A character-level language model of the running Python's own sources."""
    codes = _source_codes(WINDOWS * CONTEXT + 1)
    x, y = codes[:-1].reshape(WINDOWS, CONTEXT), codes[1:].reshape(WINDOWS, CONTEXT)
    return Problem(
        name="char_transformer",
        description="causal transformer, 2 layers of width 64, on Python sources",
        network=transformer(len(ALPHABET), CONTEXT, width=64, layers=2, heads=4),
        family="categorical",
        data=Batch(jnp.asarray(x), jnp.asarray(y)),
        batch_size=32,
        steps=1250,
        first_order_steps=5000,
    )


def _source_codes(length: int) -> np.ndarray:
    """The first characters of the standard library's sources, as places in the alphabet."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = "".join((folder / f"{name}.py").read_text("utf-8") for name in SOURCES)
    if len(text) < length:
        raise ValueError(f"{SOURCES} have {len(text)} characters, expected {length}: add a module.")
    code = {character: i for i, character in enumerate(ALPHABET)}
    return np.array([code.get(c, code["?"]) for c in text[:length]], np.int32)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "curves": curves,
    "digits_autoencoder": digits_autoencoder,
    "digits_classifier": digits_classifier,
    "residual_cnn": residual,
    "char_transformer": char_transformer,
}
