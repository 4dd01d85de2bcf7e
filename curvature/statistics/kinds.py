"""Kinds of curvature: what is averaged.

The curvature of a loss is G = sum_i w_i J_i' G_z(z_i) J_i over units i, with w_i = dL/dl_i. Every
kind is a choice of random (or enumerated) cotangents v at the network's output with E[v v'] = G_z:

| kind                    | v at the output z                       | passes                   |
|-------------------------|-----------------------------------------|--------------------------|
| `Fisher(samples=k)`     | score at targets sampled from the model | k                        |
| `Fisher(samples=None)`  | the columns of F_z^(1/2)                | entries of z per example |
| `EmpiricalFisher()`     | score at the targets in the data        | 1                        |
| `GaussNewton(probes=k)` | H_z^(1/2) times random signs            | k                        |
| `GaussNewton()`         | the columns of H_z^(1/2)                | entries of z per example |

`GaussNewton(metric=...)` puts the G_z of any metric (`curvature.metrics`) in the place of H_z.
F_z and H_z are the same for most losses; `curvature.losses` says for which they are not.

`EmpiricalFisher` is no approximation of the others: it converges to another matrix (Kunstner,
Balles and Hennig 2019).

Weights enter as sqrt(|w|): a unit with negative weight counts as if it were positive, so that the
result stays positive semi-definite.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from curvature.losses import OutputLoss, Targets
from curvature.metrics import Metric
from curvature.trace import LossTag

Draw = Any  # the randomness or selection of one loss tag in one pass: a pytree of arrays


@runtime_checkable
class Kind(Protocol):
    """A source of output cotangents."""

    @property
    def averaged(self) -> bool:
        """Whether the results of several passes are averaged (samples) or summed (columns)."""
        ...

    def needs_key(self, *, pooled: bool) -> bool:
        """Whether `draw` needs a random key.

        Args:
          pooled: whether some block sees cotangents of several examples added up, so that those of
            different examples have to be uncorrelated.
        """
        ...

    def draw(self, losses: Sequence[LossTag], key: jax.Array | None) -> tuple[Draw, ...]:
        """For every loss tag, arrays with leading axes `(passes, *lead)`."""
        ...

    def cotangent(self, tag: LossTag, draw: Draw, z: jax.Array, targets: Targets) -> jax.Array:
        """The cotangent v at z, for units of weight one."""
        ...

    def root(
        self, loss: OutputLoss, vector: jax.Array, z: jax.Array, targets: Targets
    ) -> jax.Array:
        """S v for a square S with S S' = G_z: what the quadratic model of a step measures by."""
        ...


