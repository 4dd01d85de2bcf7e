"""True against empirical Fisher while a digits network trains (`train.py --compare-every`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax

import curvature
from curvature.comparison import History
from digits.data import Batch
from digits.problems import Problem, PyTree

IMAGES = 500
"""How many training images are compared on: enough for every class, and a second for each time."""


class Watch:
    """Compares on the first `IMAGES` training images, which the split has shuffled.

    The model is taken as it predicts: dropout off, batch norm with its running statistics, so that
    an example's gradient is its own.

    Args:
      problem: the network.
      images: the training images.
      every: steps between comparisons.
      seed: of sampled targets and random projections.
      rows: measurements of a run that goes on.
    """

    def __init__(
        self,
        problem: Problem,
        images: Batch,
        every: int,
        seed: int,
        rows: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        self._key = jax.random.key(seed)
        self._sample = Batch(images.x[:IMAGES], images.y[:IMAGES])
        self._registry = evaluation_registry(problem, self._sample)
        self.history = History(self._registry, every=every, key=self._key)
        self.history.restore(rows)

    def due(self, step: int) -> bool:
        """Whether there is something to compare after this step."""
        return self.history.due(step)

    def __call__(self, step: int, params: PyTree, model_state: PyTree) -> dict[str, float]:
        """The scalars to log after a step: none where none is due."""
        return self.history(step, params, [(model_state, self._sample)]) or {}

    def full(self, params: PyTree, model_state: PyTree, progress: bool) -> curvature.Comparison:
        """Everything there is to say about a state: exacter, and with structured approximations."""
        batches = [(model_state, self._sample)]
        return curvature.compare(self._registry, params, batches, key=self._key, progress=progress)


def evaluation_registry(problem: Problem, batch: Batch) -> curvature.Registry:
    """The registry of a problem's loss in evaluation mode, `loss(params, model_state, batch)`."""
    params, model_state = _shapes(problem)
    return curvature.register(problem.evaluate, params, model_state, batch, has_aux=True)


def _shapes(problem: Problem) -> tuple[PyTree, PyTree]:
    return jax.eval_shape(problem.init, jax.random.key(0))
