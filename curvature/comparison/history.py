"""Comparisons while a model trains: a few numbers every so many steps, for any loop and logger."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from curvature.comparison import presentation
from curvature.comparison.arguments import named
from curvature.comparison.compare import compare
from curvature.comparison.result import Comparison, Figure, Pair
from curvature.statistics.kinds import Kind
from curvature.text import plain
from curvature.trace import Registry

PyTree = Any
PREFIX = "compare/"
FIGURES = ("trace_ratio", "cosine", "direction_cosine")
_ERROR = "_error"


class History:
    """Compares kinds of curvature every so many steps of a training loop, and keeps what it finds.

    Call it at every step; it does nothing until one is due. All comparisons share one random key
    and what was compiled for the first, so that a later one costs its arithmetic alone. Figures are
    those of `curvature.compare`, without structured approximations.

    The names of the scalars: `compare/loss`, `compare/wrong` (the share of wrong predictions),
    `compare/nll` and `compare/entropy` (see `ModelState`); and for each block and each kind against
    the first one `compare/trace_ratio/KIND/BLOCK`, `compare/cosine/...` and
    `compare/direction_cosine/...` (of natural-gradient steps). Where a figure is estimated,
    `compare/trace_ratio_error/KIND/BLOCK` and so on are half the widths of the 95 % intervals.

    Args:
      registry: what is in the model, from `curvature.register`. A model with dropout or batch norm
        is best registered by its loss in evaluation mode, which tells its examples apart.
      batches: the data, see `curvature.compare`: a fixed sample of a few hundred examples will do.
        None where every call brings its own.
      every: steps between comparisons; step 0 is the first.
      key: random key.
      kinds: see `curvature.compare`; the first is the reference.
      blocks: patterns of the layers' names, or None for all of them and the whole network.
      directions: whether to compare directions.
      damping: of directions, in units of the curvature.
      limit: the largest matrix that is made. Time grows with its cube, errors shrink with its root.

    Attributes:
      records: what was logged, with `step`; ascending.
      latest: the last comparison in full; None before the first.

    >>> import jax, jax.numpy as jnp, curvature
    >>> def loss_fn(w, x, y):
    ...     return curvature.losses.squared_error(x @ w, y).mean()
    >>> w, x, y = jnp.zeros(2), jnp.eye(2), jnp.array([2.0, 0.0])
    >>> registry = curvature.register(loss_fn, w, x, y)
    >>> History = curvature.comparison.History
    >>> history = History(registry, [(x, y)], every=10, key=jax.random.key(0))
    >>> for step in range(21):
    ...     if scalars := history(step, w):
    ...         print(step, round(scalars["compare/trace_ratio/empirical Fisher/whole network"], 3))
    ...     w = w - 0.1 * jax.grad(loss_fn)(w, x, y)
    0 4.0
    10 0.486
    20 0.059
    """

    def __init__(
        self,
        registry: Registry,
        batches: Iterable[Any] | None = None,
        *,
        every: int = 100,
        key: jax.Array,
        kinds: Mapping[str, Kind] | Sequence[Kind] | None = None,
        blocks: str | Sequence[str] | None = None,
        directions: bool = True,
        damping: float = 1e-3,
        limit: int = 500,
    ) -> None:
        if every < 1:
            raise ValueError(f"Expected every >= 1 (steps between comparisons), found {every}.")
        self.every = every
        self.records: list[dict[str, float]] = []
        self.latest: Comparison | None = None
        self._registry, self._batches = registry, batches
        self._options: dict[str, Any] = {
            "key": key,
            "kinds": kinds,
            "blocks": blocks,
            "directions": directions,
            "damping": damping,
            "limit": limit,
        }

    def due(self, step: int) -> bool:
        """Whether a call at this step compares."""
        return step % self.every == 0

    def __call__(
        self, step: int, params: PyTree, batches: Iterable[Any] | None = None
    ) -> dict[str, float] | None:
        """Compares if the step is due.

        Args:
          step: the number of steps taken.
          params: the parameters.
          batches: the data where it changes with the model, such as `[(model_state, x, y)]` for
            running statistics of batch norm; keep the shapes. None for that of the constructor.

        Returns:
          Scalars by name, to log; None where no comparison is due.

        Raises:
          ValueError: there is no data, or what `curvature.compare` refuses.
        """
        step = int(step)
        if not self.due(step):
            return None
        batches = self._batches if batches is None else batches
        if batches is None:
            raise ValueError(
                "There is no data to compare on: pass batches to History(...), or to every call."
            )
        self.latest = compare(
            self._registry, params, batches, approximations=(), progress=False, **self._options
        )
        found = scalars(self.latest)
        self.restore([{"step": step, **found}])
        return found

    def restore(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Takes up records of a run that goes on, for instance lines of a JSON lines file.

        Args:
          rows: mappings with `step`; only names that start with `compare/` are read, and rows
            without any are passed over. None stands for not a number.
        """
        records = {int(record["step"]): record for record in self.records}
        for row in rows:
            found = {
                name: math.nan if value is None else float(value)
                for name, value in row.items()
                if name.startswith(PREFIX)
            }
            if found:
                records[int(row["step"])] = {"step": int(row["step"]), **found}
        self.records = [records[step] for step in sorted(records)]

    def to_json(self, path: str | Path | None = None) -> str:
        """The records as JSON, a list of objects, written to a file where a path is given.

        What is not finite is null.
        """
        text = json.dumps(plain(self.records), indent=1, allow_nan=False)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def plot(self, kind: str | None = None, *, figure: Any = None) -> Any:
        """Draws the records over training steps; needs matplotlib (extra `curvature[report]`).

        Args:
          kind: the kind to set against the reference; None for the empirical Fisher, or the first
            one where there is none.
          figure: a matplotlib figure, or subfigure, to draw on; None for a new one.

        Returns:
          The figure. `figure.savefig("comparison.png")` writes it.

        Raises:
          ImportError: there is no matplotlib.
          ValueError: there are no records, or none of this kind.
        """
        reference = next(iter(named(self._registry, self._options["kinds"])[0]))
        return presentation.plot_history(self.records, reference, kind, figure)


