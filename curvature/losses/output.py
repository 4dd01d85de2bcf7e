"""What an output loss is, and the tag that marks one in a trace."""

from __future__ import annotations

import abc

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from curvature import _jax

Targets = tuple[jax.Array, ...]


class OutputLoss(abc.ABC):
    """One family of output losses l(z, t), on an output z and a tuple of targets.

    A *unit* is one entry of the loss's value. `z` has shape `units + event`, where `event` has
    `event_ndim` axes (1 for the classes of a softmax, 0 for elementwise losses), and every target
    has the axes `units` in front. All methods give quantities per unit, without the unit's weight;
    vectors have the shape of `z`. With p(t | z) the density of the family,

        H_z = Hessian of l in z at the given targets,
        F_z = E[s s'],  s = gradient of l in z at a target drawn from p(t | z).

    Attributes:
      event_ndim: the number of trailing axes of z that belong to one unit.
      fisher_is_hessian: whether F_z = H_z for all targets, as for every exponential family in its
        natural parameters (Martens 2020, section 9.2). Where not, `fisher_mvp` and `fisher_root`
        are the family's own.
      objective: whether its value is what is minimised. Where not, it carries curvature alone, and
        what compares values of the loss, as `LevenbergMarquardt` does, refuses it.
    """

    event_ndim: int = 0
    fisher_is_hessian: bool = True
    objective: bool = True

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The name of the public function that applies this family."""

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
    def hessian_mvp(self, vector: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """H_z v."""

    @abc.abstractmethod
    def root(self, vector: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """S v for a square S with S S' = H_z, or, where H_z is indefinite, what the family says."""

    def excess(self, z: jax.Array, targets: Targets) -> jax.Array:
        """By how much l is above its least value at these targets, shape `units`.

        Known of squared errors, whose outputs have units of their own, and zero elsewhere: the
        optimizers measure by it how far steps have to go.
        """
        del targets
        return jnp.zeros(z.shape[: z.ndim - self.event_ndim], z.dtype)

    def gauss_newton_mvp(self, vector: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """S S' v for the S of `root`: another matrix than H_z where that is indefinite."""
        return self.hessian_mvp(vector, z, targets)

    def fisher_mvp(self, vector: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """F_z v."""
        return self.gauss_newton_mvp(vector, z, targets)

    def fisher_root(self, vector: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """S v for a square S with S S' = F_z."""
        return self.root(vector, z, targets)


class Elementwise(OutputLoss):
    """A family with one output per unit: H_z and F_z are numbers."""

    @abc.abstractmethod
    def second_derivative(self, z: jax.Array, targets: Targets) -> jax.Array:
        """H_z, shape of `z`; where it is negative, Gauss-Newton matrices have zero."""

    def fisher_information(self, z: jax.Array, targets: Targets) -> jax.Array:
        """F_z, shape of `z`."""
        return self.second_derivative(z, targets)

    def hessian_mvp(self, vector: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        return self.second_derivative(z, targets) * vector

    def root(self, vector: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        return jnp.sqrt(jnp.maximum(self.second_derivative(z, targets), 0)) * vector

    def gauss_newton_mvp(self, vector: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        return jnp.maximum(self.second_derivative(z, targets), 0) * vector

    def fisher_mvp(self, vector: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        return self.fisher_information(z, targets) * vector

    def fisher_root(self, vector: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        return jnp.sqrt(self.fisher_information(z, targets)) * vector


def _value(z: jax.Array, *targets: jax.Array, loss: OutputLoss) -> jax.Array:
    value, units = loss.value(z, targets), z.shape[: z.ndim - loss.event_ndim]
    if value.shape != units:
        raise ValueError(
            f"The value of {loss.name} has shape {value.shape}, expected {units}: z's "
            f"{z.shape} without its event_ndim={loss.event_ndim} axes of one unit."
        )
    return value


TAG = "curvature_loss"
_primitive = _jax.tag_primitive(TAG, _value)


def tag(loss: OutputLoss, z: jax.Array, *targets: jax.Array) -> jax.Array:
    """The value of `loss` at `z` and `targets`, marked in the trace as an output loss.

    Raises:
      TypeError: `loss` is no instance of a subclass of `OutputLoss`, or cannot be hashed.
      ValueError: its value is not one number for every unit.
    """
    if not isinstance(loss, OutputLoss):
        raise TypeError(f"loss is {loss!r}, expected an instance of a subclass of OutputLoss.")
    try:
        hash(loss)
    except TypeError as error:
        raise TypeError(
            f"{type(loss).__name__} cannot be hashed: {error}. Arrays that a loss depends on are "
            "targets: tag(loss, z, *targets)."
        ) from error
    value: jax.Array = _primitive.bind(z, *targets, loss=loss)
    return value


# What the public functions ask of their arguments -------------------------------------------------


def floating(x: ArrayLike, name: str) -> jax.Array:
    """`x` as an array; raises TypeError where it is not floating point."""
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        instead = ""
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            instead = (
                " Stack the real and the imaginary part, jnp.stack([z.real, z.imag], -1); "
                "log-amplitudes have a loss of their own, curvature.losses.log_amplitude."
            )
        raise TypeError(f"{name} of dtype {array.dtype}, expected floating point.{instead}")
    return array


def shaped_like(z: jax.Array, targets: ArrayLike | None, name: str) -> jax.Array:
    """The targets of `z`, zeros where None; raises ValueError where their shape is another."""
    t = jnp.zeros_like(z) if targets is None else jnp.asarray(targets)
    if t.shape != z.shape:
        raise ValueError(f"targets have shape {t.shape}, expected {z.shape}, the shape of {name}.")
    return t


def positive(x: ArrayLike, name: str, z: jax.Array) -> jax.Array:
    """A positive constant of the family, in z's dtype and broadcast to its shape.

    Raises ValueError where it does not broadcast, or is a Python number that is not positive.
    """
    if isinstance(x, (int, float)) and not x > 0:
        raise ValueError(f"{name} is {x}, expected a positive number.")
    array = jnp.asarray(x)
    try:
        return jnp.broadcast_to(array.astype(z.dtype), z.shape)
    except ValueError as error:
        raise ValueError(
            f"{name} has shape {array.shape}, expected one that broadcasts to {z.shape}, the "
            "shape of the output."
        ) from error
