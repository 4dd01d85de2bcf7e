"""An output loss from the user's own functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from curvature.losses import autodiff
from curvature.losses.output import OutputLoss, Targets, floating, tag

Loss = Callable[..., jax.Array]
Sampler = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Custom(OutputLoss):
    """A loss given by functions of one unit; see `custom`.

    Attributes:
      loss: `loss(z, *targets)`, a scalar.
      event_ndim: the number of axes of one unit's z.
      sampler: `sampler(key, z, *targets)`, targets drawn from the model; None where unknown.
    """

    loss: Loss
    event_ndim: int = 0
    sampler: Sampler | None = None
    fisher_is_hessian = False

    @property
    def name(self) -> str:
        """See `OutputLoss`."""
        return "custom"

    def value(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        return self._over_units(self.loss, z)(z, *targets)

    def score(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        return self._over_units(jax.grad(self.loss), z)(z, *targets)

    def sampled_score(self, key: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        sampler = self.sampler
        if sampler is None:
            raise ValueError(
                "The Fisher of this custom loss was asked for, but how to draw targets from the "
                "model is unknown: pass custom(..., sampler=...), or use GaussNewton."
            )

        def one(key: jax.Array, z: jax.Array, *targets: jax.Array) -> jax.Array:
            drawn = sampler(key, z, *targets)
            drawn = drawn if isinstance(drawn, tuple) else (drawn,)
            if len(drawn) != len(targets):
                raise ValueError(
                    f"The sampler of a custom loss returned {len(drawn)} targets, expected "
                    f"{len(targets)}: one for each target, in a tuple."
                )
            return jax.grad(self.loss)(z, *drawn)

        keys = jax.random.split(key, z.shape[: z.ndim - self.event_ndim])
        return self._over_units(one, z)(keys, z, *targets)

    def hessian_mvp(self, vector: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        return self._hessian(autodiff.hessian_mvp, vector, z, targets)

    def gauss_newton_mvp(self, vector: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`; the S of `root` is symmetric."""
        return self.root(self.root(vector, z, targets), z, targets)

    def root(self, vector: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """S v for the symmetric S with S S' = H_z, H_z's negative eigenvalues set to zero."""
        return self._hessian(autodiff.psd_root, vector, z, targets)

    def fisher_mvp(self, vector: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """Raises ValueError: the Fisher is known by sampling only."""
        _no_exact_fisher()

    def fisher_root(self, vector: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """Raises ValueError: the Fisher is known by sampling only."""
        _no_exact_fisher()

    def _over_units(self, function: Callable[..., Any], z: jax.Array) -> Callable[..., Any]:
        return autodiff.over_units(function, z.ndim - self.event_ndim)

    def _hessian(
        self, apply: Callable[..., jax.Array], vector: jax.Array, z: jax.Array, targets: Targets
    ) -> jax.Array:
        def one(v: jax.Array, z: jax.Array, *targets: jax.Array) -> jax.Array:
            return apply(lambda z: self.loss(z, *targets), z, v)

        return self._over_units(one, z)(vector, z, *targets)


def _no_exact_fisher() -> NoReturn:
    raise ValueError(
        "The exact Fisher of a custom loss is not known, only samples of it: use "
        "Fisher(samples=k) with custom(..., sampler=...), or GaussNewton. Under QuadraticModel and "
        "LevenbergMarquardt, which need an exact matrix, use GaussNewton."
    )


def custom(
    loss: Loss, z: ArrayLike, *targets: ArrayLike, event_ndim: int, sampler: Sampler | None = None
) -> jax.Array:
    """An output loss of the user's own, given as a function of one unit.

    Its Hessian comes by automatic differentiation, as a dense matrix per unit; its negative
    eigenvalues are set to zero where a Gauss-Newton matrix is asked for. Its Fisher is known by
    sampling only. Nothing is taken for granted on how the two relate.

    Args:
      loss: `loss(z, *targets)`, a scalar; pure, and closing over no traced array: what varies is
        passed as a target. Called under `vmap`.
      z: the network's output, shape `units + event`.
      *targets: arrays with the axes `units` in front.
      event_ndim: the number of axes of one unit's z.
      sampler: `sampler(key, z, *targets)`, the targets of one unit drawn from the model: one array,
        or a tuple with as many entries as there are targets.

    Returns:
      The loss of every unit, shape `units`.

    Raises:
      TypeError: z is not floating point.
      ValueError: event_ndim or a target does not fit z, or the loss of a unit is no scalar. Later,
        where the Fisher is asked for without a sampler.

    >>> import jax, jax.numpy as jnp, curvature
    >>> def von_mises(angle, t):  # density proportional to exp(cos(t - angle))
    ...     return 1 - jnp.cos(t - angle)
    >>> z, t = jnp.zeros(2), jnp.array([0.0, jnp.pi])
    >>> curvature.losses.custom(von_mises, z, t, event_ndim=0)
    Array([0., 2.], dtype=float32)
    """
    z = floating(z, "outputs z")
    arrays = [jnp.asarray(t) for t in targets]
    if not 0 <= event_ndim <= z.ndim:
        raise ValueError(
            f"event_ndim is {event_ndim}, expected 0 to {z.ndim}: z has shape {z.shape}."
        )
    units = z.shape[: z.ndim - event_ndim]
    for i, t in enumerate(arrays):
        if t.shape[: len(units)] != units:
            raise ValueError(
                f"target {i} has shape {t.shape}, expected leading axes {units}: those of z, "
                f"{z.shape}, without the {event_ndim} of one unit."
            )
    family = Custom(loss, event_ndim, sampler)
    found = jax.eval_shape(family.value, z, tuple(arrays)).shape
    if found != units:
        raise ValueError(
            f"The custom loss of one unit has shape {found[len(units) :]}, expected a scalar: "
            "sum over the axes of one unit, or lower event_ndim."
        )
    return tag(family, z, *arrays)
