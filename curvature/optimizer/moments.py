"""What an optax transformation keeps of its updates, and how that follows a change of coordinates.

Parts of a state that are trees like the parameters are told apart by what one update does to them:
what changes its sign with the gradient is a vector, as the mean of Adam is; what does not is the
diagonal of an operator, as the mean square is. Both are found by a trial on a small matrix.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import numpy as np
import optax

PyTree = Any
Moment = Literal["vector", "diagonal"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where in the state of a transformation trees like the parameters are.

    Attributes:
      structure: of the state with a leaf in the place of each such tree.
      moments: of each leaf of that structure, what it is; None for what depends on no coordinates.
      by_entry: whether an update does to one array what it does to two that are stacked: then it
        may see all layers of a shape as one array.
    """

    structure: Any
    moments: tuple[Moment | None, ...]
    by_entry: bool = True

    @classmethod
    def of(cls, inner: optax.GradientTransformation) -> Layout:
        """The layout of a transformation's state.

        Raises:
          ValueError: a part of the state is neither even nor odd in the gradient, is not changed by
            one, or has another shape for as many entries; or a hyperparameter is traced.
        """
        like = np.zeros((2, 3), np.float32)
        gradient = np.array([[0.5, -1.0, 2.0], [-0.3, 0.7, 1.5]], np.float32)
        try:
            with jax.ensure_compile_time_eval():
                start = inner.init(like)
                after = [inner.update(sign * gradient, start, like)[1] for sign in (1, -1)]
                by_entry = _by_entry(inner, like, gradient)
        except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError) as error:
            raise ValueError(
                "A hyperparameter of the inner transformation is traced, and what its state is to "
                "a change of basis is found by a trial, which needs numbers. Put a traced learning "
                "rate behind: optax.chain(in_eigenbasis(...), optax.scale_by_learning_rate(rate))."
            ) from error
        leaves, structure = jax.tree.flatten(start)
        changed = [jax.tree.leaves(state) for state in after]
        return cls(structure, tuple(map(_moment, leaves, *changed)), by_entry)

    def split(self, state: PyTree) -> dict[Moment, tuple[PyTree, ...]]:
        """The vectors and the diagonals in a state."""
        try:
            parts = self.structure.flatten_up_to(state)
        except ValueError as error:
            raise ValueError(
                "The inner transformation's state for these parameters is built in another way "
                "than that for one matrix, so that it is not known what would have to follow a "
                f"change of basis: {error}"
            ) from error
        pairs = list(zip(parts, self.moments, strict=True))
        return {
            kind: tuple(part for part, moment in pairs if moment == kind)
            for kind in ("vector", "diagonal")
        }

    def joined(self, state: PyTree, moved: dict[Moment, tuple[PyTree, ...]]) -> PyTree:
        """The state with other vectors and diagonals."""
        rest = {kind: iter(trees) for kind, trees in moved.items()}
        parts = self.structure.flatten_up_to(state)
        pairs = zip(parts, self.moments, strict=True)
        return self.structure.unflatten([next(rest[m]) if m else part for part, m in pairs])


def _by_entry(inner: optax.GradientTransformation, like: Any, gradient: Any) -> bool:
    """Whether two arrays of different lengths give what they give stacked.

    Also where thresholds are passed, and at the second step: the first rate of a schedule is
    often zero.
    """
    gradients, params = [gradient, 3 * gradient[::-1]], [like + 1, like + 5]
    inputs = [*zip(gradients, params, strict=True), (np.stack(gradients), np.stack(params))]

    def updates(scale: float) -> list[Any]:
        states = [inner.init(p) for _, p in inputs]
        found = []
        for _ in range(2):
            both = [inner.update(scale * g, s, p) for (g, p), s in zip(inputs, states, strict=True)]
            states = [s for _, s in both]
            found.append([np.asarray(u) for u, _ in both])
        return found

    every = [step for scale in (1.0, 1e6) for step in updates(scale)]
    return all(np.allclose(both, np.stack(alone), rtol=1e-4, atol=0) for *alone, both in every)


def _moment(start: Any, plus: Any, minus: Any) -> Moment | None:
    if np.shape(start) != (2, 3):
        if np.size(start) == 6:
            raise ValueError(
                f"A part of the inner transformation's state has the shape {np.shape(start)} for a "
                "matrix of (2, 3), and its entries mix when the basis changes: what it is in other "
                "coordinates is not known. Take the transformation without optax.flatten."
            )
        return None
    up, down = np.asarray(plus) - np.asarray(start), np.asarray(minus) - np.asarray(start)
    even, odd = np.allclose(up, down, rtol=1e-4), np.allclose(up, -down, rtol=1e-4)
    if even == odd:  # both where the update changes nothing
        raise ValueError(
            "A part of the inner transformation's state is neither odd in the gradient, as a "
            "momentum is, nor even, as a second moment is, or its first update does not change it: "
            "what it is in other coordinates is not known."
        )
    return "vector" if odd else "diagonal"
