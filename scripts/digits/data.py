"""Scikit-learn's handwritten digits: 1,797 grey images of 8 x 8 pixels, no download."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from sklearn.datasets import load_digits

IMAGES = 1797
FEATURES = 64
CLASSES = 10
TRAIN_IMAGES = 1500


class Batch(NamedTuple):
    """Images as rows of 64 numbers in [0, 1], and their classes as integers."""

    x: Array
    y: Array

    @property
    def size(self) -> int:
        return int(self.x.shape[0])


class Digits(NamedTuple):
    """The two parts of the data set."""

    train: Batch
    test: Batch


def load(seed: int = 0, train_images: int = TRAIN_IMAGES) -> Digits:
    """Splits the images at random; the same seed always gives the same split."""
    images, classes = load_digits(return_X_y=True)
    x = np.asarray(images, np.float32) / 16.0
    y = np.asarray(classes, np.int32)
    order = np.random.default_rng(seed).permutation(len(x))
    train, test = order[:train_images], order[train_images:]
    return Digits(
        train=Batch(jnp.asarray(x[train]), jnp.asarray(y[train])),
        test=Batch(jnp.asarray(x[test]), jnp.asarray(y[test])),
    )


def batches(data: Batch, size: int, seed: int, first: int = 0) -> Iterator[Batch]:
    """Yields batches for ever: all of the data each time, or a fresh shuffle every epoch.

    `first` is how many to leave out, for a run that goes on: an epoch's shuffle depends on its
    number alone, so that nothing has to be drawn for those before.

    What is left of an epoch after its last whole batch is dropped, because a batch of another size
    would compile the step again.
    """
    if size >= data.size:
        while True:
            yield data
    first_epoch, skipped = divmod(first, data.size // size)
    for epoch in itertools.count(first_epoch):
        order = np.random.default_rng((seed, epoch)).permutation(data.size)
        for start in range(skipped * size, data.size - size + 1, size):
            rows = order[start : start + size]
            yield Batch(data.x[rows], data.y[rows])
        skipped = 0
