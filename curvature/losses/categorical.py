"""Categorical outputs: the two softmax cross entropies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from curvature.losses.output import OutputLoss, Targets, floating, tag


@dataclasses.dataclass(frozen=True)
class Categorical(OutputLoss):
    """Categorical in its logits, with integer labels: H_z = F_z = m (diag q - q q').

    `q` are the probabilities and `m` is the total mass of the unit's target: 1, and 0 where no
    class is left. The targets are the labels and, where classes are masked, the mask; the Fisher
    needs no labels (`targets=()` will do without a mask).

    >>> import jax.numpy as jnp, curvature
    >>> family = curvature.losses.Categorical()
    >>> family.fisher_mvp(jnp.array([1.0, 0.0]), jnp.zeros(2), ())
    Array([ 0.25, -0.25], dtype=float32)
    """

    event_ndim = 1

    @property
    def name(self) -> str:
        """See `OutputLoss`."""
        return "softmax_cross_entropy_with_integer_labels"

    def value(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        labels, *where = targets
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            z, labels, where=where[0] if where else None
        )

    def score(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        mass = self.mass(z, targets)
        return mass * _probabilities(z, targets) - self._labels(z, targets)

    def sampled_score(self, key: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        q = _probabilities(z, targets)
        one_hot = jax.nn.one_hot(_drawn(key, q), z.shape[-1], dtype=z.dtype)
        return jnp.sqrt(jnp.abs(self.mass(z, targets))) * _masked(q - one_hot, targets)

    def hessian_mvp(self, vector: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        q = _probabilities(z, targets)
        scaled = q * vector
        return self.mass(z, targets) * (scaled - q * scaled.sum(-1, keepdims=True))

    def root(self, vector: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        # S = sqrt(m) (diag(sqrt q) - q sqrt(q)'):  S S' = m (diag q - q q')  because sum(q) = 1.
        q = _probabilities(z, targets)
        scaled = jnp.sqrt(q) * vector
        mass = self.mass(z, targets)
        return jnp.sqrt(jnp.abs(mass)) * (scaled - q * scaled.sum(-1, keepdims=True))

    def mass(self, z: jax.Array, targets: Targets) -> jax.Array:
        """The total mass m of the target, with a trailing axis of one."""
        if len(targets) > 1:  # a unit with no class left has loss zero
            return jnp.any(targets[1], axis=-1, keepdims=True).astype(z.dtype)
        return jnp.ones((*z.shape[:-1], 1), z.dtype)

    def _labels(self, z: jax.Array, targets: Targets) -> jax.Array:
        """The target's distribution over classes, times m."""
        one_hot = jax.nn.one_hot(targets[0], z.shape[-1], dtype=z.dtype)
        return one_hot * self.mass(z, targets)


@dataclasses.dataclass(frozen=True)
class SoftCategorical(Categorical):
    """Categorical in its logits, with target distributions or weights, of total mass m.

    The targets are the distributions, of the shape of z, and the mask if there is one. Labels
    smoothed over classes (`optax.smooth_labels`) keep m = 1 and so leave the curvature as it was. A
    negative mass is a weight, and counts by magnitude in all but H_z itself.
    """

    @property
    def name(self) -> str:
        """See `OutputLoss`."""
        return "softmax_cross_entropy"

    def value(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        labels, *where = targets
        return optax.losses.softmax_cross_entropy(z, labels, where=where[0] if where else None)

    def gauss_newton_mvp(self, vector: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        return jnp.sign(self.mass(z, targets)) * self.hessian_mvp(vector, z, targets)

    def mass(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `Categorical`."""
        return self._labels(z, targets).sum(-1, keepdims=True)

    def _labels(self, z: jax.Array, targets: Targets) -> jax.Array:
        return _masked(targets[0].astype(z.dtype), targets)


def _drawn(key: jax.Array, q: jax.Array) -> jax.Array:
    """A class of every distribution, `[...]` from `[..., classes]`; one random number each.

    `jax.random.categorical` takes one for every class, which are several arrays as large as the
    logits. Here the classes are dealt to about as many groups as each has members: first a group is
    drawn, then a member, so that none but `q` is.
    """
    classes = q.shape[-1]
    root = math.isqrt(classes - 1) + 1
    divisors = (n for n in range(root, root // 16, -1) if classes % n == 0)
    width = next(divisors, root)  # else a few classes of no weight are added
    padding = [(0, 0)] * (q.ndim - 1) + [(0, -classes % width)]
    groups = jnp.pad(q, padding).reshape((*q.shape[:-1], -1, width))
    sums = groups.sum(-1)
    left = jax.random.uniform(key, q.shape[:-1], q.dtype) * sums.sum(-1)
    group, left = _first_beyond(sums, left)
    chosen = _places(sums, group) == group[..., None]
    member, _ = _first_beyond(jnp.sum(groups, axis=-2, where=chosen[..., None]), left)
    return group * width + member


def _first_beyond(weights: jax.Array, left: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first entry up to which weights add up to more than `left`, and what is left before it.

    It has weight, also where rounding leaves more than there is.
    """
    total = jnp.cumsum(weights, axis=-1)
    last = weights.shape[-1] - 1 - jnp.argmax(jnp.flip(weights > 0, -1), axis=-1)
    found = jnp.minimum(jnp.sum(total <= left[..., None], axis=-1), last)
    before = _places(weights, found) < found[..., None]
    return found, left - jnp.sum(weights, axis=-1, where=before)


def _places(x: jax.Array, like: jax.Array) -> jax.Array:
    """The index of every entry along the last axis, in the dtype of other indices."""
    return jax.lax.broadcasted_iota(like.dtype, x.shape, x.ndim - 1)


def _masked(x: jax.Array, targets: Targets, fill: float = 0.0) -> jax.Array:
    return jnp.where(targets[1], x, fill) if len(targets) > 1 else x


def _probabilities(z: jax.Array, targets: Targets) -> jax.Array:
    # A unit with no class left has no curvature: 0, not 0/0.
    mask = targets[1] if len(targets) > 1 else None
    return _masked(jax.nn.softmax(z, where=mask), targets)


def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Cross entropy of a categorical distribution given by logits and integer labels.

    Args:
      logits: unnormalised log probabilities, shape `[..., classes]` (classes along `axis`).
      labels: integers in `[0, classes)`, shape of `logits` without `axis`.
      axis: the axis, or axes, of the classes.
      where: mask of the classes that count: the axes of `logits`, of any length 1; or one entry
        for every unit, without the axis of classes.

    Returns:
      The loss of every unit, shape of `labels`, as optax's function of the same name.

    >>> import jax.numpy as jnp, curvature
    >>> logits, labels = jnp.zeros((2, 4)), jnp.array([0, 3])
    >>> curvature.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    Array([1.3862944, 1.3862944], dtype=float32)
    """
    logits, mask = _classes_last(floating(logits, "logits"), axis, where)
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"labels have dtype {labels.dtype}, expected integers: "
            "use softmax_cross_entropy for probabilities."
        )
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels have shape {labels.shape}, expected {logits.shape[:-1]}: "
            "the shape of the logits without the axis of classes."
        )
    return tag(Categorical(), logits, labels, *mask)


def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | tuple[int, ...] | None = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Cross entropy of a categorical distribution given by logits, and target distributions.

    Args:
      logits: unnormalised log probabilities, shape `[..., classes]` (classes along `axis`).
      labels: target probabilities (or weights), broadcastable to `logits`.
      axis: the axis, or axes, of the classes; None for all of them.
      where: mask of the classes that count: the axes of `logits`, of any length 1; or one entry
        for every unit, without the axis of classes.

    Returns:
      The loss of every unit, shape `[...]`, as `optax.softmax_cross_entropy`.

    >>> import jax.numpy as jnp, curvature
    >>> logits, labels = jnp.zeros((1, 2)), jnp.array([[0.9, 0.1]])
    >>> curvature.losses.softmax_cross_entropy(logits, labels)
    Array([0.6931472], dtype=float32)
    """
    logits, labels = floating(logits, "logits"), jnp.asarray(labels)
    shape = jnp.broadcast_shapes(logits.shape, labels.shape)
    if logits.shape != shape and (
        axis != -1 or where is not None or logits.shape[-1:] != shape[-1:]
    ):
        raise ValueError(
            f"labels have shape {labels.shape}, expected one that broadcasts to the logits' "
            f"{logits.shape}."
        )
    logits, labels = jnp.broadcast_to(logits, shape), jnp.broadcast_to(labels, shape)
    axes = tuple(range(logits.ndim)) if axis is None else axis
    last, _ = _classes_last(labels, axes, None)
    logits, mask = _classes_last(logits, axes, where)
    return tag(SoftCategorical(), logits, last, *mask)


def _classes_last(
    x: jax.Array, axis: int | Sequence[int], where: ArrayLike | None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Moves the axes of classes to the end, as one axis; the mask likewise, broadcast to `x`."""
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if any(not -x.ndim <= a < x.ndim for a in axes) or len({a % x.ndim for a in axes}) < len(axes):
        raise ValueError(f"axis is {axis}, expected distinct axes of an array of shape {x.shape}.")
    axes = tuple(a % x.ndim for a in axes)

    def last(y: jax.Array) -> jax.Array:
        kept = [a for a in range(y.ndim) if a not in axes]
        if [*kept, *axes] == list(range(y.ndim)) and len(axes) == 1:
            return y
        return y.transpose([*kept, *axes]).reshape([y.shape[a] for a in kept] + [-1])

    if where is None:
        return last(x), ()
    mask = jnp.asarray(where)
    mask = mask if mask.ndim == x.ndim else jnp.expand_dims(mask, axes)
    return last(x), (last(jnp.broadcast_to(mask, x.shape)),)