def scalars(comparison: Comparison) -> dict[str, float]:
    """The main figures of a comparison by name, see `History`."""
    state = comparison.state
    found = {name: getattr(state, name) for name in ("loss", "wrong", "nll", "entropy")}
    result = {PREFIX + name: value for name, value in found.items() if value is not None}
    reference = next(iter(comparison.kinds))
    for block in comparison.blocks:
        for (a, b), pair in block.pairs.items():
            if a != reference:
                continue
            for name, figure in _figures(pair).items():
                result[scalar_name(name, b, block.name)] = figure.value
                if figure.error is not None:
                    result[scalar_name(name + _ERROR, b, block.name)] = figure.error
    return result


def _figures(pair: Pair) -> dict[str, Figure]:
    found = {"trace_ratio": pair.trace_ratio, "cosine": pair.cosine}
    if pair.directions is not None:
        found["direction_cosine"] = pair.directions.cosine
    return found


def scalar_name(name: str, kind: str, block: str) -> str:
    """The scalar's name; slashes are left to the blocks, whose names have them."""
    return f"{PREFIX}{name}/{kind.replace('/', '_')}/{block}"


def is_error(name: str) -> bool:
    """Whether a scalar is the error of another one."""
    return name.startswith(PREFIX) and name.split("/")[1].endswith(_ERROR)


def series(records: Sequence[Mapping[str, float]]) -> dict[str, dict[str, list[str]]]:
    """By kind and figure, the blocks that the records have; all in the order of appearance."""
    found: dict[str, dict[str, list[str]]] = {}
    for name in dict.fromkeys(name for record in records for name in record):
        parts = name.removeprefix(PREFIX).split("/", 2)
        if name.startswith(PREFIX) and len(parts) == 3 and parts[0] in FIGURES:
            found.setdefault(parts[1], {}).setdefault(parts[0], []).append(parts[2])
    return found


def points(
    records: Sequence[Mapping[str, float]], figure: str, kind: str, block: str
) -> list[tuple[float, Figure]]:
    """A figure of one block over steps, where the records have it and it is finite."""
    name, error = (scalar_name(f, kind, block) for f in (figure, figure + _ERROR))
    return [
        (record["step"], Figure(record[name], record.get(error)))
        for record in records
        if math.isfinite(record.get(name, math.nan))
    ]