@dataclasses.dataclass(frozen=True)
class GaussNewton:
    """The generalised Gauss-Newton matrix sum_i w_i J_i' H_z(z_i) J_i (Schraudolph 2002).

    Attributes:
      probes: number of random sign vectors (an unbiased estimate); None for the exact matrix, with
        one backward pass for each entry of z per example.
      metric: what takes the place of H_z at every loss, such as `curvature.metrics.Euclidean()`;
        None for the loss's own Hessian. It sees the z of each tagged loss (classes on the last
        axis), and must not couple examples. The weights w_i = dL/dl_i stay; where the entries of
        one example have different ones, G_z becomes sqrt(w) G_z sqrt(w).

    Raises:
      ValueError: `probes` is not positive.
      TypeError: `metric` is no metric.

    >>> import jax.numpy as jnp, curvature
    >>> def loss_fn(params, x, labels):
    ...     logits = x @ params["w"]
    ...     return curvature.losses.softmax_cross_entropy_with_integer_labels(logits, labels).sum()
    >>> params, x, labels = {"w": jnp.eye(2)}, jnp.array([[1.0, 2.0]]), jnp.array([0])
    >>> registry = curvature.register(loss_fn, params, x, labels)
    >>> kind = curvature.GaussNewton(metric=curvature.metrics.Euclidean())
    >>> curvature.Estimator(registry, kind)(params, x, labels) @ {"w": jnp.eye(2)}
    {'w': Array([[1., 2.],
           [2., 4.]], dtype=float32)}
    """

    probes: int | None = None
    metric: Metric | None = None

    def __post_init__(self) -> None:
        _check_count("probes", self.probes)
        if self.metric is not None and not isinstance(self.metric, Metric):
            raise TypeError(
                f"metric is {self.metric!r}, expected an object with methods `mvp` and `root`, "
                "such as those in curvature.metrics, or None."
            )

    @property
    def averaged(self) -> bool:
        """Whether the results of several passes are averaged or summed."""
        return self.probes is not None

    def needs_key(self, *, pooled: bool) -> bool:
        """See `Kind`."""
        return self.averaged or pooled

    def draw(self, losses: Sequence[LossTag], key: jax.Array | None) -> tuple[Draw, ...]:
        """See `Kind`."""
        if self.probes is None:
            return _columns(losses, key)
        assert key is not None
        return _keys(key, self.probes, losses)

    def cotangent(self, tag: LossTag, draw: Draw, z: jax.Array, targets: Targets) -> jax.Array:
        """See `Kind`."""
        if self.probes is None:
            vector = _column(tag, draw, z)
        else:
            vector = jax.random.rademacher(draw, z.shape, z.dtype)
        return self.root(tag.loss, vector, z, targets)

    def root(
        self, loss: OutputLoss, vector: jax.Array, z: jax.Array, targets: Targets
    ) -> jax.Array:
        """See `Kind`."""
        if self.metric is not None:
            return self.metric.root(z, vector)
        return loss.root(vector, z, targets)


@dataclasses.dataclass(frozen=True)
class Fisher:
    """The Fisher information sum_i w_i J_i' F_z(z_i) J_i, targets sampled from the model.

    Attributes:
      samples: draws per unit, one backward pass each (an unbiased estimate); None for the exact
        expectation, with one backward pass for each entry of z per example. Where F_z = H_z
        (`OutputLoss.fisher_is_hessian`) that is the exact Gauss-Newton matrix.

    Raises:
      ValueError: `samples` is not positive.
    """

    samples: int | None = 1

    def __post_init__(self) -> None:
        _check_count("samples", self.samples)

    @property
    def averaged(self) -> bool:
        """Whether the results of several passes are averaged or summed."""
        return self.samples is not None

    def needs_key(self, *, pooled: bool) -> bool:
        """See `Kind`."""
        return self.averaged or pooled

    def draw(self, losses: Sequence[LossTag], key: jax.Array | None) -> tuple[Draw, ...]:
        """See `Kind`."""
        if self.samples is None:
            return _columns(losses, key)
        assert key is not None
        return _keys(key, self.samples, losses)

    def cotangent(self, tag: LossTag, draw: Draw, z: jax.Array, targets: Targets) -> jax.Array:
        """See `Kind`."""
        if self.samples is None:
            return self.root(tag.loss, _column(tag, draw, z), z, targets)
        score = tag.loss.sampled_score(draw, z, targets)
        if score.shape != z.shape:
            raise ValueError(
                f"The sampled_score of {tag.loss.name} has shape {score.shape}, expected that of "
                f"z, {z.shape}."
            )
        return score

    def root(
        self, loss: OutputLoss, vector: jax.Array, z: jax.Array, targets: Targets
    ) -> jax.Array:
        """See `Kind`."""
        return loss.fisher_root(vector, z, targets)


