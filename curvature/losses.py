"""Output losses: compute the loss and tag it.

Each function has the name, arguments, result shape and value of its namesake in `optax.losses`
(per-example or elementwise values, no reduction) and marks its arguments in the trace, so that
`curvature.register` knows where the network ends and which metric its output space carries. The
reduction stays in the user's hands: the weight of every value is read off as w = dL/dl.

An output loss is the negative log-likelihood l(z, t) = -log p(t | z) of a family in its natural
parameters z, so its Hessian in z is the Fisher information of that family (Martens 2020, section
9.2): F_z = H_z, and the exact Fisher *is* the Gauss-Newton matrix.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from curvature import _jax

Targets = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class OutputLoss(abc.ABC):
    """One family of output losses, on an output z and a tuple of targets.

    A *unit* is one entry of the loss's value. `z` has shape `units + event`, where `event` has
    `event_ndim` axes (1 for the classes of a softmax, 0 for elementwise losses). All methods give
    quantities per unit, without the unit's weight.
    """

    event_ndim: ClassVar[int] = 0
    _name: ClassVar[str] = ""

    @property
    def name(self) -> str:
        """The name of the public function that applies this family."""
        return self._name

    @abc.abstractmethod
    def value(self, z: jax.Array, targets: Targets) -> jax.Array:
        """The loss l(z, t), shape `units`."""

    @abc.abstractmethod
    def score(self, z: jax.Array, targets: Targets) -> jax.Array:
        """The gradient of l in z at the given targets, shape of `z`."""

    @abc.abstractmethod
    def sampled_score(self, key: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """The gradient of l in z at targets drawn from p(t | z): E[s s'] = F_z per unit."""

    @abc.abstractmethod
    def root(self, vector: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """S v for the analytic square root S S' = H_z; all have the shape of `z`."""


@dataclasses.dataclass(frozen=True)
class _Softmax(OutputLoss):
    """What the two softmax losses share: the family is categorical, H_z = m (diag q - q q').

    `m` is the total mass of the unit's target (1 for integer labels and for a distribution). The
    targets are the labels and, where classes are masked, the mask.
    """

    event_ndim: ClassVar[int] = 1

    @abc.abstractmethod
    def _target(self, z: jax.Array, targets: Targets) -> tuple[jax.Array, jax.Array]:
        """The target's distribution over classes times m, and m with a trailing axis of one."""

    @staticmethod
    def _masked(x: jax.Array, targets: Targets, fill: float = 0.0) -> jax.Array:
        return jnp.where(targets[1], x, fill) if len(targets) > 1 else x

    def _probabilities(self, z: jax.Array, targets: Targets) -> jax.Array:
        # A unit with no class left has no curvature: 0, not 0/0.
        mask = targets[1] if len(targets) > 1 else None
        return self._masked(jax.nn.softmax(z, where=mask), targets)

    def score(self, z: jax.Array, targets: Targets) -> jax.Array:
        target, mass = self._target(z, targets)
        return mass * self._probabilities(z, targets) - target

    def sampled_score(self, key: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        _, mass = self._target(z, targets)
        drawn = jax.random.categorical(key, self._masked(z, targets, -jnp.inf))
        one_hot = jax.nn.one_hot(drawn, z.shape[-1], dtype=z.dtype)
        return jnp.sqrt(mass) * self._masked(self._probabilities(z, targets) - one_hot, targets)

    def root(self, vector: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        # S = sqrt(m) (diag(sqrt q) - q sqrt(q)'):  S S' = m (diag q - q q')  because sum(q) = 1.
        _, mass = self._target(z, targets)
        q = self._probabilities(z, targets)
        scaled = jnp.sqrt(q) * vector
        return jnp.sqrt(mass) * (scaled - q * scaled.sum(-1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class _SoftmaxInteger(_Softmax):
    _name: ClassVar[str] = "softmax_cross_entropy_with_integer_labels"

    def value(self, z: jax.Array, targets: Targets) -> jax.Array:
        labels, *where = targets
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            z, labels, where=where[0] if where else None
        )

    def _target(self, z: jax.Array, targets: Targets) -> tuple[jax.Array, jax.Array]:
        one_hot = jax.nn.one_hot(targets[0], z.shape[-1], dtype=z.dtype)
        mass = jnp.ones((*z.shape[:-1], 1), z.dtype)
        if len(targets) > 1:  # a unit with no class left has loss zero
            mass = jnp.any(targets[1], axis=-1, keepdims=True).astype(z.dtype)
        return one_hot * mass, mass


@dataclasses.dataclass(frozen=True)
class _SoftmaxSoft(_Softmax):
    _name: ClassVar[str] = "softmax_cross_entropy"

    def value(self, z: jax.Array, targets: Targets) -> jax.Array:
        labels, *where = targets
        return optax.losses.softmax_cross_entropy(z, labels, where=where[0] if where else None)

    def _target(self, z: jax.Array, targets: Targets) -> tuple[jax.Array, jax.Array]:
        labels = self._masked(targets[0].astype(z.dtype), targets)
        return labels, labels.sum(-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class _Sigmoid(OutputLoss):
    """Bernoulli in its logit: H_z = q (1 - q), whatever the (possibly soft) label."""

    _name: ClassVar[str] = "sigmoid_binary_cross_entropy"

    def value(self, z: jax.Array, targets: Targets) -> jax.Array:
        return optax.losses.sigmoid_binary_cross_entropy(z, targets[0])

    def score(self, z: jax.Array, targets: Targets) -> jax.Array:
        return jax.nn.sigmoid(z) - targets[0].astype(z.dtype)

    def sampled_score(self, key: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        del targets
        q = jax.nn.sigmoid(z)
        return q - jax.random.bernoulli(key, q).astype(z.dtype)

    def root(self, vector: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        del targets
        # sigmoid(-z) rather than 1 - sigmoid(z): no cancellation for large z.
        return jnp.sqrt(jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)) * vector


@dataclasses.dataclass(frozen=True)
class _Squared(OutputLoss):
    """Gaussian in its mean: l = precision/2 (z - t)^2, H_z = precision."""

    precision: int

    @property
    def name(self) -> str:
        return {1: "l2_loss", 2: "squared_error"}[self.precision]

    def value(self, z: jax.Array, targets: Targets) -> jax.Array:
        loss = optax.losses.squared_error if self.precision == 2 else optax.losses.l2_loss
        return loss(z, targets[0])

    def score(self, z: jax.Array, targets: Targets) -> jax.Array:
        return self.precision * (z - targets[0].astype(z.dtype))

    def sampled_score(self, key: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        return self.root(jax.random.normal(key, z.shape, z.dtype), z, targets)

    def root(self, vector: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        del z, targets
        return jnp.sqrt(jnp.asarray(self.precision, vector.dtype)) * vector


def _value(z: jax.Array, *targets: jax.Array, loss: OutputLoss) -> jax.Array:
    return loss.value(z, targets)


TAG = "curvature_loss"
_primitive = _jax.tag_primitive(TAG, _value)


def tag(loss: OutputLoss, z: jax.Array, *targets: jax.Array) -> jax.Array:
    """The value of `loss` at `z` and `targets`, marked in the trace as an output loss."""
    value: jax.Array = _primitive.bind(z, *targets, loss=loss)
    return value


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
      where: mask of the classes that count, broadcastable to `logits`.

    Returns:
      The loss of every unit, shape of `labels`, as optax's function of the same name.

    >>> import jax.numpy as jnp, curvature
    >>> logits, labels = jnp.zeros((2, 4)), jnp.array([0, 3])
    >>> curvature.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    Array([1.3862944, 1.3862944], dtype=float32)
    """
    logits, mask = _classes_last(_floating(logits, "logits"), axis, where)
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
    return tag(_SoftmaxInteger(), logits, labels, *mask)


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
      where: mask of the classes that count, broadcastable to `logits`.

    Returns:
      The loss of every unit, shape `[...]`, as `optax.softmax_cross_entropy`.
    """
    logits, labels = _floating(logits, "logits"), jnp.asarray(labels)
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
    return tag(_SoftmaxSoft(), logits, last, *mask)


def sigmoid_binary_cross_entropy(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Elementwise cross entropy of Bernoulli variables given by logits.

    Args:
      logits: log odds, any shape.
      labels: 0, 1, or probabilities; broadcast against `logits`.

    Returns:
      Elementwise losses, as `optax.sigmoid_binary_cross_entropy`.
    """
    z, labels = jnp.broadcast_arrays(_floating(logits, "logits"), jnp.asarray(labels))
    return tag(_Sigmoid(), z, labels)


def l2_loss(predictions: ArrayLike, targets: ArrayLike | None = None) -> jax.Array:
    """Elementwise 1/2 (prediction - target)^2: a Gaussian of unit variance.

    Args:
      predictions: any shape.
      targets: same shape; zero where None.

    Returns:
      Elementwise losses, as `optax.l2_loss`.
    """
    return _squared(1, predictions, targets)


def squared_error(predictions: ArrayLike, targets: ArrayLike | None = None) -> jax.Array:
    """Elementwise (prediction - target)^2: a Gaussian of variance 1/2.

    Args:
      predictions: any shape.
      targets: same shape; zero where None.

    Returns:
      Elementwise losses, as `optax.squared_error`.
    """
    return _squared(2, predictions, targets)


def _squared(precision: int, predictions: ArrayLike, targets: ArrayLike | None) -> jax.Array:
    z = _floating(predictions, "predictions")
    t = jnp.zeros_like(z) if targets is None else jnp.asarray(targets)
    if t.shape != z.shape:
        raise ValueError(f"targets have shape {t.shape}, expected the predictions' {z.shape}.")
    return tag(_Squared(precision), z, t)


def _floating(x: ArrayLike, name: str) -> jax.Array:
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} have dtype {array.dtype}, expected floating point.")
    return array


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
