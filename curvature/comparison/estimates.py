"""The figures, from the matrices of two kinds on one block.

Every figure is a function of `View`s: the matrices, or what is left of them without one of the
independent parts that they were estimated from (draws of targets, parts of a projection). The
jackknife over parts takes out the bias of first order and gives the standard error (Efron and
Stein 1981); with nothing estimated, figures are exact.

Solves with a small damping depend on sampled targets far from linearly: a direction that no sample
sees has the curvature zero, and no extrapolation from samples tells what it has in their limit. So
figures of solves are those of the samples that a kind asks for: their mean over the draws.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from curvature.comparison.projection import PARTS
from curvature.comparison.result import Directions, Figure, Pair, Spectrum

# The 97.5 % quantile of Student's t with PARTS - 2 degrees of freedom: one is the mean's, one the
# bias's.
_STUDENT = 3.182
_WIDER = 4.303 / 3.182  # one degree less: where eigenvalues cross, angles are not smooth
_AGREE = 0.99
_DECADES = 8  # of the spectrum, below its largest eigenvalue
_BINS = 4  # of a decade
TINY = float(np.finfo(np.float64).tiny)
Numbers = Callable[..., Sequence[float] | np.ndarray]  # from one view of each estimate


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A symmetric matrix and a gradient in the same coordinates."""

    matrix: np.ndarray
    gradient: np.ndarray

    @functools.cached_property
    def eigh(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues, descending, rounding below zero removed; and eigenvectors."""
        values, vectors = np.linalg.eigh(self.matrix)
        return np.maximum(values[::-1], 0), vectors[:, ::-1]

    @functools.cached_property
    def norm(self) -> float:
        """The Frobenius norm."""
        return float(np.linalg.norm(self.matrix))

    @property
    def trace(self) -> float:
        """The trace."""
        return float(np.trace(self.matrix))

    def direction(self, damping: float) -> np.ndarray:
        """-(matrix + damping I)^-1 gradient."""
        values, vectors = self.eigh
        return -vectors @ (vectors.T @ self.gradient / (values + damping))


@dataclasses.dataclass(frozen=True, eq=False)
class Estimate:
    """A matrix with what it was estimated from.

    Attributes:
      matrices: `(draws, dim, dim)`, one for each draw.
      gradient: `(dim,)`.
      projected: whether the coordinates are a projection's.
      resolution: eigenvalues below this share of the largest are rounding.
    """

    matrices: np.ndarray
    gradient: np.ndarray
    projected: bool
    resolution: float = 1e-12

    @property
    def rank(self) -> int:
        """The number of eigenvalues that are not rounding."""
        values = self.whole.eigh[0]
        return int(np.sum(values > self.resolution * values[0]))

    @property
    def exact(self) -> bool:
        """Whether nothing is estimated."""
        return not self.projected and len(self.matrices) == 1

    @functools.cached_property
    def whole(self) -> View:
        """All of it."""
        return View(self.matrices.mean(axis=0), self.gradient)

    @functools.cached_property
    def draws(self) -> tuple[Estimate, ...]:
        """An estimate from each draw, the same one where there is but one."""
        if len(self.matrices) == 1:
            return (self,) * PARTS
        return tuple(dataclasses.replace(self, matrices=x[None]) for x in self.matrices)

    @functools.cached_property
    def without_draw(self) -> tuple[View, ...]:
        """All but one draw, for each; empty where there is but one."""
        if len(self.matrices) == 1:
            return ()
        count = len(self.matrices)
        rest = (self.whole.matrix * count - one for one in self.matrices)
        return tuple(View(matrix / (count - 1), self.gradient) for matrix in rest)

    @functools.cached_property
    def without_part(self) -> tuple[View, ...]:
        """All but one part of the projection, for each; empty where it is none."""
        if not self.projected:
            return ()
        width, scale = len(self.gradient) // PARTS, PARTS / (PARTS - 1)
        part = np.repeat(np.arange(PARTS), width)
        kept = (np.flatnonzero(part != i) for i in range(PARTS))
        return tuple(
            View(self.whole.matrix[np.ix_(k, k)] * scale, self.gradient[k] * scale**0.5)
            for k in kept
        )


def jackknife(
    function: Numbers,
    *estimates: Estimate,
    least: float = -np.inf,
    most: float = np.inf,
    of_a_draw: bool = False,
) -> list[Figure]:
    """Figures of some estimates, each with its error.

    Args:
      function: from one view of each estimate to numbers.
      *estimates: of the same parts.
      least: below which no figure can be.
      most: above which none can be.
      of_a_draw: whether figures are those of a single draw in the mean, not of their limit.
    """
    if all(e.exact for e in estimates):
        return [Figure(float(x)) for x in function(*(e.whole for e in estimates))]
    estimated = _of_a_draw if of_a_draw else _in_the_limit
    with np.errstate(invalid="ignore"):  # of infinite dampings of agreement
        values, variance, error = estimated(function, estimates)
    errors = error + _STUDENT * np.sqrt(variance)
    values = np.clip(values, least, most)
    return [Figure(float(v), float(e)) for v, e in zip(values, errors, strict=True)]


_Found = tuple[np.ndarray, np.ndarray, np.ndarray]  # values, their variance, what bias may be left


def _in_the_limit(function: Numbers, estimates: Sequence[Estimate]) -> _Found:
    """Without the bias of either; leaving out a part, then a draw, of all estimates together."""
    whole = np.asarray(function(*(e.whole for e in estimates)), np.float64)
    values, variance, error = whole, np.zeros_like(whole), np.zeros_like(whole)
    for what in ("without_part", "without_draw"):
        views = [getattr(e, what) for e in estimates]
        if any(views):
            each = [v or (e.whole,) * PARTS for v, e in zip(views, estimates, strict=True)]
            left = [np.asarray(function(*some)) for some in zip(*each, strict=True)]
            bias, spread = _mean([(PARTS - 1) * (x - whole) for x in left])
            values, variance, error = values - bias, variance + spread, error + np.abs(bias)
    return values, variance, error


def _of_a_draw(function: Numbers, estimates: Sequence[Estimate]) -> _Found:
    """Means over draws; the bias of a projection from leaving out another part in each of them."""
    draws = list(zip(*(e.draws for e in estimates), strict=True))
    found = [np.asarray(function(*(e.whole for e in some)), np.float64) for some in draws]
    values, variance = _mean(found)
    if all(len(e.matrices) == 1 for e in estimates):
        variance = np.zeros_like(values)
    error = np.zeros_like(values)
    if any(e.projected for e in estimates):
        left = [
            np.asarray(function(*(e.without_part[i] for e in some))) for i, some in enumerate(draws)
        ]
        bias, spread = _mean([(PARTS - 1) * (x - y) for x, y in zip(left, found, strict=True)])
        values, variance, error = values - bias, variance + spread, np.abs(bias)
    return values, variance, error


def _mean(samples: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The mean of independent samples, and its variance."""
    return np.mean(samples, axis=0), np.var(samples, axis=0, ddof=1) / len(samples)


def spectrum(estimate: Estimate, damping: float, top: int) -> Spectrum:
    """The spectrum of one kind."""
    count = min(top, len(estimate.gradient))

    def dimension(view: View) -> list[float]:
        values = view.eigh[0]
        return [float(np.sum(values / (values + damping)))]

    trace, *largest = jackknife(
        lambda view: [view.trace, *view.eigh[0][:count]], estimate, least=0.0
    )
    (effective,) = jackknife(dimension, estimate, least=0.0, of_a_draw=True)
    sampling = None
    if len(estimate.matrices) > 1:
        (sampling,) = jackknife(lambda view: [_spread(estimate) / max(view.norm, TINY)], estimate)
    density = _density(estimate.whole.eigh[0])
    return Spectrum(trace, tuple(largest), effective, density, sampling)


def _spread(estimate: Estimate) -> float:
    """The root mean square of |A_k - A| over draws A_k (Frobenius)."""
    off = estimate.matrices - estimate.whole.matrix
    return float(np.sqrt(np.sum(off**2) / (len(off) - 1)))


def _density(values: np.ndarray) -> tuple[tuple[float, float], ...]:
    """Counts of eigenvalues in bins of their logarithm."""
    if not values.size or values[0] <= 0:
        return ()
    top = np.ceil(np.log10(values[0]) * _BINS) / _BINS
    edges = top + np.arange(-_DECADES * _BINS, 1) / _BINS
    counts, _ = np.histogram(np.log10(values[values > 10.0 ** edges[0]]), edges)
    middles = (edges[1:] + edges[:-1]) / 2
    return tuple((float(m), float(c)) for m, c in zip(middles, counts, strict=True))


def pair(one: Estimate, other: Estimate, damping: float, top: int, *, directions: bool) -> Pair:
    """The figures of two kinds, the first the reference."""

    def sizes(a: View, b: View) -> list[float]:
        norm = max(a.norm, TINY)
        off = b.matrix - a.matrix
        return [
            b.trace / max(a.trace, TINY),
            float(np.linalg.norm(off)) / norm,
            float(np.abs(np.linalg.eigvalsh(off)).max()) / max(a.eigh[0][0], TINY),
        ]

    def cosine(a: View, b: View) -> list[float]:
        return [float(np.sum(a.matrix * b.matrix)) / max(a.norm * b.norm, TINY)]

    count = min(top, one.rank, other.rank)

    def angles(a: View, b: View) -> np.ndarray:
        overlap = a.eigh[1][:, :count].T @ b.eigh[1][:, :count]
        found = np.linalg.svd(overlap, compute_uv=False)
        return np.degrees(np.arccos(np.clip(found, 0, 1)))

    trace_ratio, frobenius, spectral = jackknife(sizes, one, other, least=0.0)
    (cos,) = jackknife(cosine, one, other, least=-1.0, most=1.0)
    found = jackknife(angles, one, other, least=0.0, most=90.0)
    return Pair(
        trace_ratio,
        cos,
        tuple(Figure(v, e and _WIDER * e) for v, e in sorted(found, key=lambda f: f.value)),
        frobenius,
        spectral,
        _directions(one, other, damping) if directions else None,
    )


def _directions(one: Estimate, other: Estimate, damping: float) -> Directions:
    """What the two do to the gradient."""

    def cosine(a: View, b: View) -> list[float]:
        return [_cosine(a.direction(damping), b.direction(damping))]

    def numbers(a: View, b: View) -> list[float]:
        x, y = a.direction(damping), b.direction(damping)
        best = _model(a, x, damping)
        slope = float(a.gradient @ y)
        bend = float(y @ a.matrix @ y + damping * y @ y)
        return [
            float(np.linalg.norm(y) / max(float(np.linalg.norm(x)), TINY)),
            _model(a, y, damping) / _negative(best),
            -0.5 * slope**2 / max(bend, TINY) / _negative(best),
            agreement(a, b, max(one.resolution, other.resolution)),
        ]

    (cos,) = jackknife(cosine, one, other, least=-1.0, most=1.0, of_a_draw=True)
    length, decrease, best, agree = jackknife(numbers, one, other, of_a_draw=True)
    agree = agree._replace(value=max(agree.value, 0.0))
    return Directions(cos, length, decrease, best, agree)


def _model(a: View, x: np.ndarray, damping: float) -> float:
    """The quadratic model g'x + 1/2 x'(A + damping I)x."""
    return float(a.gradient @ x + 0.5 * (x @ a.matrix @ x + damping * x @ x))


def _negative(x: float) -> float:
    return min(x, -TINY)


def _cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / max(float(np.linalg.norm(x) * np.linalg.norm(y)), TINY))


def agreement(a: View, b: View, resolution: float) -> float:
    """The smallest damping from which on the directions' cosine is at least 0.99.

    Looked for by bisection above the last point of a grid, of 6 in a decade, where it is less; zero
    where it is nowhere less, down to `resolution` times the largest eigenvalue.
    """
    (values, u), (others, v) = a.eigh, b.eigh
    top = max(values[0], others[0])
    if top <= 0 or not a.gradient.any():
        return 0.0
    g, h, mixed = u.T @ a.gradient, v.T @ b.gradient, u.T @ v

    def disagree(damping: float) -> bool:
        x, y = g / (values + damping), h / (others + damping)
        product = float(x @ mixed @ y)
        return product < _AGREE * float(np.linalg.norm(x) * np.linalg.norm(y))

    grid = top * 10.0 ** np.arange(np.log10(resolution), 4, 1 / 6)
    bad: list[Any] = [i for i, damping in enumerate(grid) if disagree(damping)]
    if not bad:
        return 0.0
    if bad[-1] == len(grid) - 1:
        return float("inf")
    low, high = float(grid[bad[-1]]), float(grid[bad[-1] + 1])
    for _ in range(30):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if disagree(middle) else (low, middle)
    return high