@dataclasses.dataclass(frozen=True)
class EmpiricalFisher:
    """The empirical Fisher sum_n s_n s_n', s_n the score of example n at its own targets.

    The units of one example (positions, output dimensions) are summed before the product is taken:
    s_n = sum_i sqrt(w_i) J_i' grad_z l_i.

    The coefficients of several losses are weights, too: of l + c l', s_n has the gradient of l plus
    sqrt(c) times that of l'. With targets drawn from the model the mean over them is the Fisher of
    the sum; s_n s_n' is the outer product of the example's own gradient where c is 1 alone.
    """

    @property
    def averaged(self) -> bool:
        """Whether the results of several passes are averaged or summed."""
        return True

    def needs_key(self, *, pooled: bool) -> bool:
        """See `Kind`."""
        return pooled

    def draw(self, losses: Sequence[LossTag], key: jax.Array | None) -> tuple[Draw, ...]:
        """See `Kind`."""
        if key is None:
            return tuple(jnp.zeros((1, *tag.lead)) for tag in losses)
        # One sign per example: the same for every loss, and in every scan step, unless examples
        # are what the steps differ in.
        return tuple(
            jax.random.split(key, (1, *tag.lead))
            if tag.examples == 1
            else jnp.broadcast_to(key, (1, *tag.lead))
            for tag in losses
        )

    def cotangent(self, tag: LossTag, draw: Draw, z: jax.Array, targets: Targets) -> jax.Array:
        """See `Kind`."""
        return _signed(draw, tag, tag.loss.score(z, targets))

    def root(
        self, loss: OutputLoss, vector: jax.Array, z: jax.Array, targets: Targets
    ) -> jax.Array:
        """That of the Fisher: the empirical one is no second-order model of the loss."""
        return loss.fisher_root(vector, z, targets)


def _check_count(name: str, count: int | None) -> None:
    if count is not None and (not isinstance(count, (int, np.integer)) or count < 1):
        raise ValueError(f"{name} is {count}, expected a positive integer or None (exact).")


def _keys(key: jax.Array, passes: int, losses: Sequence[LossTag]) -> tuple[jax.Array, ...]:
    """One key for each loss, pass and scan step."""
    return tuple(
        jax.random.split(jax.random.fold_in(key, i), (passes, *tag.lead))
        for i, tag in enumerate(losses)
    )


def _columns(losses: Sequence[LossTag], key: jax.Array | None) -> tuple[Draw, ...]:
    """Enumerates the entries of z per example: in each pass one loss, scan step and entry is lit.

    The draw is the index of the lit entry, -1 where none is, with the key of the examples' signs.
    """
    sizes = [math.prod(tag.lead) * tag.columns for tag in losses]
    draws = []
    for i, tag in enumerate(losses):
        index = np.full((sum(sizes), math.prod(tag.lead)), -1, np.int32)
        local = np.arange(sizes[i])
        index[sum(sizes[:i]) + local, local // tag.columns] = local % tag.columns
        index = index.reshape(sum(sizes), *tag.lead)
        signs = jnp.zeros(index.shape)
        if key is not None:
            signs = jax.random.split(jax.random.fold_in(key, i), index.shape)
        draws.append((jnp.asarray(index), signs))
    return tuple(draws)


def _column(tag: LossTag, draw: Draw, z: jax.Array) -> jax.Array:
    """What selects one column of a square root, the same for every example but for its sign."""
    index, signs = draw
    shape = jax.eval_shape(tag.by_example, z).shape
    lit = jnp.arange(math.prod(shape[1:]), dtype=index.dtype).reshape(shape[1:]) == index
    vector = tag.back(jnp.broadcast_to(lit, shape).astype(z.dtype))
    return _signed(signs, tag, vector)


def _signed(draw: jax.Array, tag: LossTag, vector: jax.Array) -> jax.Array:
    """`vector` with a random sign for each example; as it is without a key.

    Products of one example's cotangents do not see its sign. Where only the sum over examples can
    be seen, signs make the square of the sum an unbiased estimate of the sum of squares.
    """
    if not jnp.issubdtype(draw.dtype, jax.dtypes.prng_key):
        return vector
    shape = [1] * vector.ndim
    if tag.batch is None:
        return vector * jax.random.rademacher(draw, shape, vector.dtype)
    # Where examples cannot be told apart, every entry of the batch axis is taken for one.
    size = shape[tag.batch.axis] = vector.shape[tag.batch.axis]
    count = tag.examples if tag.batch.first else size
    signs = jnp.repeat(jax.random.rademacher(draw, (count,), vector.dtype), size // count)
    return vector * signs.reshape(shape)
