"""Optimizers for transformers, each with linear warm-up and cosine decay of its rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import optax
from jax.sharding import NamedSharding

import curvature

OPTIMIZERS = ("eigen_adam", "soap", "adamw")
LABELS = {"eigen_adam": "Eigen-Adam", "soap": "SOAP", "adamw": "AdamW"}
RATE = {"eigen_adam": 0.01, "soap": 0.01, "adamw": 0.003}  # at WIDTH, where they were measured
# What an optimizer has no use for.
NOT_TAKEN = {
    "eigen_adam": (),
    "soap": ("statistics_every", "statistics_batch"),
    "adamw": ("statistics_every", "statistics_batch", "refresh_every", "gather"),
}
PERIOD = 5  # of statistics and refreshes
WIDTH = 128
WARM_UP = 0.05  # of the steps


def default_rate(name: str, width: int) -> float:
    """That of small networks; of wide ones in inverse proportion to their width."""
    return RATE[name] * min(1.0, WIDTH / width)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An optimizer; `statistics_*` and `refresh_every` are for those with curvature."""

    name: str
    learning_rate: float
    weight_decay: float
    statistics_every: int
    statistics_batch: float | None
    refresh_every: int
    gather: str = "inverses"

    def schedule(self, steps: int) -> Callable[[Any], Any]:
        """The learning rate of every step."""
        return optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, max(1, round(WARM_UP * steps)), steps
        )

    def make(
        self, registry: curvature.Registry, steps: int, over: NamedSharding | None
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer itself; `over` is whose devices share the work of renewing bases."""
        rate = self.schedule(steps)
        if self.name == "adamw":
            tx = optax.adamw(rate, b2=0.95, weight_decay=self.weight_decay)
            return optax.with_extra_args_support(tx)
        options: dict[str, Any] = {"refresh_every": self.refresh_every, "refresh_over": over}
        if over is not None:
            options["gather"] = self.gather
        if self.name == "soap":
            options["kind"] = curvature.Shampoo()
        else:
            options["statistics_every"] = self.statistics_every
            options["statistics_batch"] = self.statistics_batch
        return curvature.eigen_adam(registry, rate, weight_decay=self.weight_decay, **options)
