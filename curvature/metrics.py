"""Metrics on a network's output, and their pullbacks to its parameters.

A metric gives a positive semi-definite matrix G_z at every output z: how far apart z and z + dz
are, |dz|^2 = dz' G_z dz. Pulled back through z = f(w) it measures steps of the parameters by what
they do to the output,

    G_w = J' G_z J,   J = df/dw  (`pullback_mvp`),

which is the second-order expansion of a divergence between functions: rho(f(w + v), f(w)) =
1/2 v' G_w v + O(|v|^3). With the Fisher information of the output's family G_w is the Fisher
information of the parameters (Amari 1998); with the Hessian of a convex loss it is the generalised
Gauss-Newton matrix (Schraudolph 2002); where the loss is the negative log-likelihood of an
exponential family in its natural parameters these two are one (Martens 2020, section 9).

| metric                           | G_z                                              |
|----------------------------------|--------------------------------------------------|
| `Euclidean(scale)`               | scale times the identity                         |
| `FisherMetric(family)`           | the Fisher information of an output family       |
| `HessianMetric(family, targets)` | the Hessian of its loss at the targets           |
| `Bregman(phi)`                   | the Hessian of phi                               |
| `Divergence(rho)`                | the Hessian of rho(z, z') in z at z = z'         |

All functions are pure and take any pytree of parameters `w`; nothing of the size of G_w or G_z is
made, but by `pullback_metric`. Outputs have their unit axes (the batch) in front, and metrics are
block-diagonal over them.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from curvature.losses import OutputLoss, Targets, autodiff

PyTree = Any
Function = Callable[[PyTree], PyTree]


@runtime_checkable
class Metric(Protocol):
    """What gives G_z on an output space; `z`, `v` and the results have one shape."""

    def mvp(self, z: jax.Array, v: jax.Array) -> jax.Array:
        """G_z v."""
        ...

    def root(self, z: jax.Array, v: jax.Array) -> jax.Array:
        """S v for a square S with S S' = G_z."""
        ...


