"""What one backward pass through a program brings along."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax

from curvature.meshes import here
from curvature.precision import HIGHEST, Precision
from curvature.statistics.factors import Statistics
from curvature.statistics.kinds import Draw, Kind
from curvature.trace.layers import Layer


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What one backward pass brings along.

    Attributes:
      layers: the layers by name.
      kind: the source of cotangents.
      tokens: for each layer whose statistics are taken, zeros of their shape.
      draws: for each loss, what the kind needs there.
      alive: for each contraction, by the index of its use, which rows count; all do where it is
        missing.
      marking: whether `alive` holds tokens instead, whose gradient says which rows a loss depends
        on (see `alive.py`), and no statistics are taken.
      bases: for each EKFAC layer whose corrections are taken, the eigenbases.
      devices: axes of devices around, each with examples of its own, and whether what varies over
        them is tracked.
      ground: zero, with respect to which the tokens' gradient is taken, too: what tells that
        derivative from any other (see `_grounded`). None where there is no other.
      precision: of products.
      weights: for each loss, what the weights of its units are multiplied by; none for 1.
      weighing: whether `weights` holds tokens instead, whose gradient is the sum of the sizes of
        those weights (see `share.py`), and no statistics are taken.
      met: filled, while the backward pass is traced, with the names of the contractions that it
        comes to; it does not where no gradient passes, as behind `sign`.
    """

    layers: Mapping[str, Layer]
    kind: Kind
    tokens: Mapping[str, Statistics]
    draws: Mapping[int, Draw]
    alive: Mapping[int, jax.Array] = dataclasses.field(default_factory=dict)
    marking: bool = False
    bases: Mapping[str, Statistics] = dataclasses.field(default_factory=dict)
    devices: tuple[tuple[str, ...], bool] = ((), False)
    ground: jax.Array | None = None
    precision: Precision = HIGHEST
    weights: Mapping[int, jax.Array] = dataclasses.field(default_factory=dict)
    weighing: bool = False
    met: set[str] = dataclasses.field(default_factory=set)

    def here(self) -> Sweep:
        """The same with the types of the mesh that is set."""
        names = ("tokens", "draws", "alive", "bases", "weights")
        return dataclasses.replace(
            self, **here({name: dict(getattr(self, name)) for name in names})
        )
