"""What the transformations have in common: how statistics are averaged and factors refreshed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from curvature.optimizer.arguments import (
    Gather,
    Period,
    ScalarOrSchedule,
    check_over,
    check_period,
    check_range,
    check_storage,
    is_time,
    turns_of,
)
from curvature.optimizer.refresh import Method
from curvature.optimizer.refresh.schedule import Clock
from curvature.precision import Precision
from curvature.sides import WideFactors
from curvature.statistics import Estimator, Kind
from curvature.statistics.stacks import Stacks
from curvature.trace import Registry


@dataclasses.dataclass(frozen=True, eq=False)
class Options:
    """Arguments that `scale_by_curvature` and `in_eigenbasis` both have, checked; see there."""

    decay: ScalarOrSchedule
    burn_in: int
    accumulate: int
    statistics_every: Period
    statistics_batch: float | None
    refresh_every: Period
    warmup_steps: int
    refresh: Method
    spread: bool
    refresh_over: NamedSharding | None
    gather: Gather
    max_factor_dim: int
    wide_factors: WideFactors
    axis_name: str | Sequence[str] | None
    precision: Precision
    storage_dtype: DTypeLike | None

    def __post_init__(self) -> None:
        check_range("decay", self.decay, 0.0, 1.0)
        check_period("statistics_every", self.statistics_every, schedules=True)
        check_period("accumulate", self.accumulate)
        check_period("refresh_every", self.refresh_every, schedules=True)
        for name in ("burn_in", "warmup_steps"):
            check_period(name, getattr(self, name), smallest=0)
        if not isinstance(self.refresh, Method):
            raise TypeError(
                f"refresh is {self.refresh!r}, expected Cholesky(), NewtonSchulz(), Eigh() or QR()."
            )
        check_over(self.refresh_over, self.gather)
        check_storage(self.storage_dtype)
        turns_of(self.refresh_every, spread=self.spread)

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Options:
        """From the arguments of a transformation by name, with others among them."""
        return cls(**{field.name: arguments[field.name] for field in dataclasses.fields(cls)})

    @property
    def turns(self) -> int:
        """In how many turns everything is refreshed once."""
        return turns_of(self.refresh_every, spread=self.spread)

    def clock(self, step: jax.Array, sound: jax.Array, everything: jax.Array) -> Clock:
        """What is to be refreshed at a step.

        Args:
          step: its number.
          sound: whether it is taken.
          everything: whether all of it is due, as in the first steps.
        """
        due = sound
        if self.turns == 1:
            due &= everything | is_time(self.refresh_every, step)
        return Clock(due, everything, step % self.turns)

    def stacks(self, registry: Registry, kind: Kind, *, alone: bool = False) -> Stacks:
        """The stacks of a registry's layers, on the devices that share them."""
        estimator = Estimator(
            registry,
            kind,
            self.max_factor_dim,
            self.axis_name,
            self.precision,
            self.wide_factors,
        )
        over = self.refresh_over if self.gather == "updates" else None
        return Stacks(estimator, alone=alone, over=over)
