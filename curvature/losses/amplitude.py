"""Wave functions: the Fisher information of |psi|^2 from log-amplitudes at samples of it.

A wave function psi is a model of the density p = |psi|^2 / Z at samples x drawn from p itself, so
nothing is left to sample: with s = 2 grad log|psi|, the Fisher information of p is the covariance
of s. It is four times the Fubini-Study metric, the covariance of grad log|psi|; stochastic
reconfiguration (Sorella 1998) is natural gradient by either.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from curvature.losses.output import Elementwise, Targets, floating, shaped_like, tag


@dataclasses.dataclass(frozen=True)
class LogAmplitude(Elementwise):
    """A part of log psi at a sample of |psi|^2: F_z = 4.

    Its value is 2 d z, whose gradient is that of an energy if d is what the energy of the sample
    has more than the mean; the value itself is no energy.

    >>> import jax.numpy as jnp, curvature
    >>> curvature.losses.LogAmplitude().fisher_information(jnp.zeros(1), ())
    Array([4.], dtype=float32)
    """

    objective = False

    @property
    def name(self) -> str:
        """See `OutputLoss`."""
        return "log_amplitude"

    def value(self, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`."""
        return 2 * targets[0].astype(z.dtype) * z

    def score(self, z: jax.Array, targets: Targets) -> jax.Array:
        """The derivative of log |psi|^2, whatever the targets: samples are the model's own."""
        return jnp.full_like(z, 2)

    def sampled_score(self, key: jax.Array, z: jax.Array, targets: Targets) -> jax.Array:
        """See `OutputLoss`; only the sign, which no example's own product sees, is drawn."""
        return 2 * jax.random.rademacher(key, z.shape, z.dtype)

    def second_derivative(self, z: jax.Array, targets: Targets) -> jax.Array:
        """The Fisher information; the value's own second derivative is zero."""
        return jnp.full_like(z, 4)


def log_amplitude(
    log_psi: ArrayLike, deviations: ArrayLike | None = None, *, centered: bool = False
) -> jax.Array:
    """The log-amplitudes of a wave function at samples of |psi|^2, for variational Monte Carlo.

    With the local energies' deviations from their mean, the gradient of the mean of the result is
    the gradient of the energy, 2 E[Re(conj(E_L - E) grad log psi)]: one function for gradient and
    curvature. Without, it carries curvature alone, and gradients come from elsewhere.

    The curvature is the second moment of s = 2 grad log|psi|, and with a complex log psi that of
    twice the gradient of the phase as well: 4 E[Re(conj(grad log psi) grad log psi')]. kfac-jax's
    `register_normal_predictive_distribution`, by which FermiNet does the same, has half of it.

    Args:
      log_psi: log|psi| at samples, any shape, or complex log psi.
      deviations: local energies minus their mean (over all devices' samples, clipped as you like),
        same shape, complex with a complex log psi: no gradient is taken through them.
      centered: whether mean log-amplitudes are taken off, so that the curvature is the covariance
        of s and not its second moment: the Fisher information of the normalised density. Examples
        then meet: blocks of per-example gradients become estimates (see `register`'s table).

    Returns:
      2 Re(conj(deviation) log psi) for each sample, zero without deviations: no energies, and
      nothing to compare from step to step, which is why `LevenbergMarquardt` refuses it.

    Raises:
      TypeError: log_psi is not floating point or complex.
      ValueError: shapes differ.

    >>> import jax, jax.numpy as jnp, curvature
    >>> def loss_fn(params, x):  # of a harmonic oscillator, psi = exp(-a x^2), H = (p^2 + x^2) / 2
    ...     log_psi = lambda x: -params["a"] * x**2
    ...     slope, curve = jax.grad(log_psi), jax.grad(jax.grad(log_psi))
    ...     energy = jax.vmap(lambda x: (x**2 - curve(x) - slope(x) ** 2) / 2)(x)
    ...     return curvature.losses.log_amplitude(log_psi(x), energy - energy.mean()).mean()
    >>> x = jax.random.normal(jax.random.key(0), (1000,)) / 2**0.5  # a = 1/2 is the ground state
    >>> float(jnp.abs(jax.grad(loss_fn)({"a": 0.5}, x)["a"])) < 1e-4
    True
    """
    z = jnp.asarray(log_psi)
    parts, d = [z], jnp.zeros_like(z) if deviations is None else jnp.asarray(deviations)
    d = jax.lax.stop_gradient(shaped_like(z, d, "log_psi"))
    ds = [d.real if jnp.iscomplexobj(d) else d]
    if jnp.iscomplexobj(z):  # log|psi| and the phase: Re(conj(d) log psi) has both
        parts = [z.real, z.imag]
        ds = [d.real, d.imag] if jnp.iscomplexobj(d) else [d, jnp.zeros_like(d)]
    total: jax.Array | None = None
    for part, deviation in zip(parts, ds, strict=True):
        part = floating(part, "log_psi")
        if centered:
            part = part - part.mean()
        value = tag(LogAmplitude(), part, deviation)
        total = value if total is None else total + value
    assert total is not None
    return total
