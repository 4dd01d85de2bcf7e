"""K-FAC, Adam and SGD behind one call, with the options that the command lines expose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optax
from jax.typing import ArrayLike

import curvature

OPTIMIZERS = ("kfac", "adam", "sgd")
FISHERS = ("sampled", "exact", "empirical")
LABELS = {"kfac": "K-FAC", "adam": "Adam", "sgd": "SGD with momentum"}

DEFAULT_LEARNING_RATE = {"kfac": 0.03, "adam": 3e-3, "sgd": 0.1}


@dataclass(frozen=True)
class Settings:
    """One optimizer with all its options; what does not concern it is ignored.

    `momentum` is heavy-ball momentum for K-FAC and SGD, and the first decay rate for Adam.
    Damping is constant, unless it starts at `initial_damping` and falls towards `damping`, the
    difference halved every `halve_damping_every` steps: far from a minimum the quadratic model that
    K-FAC minimises is good only nearby, and strong damping keeps its steps there. If `adaptive`,
    that model chooses the learning rate and the momentum of every step (a momentum of zero stays
    zero), and the damping, which starts at `damping`, follows how well the model predicts.
    """

    name: str
    learning_rate: float
    momentum: float = 0.9
    damping: float = 0.03
    initial_damping: float | None = None
    halve_damping_every: int = 10
    fisher: str = "sampled"
    samples: int = 1
    decay: float = 0.95
    statistics_every: int = 1
    refresh_every: int = 1
    adaptive: bool = False

    @property
    def label(self) -> str:
        return LABELS[self.name]

    def describe(self) -> dict[str, Any]:
        """The options that this optimizer reads, for tables and JSON."""
        everything = dataclasses.asdict(self)
        if self.name != "kfac":
            return {k: everything[k] for k in ("name", "learning_rate", "momentum")}
        if self.fisher != "sampled":
            del everything["samples"]
        if self.initial_damping is None:
            del everything["initial_damping"], everything["halve_damping_every"]
        if self.adaptive:
            del everything["learning_rate"]
        return everything

    def kfac_damping(
        self,
    ) -> float | curvature.LevenbergMarquardt | Callable[[ArrayLike], ArrayLike]:
        """What `curvature.kfac` takes as its damping."""
        if self.adaptive:
            return curvature.LevenbergMarquardt(self.damping)
        if self.initial_damping is None:
            return self.damping
        excess = self.initial_damping - self.damping
        return lambda step: self.damping + excess * 0.5 ** (step / self.halve_damping_every)


def curvature_kind(fisher: str, samples: int = 1) -> Any:
    """The source of output gradients that `--fisher` names."""
    kinds: dict[str, Callable[[], Any]] = {
        "sampled": lambda: curvature.Fisher(samples=samples),
        "exact": lambda: curvature.Fisher(samples=None),
        "empirical": curvature.EmpiricalFisher,
    }
    if fisher not in kinds:
        raise ValueError(f"fisher {fisher!r} is not one of {', '.join(kinds)}")
    return kinds[fisher]()


def make(settings: Settings, registry: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer itself.

    Adam and SGD are given `loss_args` and `key` by the same loop and ignore them.
    """
    if settings.name == "adam":
        tx = optax.adam(settings.learning_rate, b1=settings.momentum)
        return optax.with_extra_args_support(tx)
    if settings.name == "sgd":
        tx = optax.sgd(settings.learning_rate, momentum=settings.momentum)
        return optax.with_extra_args_support(tx)
    if settings.name == "kfac":
        return curvature.kfac(
            registry,
            curvature.QuadraticModel() if settings.adaptive else settings.learning_rate,
            momentum=settings.momentum,
            damping=settings.kfac_damping(),
            kind=curvature_kind(settings.fisher, settings.samples),
            decay=settings.decay,
            statistics_every=settings.statistics_every,
            refresh_every=settings.refresh_every,
        )
    raise ValueError(f"optimizer {settings.name!r} is not one of {', '.join(OPTIMIZERS)}")
