"""The result of a comparison: plain dataclasses of numbers, with a table and JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from curvature.comparison import presentation
from curvature.text import plain

WHOLE = "whole network"


class Figure(NamedTuple):
    """A number and what it is worth.

    Attributes:
      value: the number; not a number where there is none (a ratio to nothing).
      error: half the width of its 95 % interval; None where it is exact.
    """

    value: float
    error: float | None = None

    def __str__(self) -> str:
        if self.error is None:
            return f"{self.value:.4g}"
        return f"{self.value:.3g} ± {self.error:.1g}"


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The eigenvalues of one kind of curvature on one block.

    Attributes:
      trace: their sum.
      largest: the largest ones, descending.
      effective_dimension: sum of value / (value + damping). Where targets are sampled, that of
        as many samples as the kind asks for.
      density: how many there are: pairs of log10 of a bin's middle and a count, ascending.
      sampling_error: |A_k - A| / |A| (Frobenius) of the k samples that the kind asks for, as a
        training step would draw them; None where nothing is sampled.
    """

    trace: Figure
    largest: tuple[Figure, ...]
    effective_dimension: Figure
    density: tuple[tuple[float, float], ...]
    sampling_error: Figure | None = None


@dataclasses.dataclass(frozen=True)
class Directions:
    """Natural-gradient directions x = -(curvature + damping I)^-1 gradient of two kinds.

    Where targets are sampled, those of as many samples as the kind asks for.

    Attributes:
      cosine: of the angle between them.
      length_ratio: |x_B| / |x_A|.
      decrease: what x_B takes off the quadratic model with A, as a share of what x_A takes off;
        negative where it adds.
      best_decrease: the same with the best length for x_B.
      agreement: the smallest damping from which on their cosine is 0.99 or more; 0 where it always
        is.
    """

    cosine: Figure
    length_ratio: Figure
    decrease: Figure
    best_decrease: Figure
    agreement: Figure


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two kinds of curvature of one block, A (the reference) and B.

    Attributes:
      trace_ratio: tr B / tr A, the scale.
      cosine: <A, B> / (|A| |B|) in the Frobenius inner product, the shape: 1 for multiples.
      angles: principal angles between the spaces of the largest eigenvectors, degrees, ascending.
      frobenius_distance: |B - A| / |A| in the Frobenius norm.
      spectral_distance: |B - A| / |A| in the spectral norm.
      directions: what the two do to the gradient; None where that was not asked for.
    """

    trace_ratio: Figure
    cosine: Figure
    angles: tuple[Figure, ...]
    frobenius_distance: Figure
    spectral_distance: Figure
    directions: Directions | None = None


@dataclasses.dataclass(frozen=True)
class Structured:
    """A structured approximation (K-FAC, ...) beside the block A that it approximates.

    Attributes:
      trace_ratio: tr K / tr A.
      cosine: <A, K> / (|A| |K|).
      frobenius_distance: |K - A| / |A|.
    """

    trace_ratio: Figure
    cosine: Figure
    frobenius_distance: Figure


@dataclasses.dataclass(frozen=True)
class Block:
    """The comparison of one block.

    Attributes:
      name: the layer's name, or `WHOLE`.
      parameters: key paths of its parameters.
      size: number of parameter entries n.
      projected: None where the n x n matrices were made; else the number of random directions that
        they were projected to.
      spectra: by kind.
      pairs: by the two kinds' names, reference first.
      structured: by kind, then by the name of the approximation.
    """

    name: str
    parameters: tuple[str, ...]
    size: int
    projected: int | None
    spectra: dict[str, Spectrum]
    pairs: dict[tuple[str, str], Pair]
    structured: dict[str, dict[str, Structured]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ModelState:
    """How far the model has learnt its targets.

    Attributes:
      examples: number of examples seen.
      loss: the mean loss.
      wrong: the share of units whose likeliest target is not the given one; None for losses
        without classes. A unit is one prediction: an example may have many (tokens, pixels), and
        every one with a weight in the loss counts alike.
      nll: the mean negative log-likelihood of a unit's given target, in nats; None as above. It is
        the loss where that is the mean over units.
      entropy: the mean entropy of a unit's predicted distribution, in nats; None as above. It is
        what `nll` would be if the targets came from the model.
    """

    examples: int
    loss: float
    wrong: float | None
    nll: float | None
    entropy: float | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `curvature.compare` found.

    Attributes:
      kinds: the kinds' names and what they are, in the order given; the first is the reference.
      state: of the model.
      blocks: by layer, the whole network first.
      damping: of effective dimensions and directions.
      settings: everything that was asked for, and versions.
      notes: what a reader has to know: what was estimated, left out, or went wrong.
    """

    kinds: dict[str, str]
    state: ModelState
    blocks: tuple[Block, ...]
    damping: float
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def whole(self) -> Block | None:
        """The block of the whole network."""
        return next((block for block in self.blocks if block.name == WHOLE), None)

    def table(self) -> str:
        """The main figures as text: a line for each block and pair, at most 100 columns wide."""
        return presentation.table(self)

    def save_html(self, path: str | Path) -> None:
        """Writes a report as one HTML file that needs no network.

        Args:
          path: of the file.
        """
        presentation.save_html(self, path)

    def plot(self, pair: tuple[str, str] | None = None, *, figure: Any = None) -> Any:
        """Draws one pair for a paper; needs matplotlib, which the extra `curvature[report]` brings.

        Args:
          pair: the two kinds' names, reference first; None for the first pair with an empirical
            Fisher, or the first one where there is none.
          figure: a matplotlib figure, or subfigure, to draw on; None for a new one.

        Returns:
          The figure. `figure.savefig("comparison.pdf")` writes it.

        Raises:
          ImportError: there is no matplotlib.
          ValueError: no block has this pair.
        """
        return presentation.plot(self, pair, figure)

    def to_json(self, path: str | Path | None = None) -> str:
        """All of it as JSON, written to a file where a path is given.

        A figure is `{"value": ..., "error": ...}` (error null where exact); a value that is not
        finite is null; a pair's key is `"A | B"`.
        """
        text = json.dumps(plain(self), indent=1, allow_nan=False)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text