@dataclasses.dataclass(frozen=True)
class Euclidean:
    """A multiple of the identity: the distance of outputs as vectors.

    Attributes:
      scale: at least 0, in the inverse of z's units squared.

    Raises:
      ValueError: the scale is negative.

    >>> import jax.numpy as jnp, curvature
    >>> curvature.metrics.Euclidean(2.0).mvp(jnp.zeros(2), jnp.ones(2))
    Array([2., 2.], dtype=float32)
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.scale < 0:
            raise ValueError(f"scale is {self.scale}, expected at least 0.")

    def mvp(self, z: jax.Array, v: jax.Array) -> jax.Array:
        """See `Metric`."""
        del z
        return self.scale * v

    def root(self, z: jax.Array, v: jax.Array) -> jax.Array:
        """See `Metric`."""
        del z
        return self.scale**0.5 * v


@dataclasses.dataclass(frozen=True)
class _OfFamily:
    family: OutputLoss
    targets: Targets = ()
    weights: jax.Array | None = None

    def _weighted(self, product: jax.Array, power: float) -> jax.Array:
        if self.weights is None:
            return product
        units = product.shape[: product.ndim - self.family.event_ndim]
        weights = jnp.asarray(self.weights)
        if weights.shape != units:
            raise ValueError(
                f"weights have shape {weights.shape}, expected {units}: one for each unit of z."
            )
        scale = weights.astype(product.dtype) ** power
        return scale.reshape(units + (1,) * self.family.event_ndim) * product


class FisherMetric(_OfFamily):
    """The Fisher information F_z of an output family, in closed form.

    Attributes:
      family: an output family in `curvature.losses`, such as `Categorical()`.
      targets: what the family's methods take; most families need none (`OutputLoss`).
      weights: a factor for each unit, not negative; shape of z without the family's event axes.

    Raises:
      ValueError: the weights have another shape, or the family's Fisher is not known.

    >>> import jax.numpy as jnp, curvature
    >>> metric = curvature.metrics.FisherMetric(curvature.losses.Categorical())
    >>> metric.mvp(jnp.zeros(2), jnp.array([1.0, 0.0]))
    Array([ 0.25, -0.25], dtype=float32)
    """

    def mvp(self, z: jax.Array, v: jax.Array) -> jax.Array:
        """See `Metric`."""
        return self._weighted(self.family.fisher_mvp(v, z, self.targets), 1.0)

    def root(self, z: jax.Array, v: jax.Array) -> jax.Array:
        """See `Metric`."""
        return self._weighted(self.family.fisher_root(v, z, self.targets), 0.5)


class HessianMetric(_OfFamily):
    """The Hessian H_z of a family's loss at given targets, in closed form.

    A metric where H_z is positive semi-definite. Where it is not (`HeteroscedasticGaussian`,
    `Custom`), `mvp` is still H_z, and `root` that of the positive semi-definite matrix the family
    puts in its place.

    Attributes:
      family: an output family in `curvature.losses`, such as `Exponential()`.
      targets: a tuple, as the family's methods take them.
      weights: a factor for each unit, not negative; shape of z without the family's event axes.

    Raises:
      ValueError: the weights have another shape.

    >>> import jax.numpy as jnp, curvature
    >>> metric = curvature.metrics.HessianMetric(curvature.losses.Exponential(), (jnp.ones(1) * 3,))
    >>> metric.mvp(jnp.zeros(1), jnp.ones(1))
    Array([3.], dtype=float32)
    """

    def mvp(self, z: jax.Array, v: jax.Array) -> jax.Array:
        """See `Metric`."""
        return self._weighted(self.family.hessian_mvp(v, z, self.targets), 1.0)

    def root(self, z: jax.Array, v: jax.Array) -> jax.Array:
        """See `Metric`."""
        return self._weighted(self.family.root(v, z, self.targets), 0.5)


class _Induced(abc.ABC):
    """What divergences share: the value and the Hessian of each unit."""

    event_ndim: int

    @abc.abstractmethod
    def _between(self, z: jax.Array, other: jax.Array) -> jax.Array:
        """The divergence of one unit."""

    @abc.abstractmethod
    def _around(self, z: jax.Array) -> autodiff.Scalar:
        """A function of one unit whose Hessian at `z` is G_z."""

    def __call__(self, z: jax.Array, other: jax.Array) -> jax.Array:
        """The divergence of every unit: shape of `z` without its last `event_ndim` axes."""
        return self._over_units(self._between, z)(z, other)

    def mvp(self, z: jax.Array, v: jax.Array) -> jax.Array:
        """See `Metric`."""
        return self._hessian(autodiff.hessian_mvp, z, v)

    def root(self, z: jax.Array, v: jax.Array) -> jax.Array:
        """See `Metric`; S is symmetric, from a dense matrix and its eigenvectors for every unit."""
        return self._hessian(autodiff.psd_root, z, v)

    def _hessian(self, apply: Callable[..., jax.Array], z: jax.Array, v: jax.Array) -> jax.Array:
        return self._over_units(lambda z, v: apply(self._around(z), z, v), z)(z, v)

    def _over_units(self, function: Callable[..., Any], z: jax.Array) -> Callable[..., Any]:
        if z.ndim < self.event_ndim:
            raise ValueError(
                f"z has shape {z.shape}, expected at least {self.event_ndim} axes: event_ndim is "
                "the number of axes that the function of one unit takes."
            )
        return autodiff.over_units(function, z.ndim - self.event_ndim)


@dataclasses.dataclass(frozen=True)
class Divergence(_Induced):
    """A divergence rho(z, z') of two outputs, and the metric it induces: its Hessian at z = z'.

    rho has to be smooth, with a minimum at z = z'. Where it is not, negative eigenvalues are set to
    zero in `root`, and only there.

    Attributes:
      rho: `rho(z, z')`, a scalar, of one unit.
      event_ndim: the number of axes of one unit's z; axes in front of them are mapped over.

    Raises:
      ValueError: z has fewer axes than `event_ndim`.

    >>> import jax.numpy as jnp, curvature
    >>> def hellinger(z, other):  # between Poisson distributions of log rates z and other
    ...     return 2 * jnp.sum((jnp.exp(z / 2) - jnp.exp(other / 2)) ** 2)
    >>> curvature.metrics.Divergence(hellinger).mvp(jnp.zeros(1), jnp.ones(1))
    Array([1.], dtype=float32)
    """

    rho: Callable[[jax.Array, jax.Array], jax.Array]
    event_ndim: int = 1

    def _between(self, z: jax.Array, other: jax.Array) -> jax.Array:
        return self.rho(z, other)

    def _around(self, z: jax.Array) -> autodiff.Scalar:
        return lambda moved: self.rho(moved, z)


@dataclasses.dataclass(frozen=True)
class Bregman(_Induced):
    """The divergence phi(z) - phi(z') - <grad phi(z'), z - z'>; its metric is phi's Hessian.

    For the log-partition function A of an exponential family in natural parameters it is a
    Kullback-Leibler divergence with the arguments exchanged, D_A(z, z') = KL(p_z' || p_z), and the
    metric is the Fisher information (Amari 2016, chapter 1). `kl` has the arguments in KL's order.

    Attributes:
      phi: a strictly convex function of one unit's z, a scalar.
      event_ndim: the number of axes of one unit's z; axes in front of them are mapped over.

    Raises:
      ValueError: z has fewer axes than `event_ndim`.

    >>> import jax.numpy as jnp, curvature
    >>> bregman = curvature.metrics.Bregman(lambda z: jnp.sum(z**2))
    >>> bregman(jnp.array([3.0, 0.0]), jnp.array([1.0, 1.0]))
    Array(5., dtype=float32)
    """

    phi: Callable[[jax.Array], jax.Array]
    event_ndim: int = 1

    def _between(self, z: jax.Array, other: jax.Array) -> jax.Array:
        value, slope = jax.value_and_grad(self.phi)(other)
        return self.phi(z) - value - jnp.sum(slope * (z - other))

    def _around(self, z: jax.Array) -> autodiff.Scalar:
        return self.phi


def kl(
    log_partition: Callable[[jax.Array], jax.Array],
    z: jax.Array,
    other: jax.Array,
    event_ndim: int = 1,
) -> jax.Array:
    """KL(p_z || p_other) within an exponential family, in nats.

    Args:
      log_partition: the log-partition function of one unit: `jax.nn.logsumexp` for categorical
        logits; with event_ndim 0, `jax.nn.softplus` for Bernoulli logits, `jnp.exp` for Poisson log
        rates, `lambda z: z**2 / 2` for Gaussian means of unit variance.
      z: natural parameters, shape `units + event`.
      other: natural parameters, the same shape.
      event_ndim: the number of axes of one unit's z.

    Returns:
      The divergence of every unit, shape `units`.

    >>> import jax, jax.numpy as jnp, curvature
    >>> p, q = jnp.array([0.5, 0.5]), jnp.array([0.9, 0.1])
    >>> bool(jnp.allclose(curvature.metrics.kl(jax.nn.logsumexp, jnp.log(p), jnp.log(q)),
    ...                   jnp.sum(p * jnp.log(p / q))))
    True
    """
    return Bregman(log_partition, event_ndim)(other, z)


# Between the parameters and the output ------------------------------------------------------------


def pushforward(f: Function, w: PyTree, v: PyTree) -> PyTree:
    """J v: what a step v of the parameters does to the output, to first order.

    Args:
      f: `f(w)`, an array or a pytree of arrays.
      w: parameters.
      v: a vector, the structure of `w`.

    Returns:
      The structure of `f(w)`.

    >>> import jax.numpy as jnp, curvature
    >>> curvature.metrics.pushforward(jnp.square, jnp.array([3.0]), jnp.array([1.0]))
    Array([6.], dtype=float32)
    """
    return jax.jvp(f, (w,), (v,))[1]


def pullback(f: Function, w: PyTree, covector: PyTree) -> PyTree:
    """J' c: a covector of the output, such as a loss's gradient in z, as one of the parameters.

    Args:
      f: `f(w)`, an array or a pytree of arrays.
      w: parameters.
      covector: the structure of `f(w)`.

    Returns:
      The structure of `w`.

    >>> import jax.numpy as jnp, curvature
    >>> curvature.metrics.pullback(jnp.square, jnp.array([3.0]), jnp.array([1.0]))
    Array([6.], dtype=float32)
    """
    return jax.vjp(f, w)[1](covector)[0]


def pullback_mvp(f: Function, metric: PyTree, w: PyTree, v: PyTree) -> PyTree:
    """J' G J v: the pullback metric at `w`, times a vector; one forward and one backward pass.

    Args:
      f: `f(w)`, an array or a pytree of arrays.
      metric: a `Metric`, for every array of the output; or a pytree of them, the output's structure
        or a prefix of it; or a function `rho(z, z')`, a scalar, of whole outputs.
      w: parameters.
      v: a vector, the structure of `w`.

    Returns:
      The structure of `w`.

    Raises:
      TypeError: `metric` is none of these.

    >>> import jax.numpy as jnp, curvature
    >>> curvature.metrics.pullback_mvp(
    ...     jnp.square, curvature.metrics.Euclidean(), jnp.array([3.0]), jnp.array([1.0]))
    Array([36.], dtype=float32)
    """
    if callable(metric) and not isinstance(metric, Metric):
        return _sandwich(f, lambda z: lambda moved: metric(moved, z), w, v)
    return _sandwich(f, metric, w, v)


def gauss_newton_mvp(f: Function, loss: PyTree, w: PyTree, v: PyTree) -> PyTree:
    """J' H J v: the generalised Gauss-Newton matrix of loss(f(w)), times a vector.

    Schraudolph (2002), with one forward and one backward pass of f. The second derivative of the
    loss is taken in z alone: in closed form where `loss` is a `HessianMetric`, else forward over
    reverse.

    Args:
      f: `f(w)`, an array or a pytree of arrays.
      loss: a function of the output, a scalar; or a metric as `pullback_mvp` takes it.
      w: parameters.
      v: a vector, the structure of `w`.

    Returns:
      The structure of `w`.

    Raises:
      TypeError: `loss` is neither.

    >>> import jax.numpy as jnp, curvature
    >>> curvature.metrics.gauss_newton_mvp(
    ...     jnp.square, lambda z: jnp.sum(z**2), jnp.array([3.0]), jnp.array([1.0]))
    Array([72.], dtype=float32)
    """
    if callable(loss) and not isinstance(loss, Metric):
        return _sandwich(f, lambda z: loss, w, v)
    return _sandwich(f, loss, w, v)


def hessian_mvp(loss: Callable[[PyTree], jax.Array], w: PyTree, v: PyTree) -> PyTree:
    """The Hessian of loss(w), times a vector: forward over reverse (Pearlmutter 1994).

    Args:
      loss: a function of the parameters, a scalar.
      w: parameters.
      v: a vector, the structure of `w`.

    Returns:
      The structure of `w`.

    >>> import jax.numpy as jnp, curvature
    >>> curvature.metrics.hessian_mvp(lambda w: jnp.sum(w**3), jnp.array([2.0]), jnp.array([1.0]))
    Array([12.], dtype=float32)
    """
    return jax.jvp(jax.grad(loss), (w,), (v,))[1]


def pullback_metric(f: Function, metric: PyTree, w: PyTree) -> jax.Array:
    """J' G J as a dense matrix, for small problems: `pullback_mvp` on every unit vector.

    Args:
      f: `f(w)`, an array or a pytree of arrays.
      metric: as `pullback_mvp` takes it.
      w: parameters, of n entries in all.

    Returns:
      Shape `[n, n]`, in the order of `jax.flatten_util.ravel_pytree(w)`.

    >>> import jax.numpy as jnp, curvature
    >>> w = {"a": jnp.array(1.0), "b": jnp.array(2.0)}
    >>> curvature.metrics.pullback_metric(
    ...     lambda w: jnp.stack([w["a"] * w["b"]]), curvature.metrics.Euclidean(), w)
    Array([[4., 2.],
           [2., 1.]], dtype=float32)
    """
    flat, unravel = ravel_pytree(w)

    def row(v: jax.Array) -> jax.Array:
        return ravel_pytree(pullback_mvp(f, metric, w, unravel(v)))[0]

    return jax.vmap(row)(jnp.eye(flat.size, dtype=flat.dtype))


def _sandwich(f: Function, metric: PyTree, w: PyTree, v: PyTree) -> PyTree:
    """J' G J v, with one linearisation of f for both products.

    `metric` is a tree of metrics, or makes of z a function of the output whose Hessian at z is G.
    """
    z, push = jax.linearize(f, w)
    jv = push(v)
    if callable(metric) and not isinstance(metric, Metric):
        gjv = jax.jvp(jax.grad(metric(z)), (z,), (jv,))[1]
    else:
        gjv = _apply(metric, z, jv)
    return jax.linear_transpose(push, w)(gjv)[0]


def _apply(metrics: PyTree, z: PyTree, v: PyTree) -> PyTree:
    """G v on trees: every metric on all arrays of the subtree that it stands for."""

    def one(metric: Any, z: PyTree, v: PyTree) -> PyTree:
        if not isinstance(metric, Metric):
            raise TypeError(
                f"{metric!r} is a {type(metric).__name__}, expected a metric (with methods `mvp` "
                "and `root`), a tree of them with the output's structure, or a function."
            )
        return jax.tree.map(metric.mvp, z, v)

    return jax.tree.map(one, metrics, z, v, is_leaf=lambda x: isinstance(x, Metric))
