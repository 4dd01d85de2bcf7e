"""The learning-rate search: every optimizer gets its trials from the same rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from digits.data import Digits
from digits.loop import Plan, Run, train
from digits.optimizers import Settings
from digits.problems import Problem


@dataclass
class Search:
    """All runs of one optimizer, in the order tried; every one is a complete run."""

    runs: list[Run]

    @property
    def best(self) -> Run:
        """The run with the lowest final training loss."""
        return min(self.runs, key=lambda run: run.final_loss)

    @property
    def at_edge(self) -> bool:
        """Whether the best value is the smallest or largest tried, so a better may lie beyond."""
        rates = [run.settings.learning_rate for run in self.runs]
        return len(rates) > 1 and self.best.settings.learning_rate in (min(rates), max(rates))


def search(
    problem: Problem,
    data: Digits,
    settings: Settings,
    learning_rates: Sequence[float],
    plan: Plan,
    registry: Any,
) -> Search:
    """Trains once, for the full number of steps, at each learning rate."""
    runs = []
    for rate in learning_rates:
        trial = dataclasses.replace(settings, learning_rate=rate)
        label = f"{settings.label}, learning rate {rate:g}"
        runs.append(train(problem, data, trial, plan, registry, label, leave_bar=False))
    return Search(runs)
