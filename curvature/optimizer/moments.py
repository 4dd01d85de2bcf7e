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
          ValueError: a part of the state is neither even nor odd in the gradient, or is not changed
            by one.
        """
        like = np.zeros((2, 3), np.float32)
        gradient = np.array([[0.5, -1.0, 2.0], [-0.3, 0.7, 1.5]], np.float32)
        with jax.ensure_compile_time_eval():
            start = inner.init(like)
            after = [inner.update(sign * gradient, start, like)[1] for sign in (1, -1)]
            by_entry = _by_entry(inner, like, gradient)
        leaves, structure = jax.tree.flatten(start)
        changed = [jax.tree.leaves(state) for state in after]
        return cls(structure, tuple(map(_moment, leaves, *changed)), by_entry)

    def split(self, state: PyTree) -> dict[Moment, tuple[PyTree, ...]]:
        """The vectors and the diagonals in a state."""
        parts = self.structure.flatten_up_to(state)
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
    """Whether two arrays of different lengths give what they give stacked."""
    pair = [gradient, 3 * gradient[::-1]]
    params = [like + 1, like + 5]
    alone = [inner.update(g, inner.init(p), p)[0] for g, p in zip(pair, params, strict=True)]
    both = np.stack(params)
    stacked = inner.update(np.stack(pair), inner.init(both), both)[0]
    return bool(np.allclose(stacked, np.stack(alone), rtol=1e-4))


def _moment(start: Any, plus: Any, minus: Any) -> Moment | None:
    if np.shape(start) != (2, 3):
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
