"""The exact curvature matrices of a loss or of a function, as operators over a dataset.

With z the network's output at the tagged losses, J its Jacobian in the parameters and w_i = dL/dl_i
the weight of unit i in the loss of one batch:

| operator                  | matrix of one batch                                  |
|---------------------------|------------------------------------------------------|
| `hessian`                 | the Hessian of L                                     |
| `gauss_newton`            | sum_i abs(w_i) J_i' H_z(z_i) J_i, H_z made positive  |
| `fisher(samples=None)`    | sum_i abs(w_i) J_i' F_z(z_i) J_i                     |
| `fisher(samples=k, key=)` | the same with F_z ~ 1/k sum s s', s sampled scores   |
| `empirical_fisher`        | sum_n s_n s_n', s_n = sum_{i in n} sqrt w_i J_i' g_i |
| `pullback`                | J' G_z J, J the Jacobian of any function             |

Weights count by magnitude, as everywhere in this library, so that all but the Hessian are positive
semi-definite. A product of any of them costs about three forward passes, that of the Hessian five.
J is applied by forward-mode differentiation, which functions with a `custom_vjp` do not have.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvature.meshes import automatic
from curvature.metrics import Metric
from curvature.metrics.products import apply
from curvature.operators.operator import Operator, Product, over_dataset
from curvature.precision import accumulator
from curvature.trace import Registry
from curvature.trace.outputs import Output, linearise

PyTree = Any
LossOrRegistry = Callable[..., Any] | Registry
# From all outputs and their tangents J v to the cotangents G_z J v; takes samples and key, too.
OutputMetric = Callable[
    [Sequence[Output], Sequence[jax.Array], int, jax.Array | None], list[jax.Array]
]


def hessian(
    loss_fn: LossOrRegistry,
    params: PyTree,
    batches: Iterable[Any],
    *,
    has_aux: bool = False,
    weights: Sequence[float] | None = None,
) -> Operator:
    """The Hessian of the loss (Pearlmutter 1994); any scalar loss, tagged or not.

    Args:
      loss_fn: `loss_fn(params, *args)`, a scalar or `(scalar, aux)`; or a `Registry` of one.
      params: the parameters, a tree of arrays.
      batches: the data: an iterable that can be iterated again and again (a list, a data loader
        whose `__iter__` starts anew), each item a tuple of `args`, or the only argument.
      has_aux: whether `loss_fn` returns `(loss, aux)`.
      weights: the coefficient of each batch. By default the operator is the mean over examples:
        each batch counts by its share of them, the leading axis of its first array. That is the
        Hessian of the mean loss if `loss_fn` averages over the batch; if it sums, pass ones.

    Returns:
      A symmetric operator on trees like `params`, not semi-definite in general.

    Raises:
      TypeError: `batches` can be iterated only once, or is no iterable of batches.
      ValueError: `batches` is empty.

    >>> import jax.numpy as jnp
    >>> from curvature import operators
    >>> op = operators.hessian(lambda p, x: (x * p**3).mean(), jnp.ones(2), [jnp.ones((4, 2))])
    >>> op @ jnp.array([1.0, 2.0])
    Array([3., 6.], dtype=float32)
    """
    function, has_aux = _function(loss_fn, has_aux)
    product = _Hessian(function, has_aux)
    return over_dataset(product, params, batches, weights, semidefinite=False)


def gauss_newton(
    loss_fn: LossOrRegistry,
    params: PyTree,
    batches: Iterable[Any],
    *,
    has_aux: bool = False,
    weights: Sequence[float] | None = None,
) -> Operator:
    """The generalised Gauss-Newton matrix sum_i |w_i| J_i' H_z(z_i) J_i (Schraudolph 2002).

    Where the Hessian H_z of a loss in its outputs is indefinite, the matrix that the loss puts in
    its place, as `curvature.GaussNewton` does: the Fisher's for `heteroscedastic_gaussian_nll`, H_z
    without its negative eigenvalues for `custom` losses.

    Args:
      loss_fn: as for `hessian`, with at least one loss of `curvature.losses`.
      params: the parameters, a tree of arrays.
      batches: the data, see `hessian`.
      has_aux: whether `loss_fn` returns `(loss, aux)`.
      weights: the coefficient of each batch, see `hessian`.

    Returns:
      A positive semi-definite operator on trees like `params`.

    Raises:
      TypeError: `batches` can be iterated only once, or is no iterable of batches.
      ValueError: `batches` is empty, or the loss function has no tagged loss.

    >>> import jax.numpy as jnp, curvature
    >>> from curvature import operators
    >>> def loss_fn(w, x, y):
    ...     return curvature.losses.l2_loss(x @ w, y).mean()
    >>> x, y = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.zeros(2)
    >>> op = operators.gauss_newton(loss_fn, jnp.ones(2), [(x, y), (x, y)])
    >>> operators.to_dense(op)
    Array([[0.5, 0. ],
           [0. , 2. ]], dtype=float32)
    """
    function, has_aux = _function(loss_fn, has_aux)
    product = _Pulled(function, has_aux, _loss_gauss_newton)
    return over_dataset(product, params, batches, weights, semidefinite=True)


def fisher(
    loss_fn: LossOrRegistry,
    params: PyTree,
    batches: Iterable[Any],
    *,
    samples: int | None = None,
    key: jax.Array | None = None,
    has_aux: bool = False,
    weights: Sequence[float] | None = None,
) -> Operator:
    """The Fisher information sum_i |w_i| J_i' F_z(z_i) J_i, exact or from sampled targets.

    With samples, F_z of every unit is replaced by the mean of s s' over scores s at targets drawn
    from the model. That is unbiased, and one fixed matrix: every product draws the same targets,
    from the key and the index of the batch, so the batches have to come in the same order each
    time. Products of different units' scores, whose mean is zero, are left out.

    Args:
      loss_fn: as for `hessian`, with at least one loss of `curvature.losses`.
      params: the parameters, a tree of arrays.
      batches: the data, see `hessian`.
      samples: number of draws per unit; None for the exact expectation, which is the Gauss-Newton
        matrix for losses that are exponential families in natural parameters (Martens 2020).
      key: random key, where `samples` is given.
      has_aux: whether `loss_fn` returns `(loss, aux)`.
      weights: the coefficient of each batch, see `hessian`.

    Returns:
      A positive semi-definite operator on trees like `params`.

    Raises:
      TypeError: `batches` can be iterated only once, or is no iterable of batches.
      ValueError: `samples` is not positive, it comes without a key, `batches` is empty, or the loss
        function has no tagged loss.
    """
    function, has_aux = _function(loss_fn, has_aux)
    if samples is None:
        product = _Pulled(function, has_aux, _loss_fisher)
        return over_dataset(product, params, batches, weights, semidefinite=True)
    if not isinstance(samples, (int, np.integer)) or samples < 1:
        raise ValueError(f"samples is {samples}, expected a positive integer or None (exact).")
    if key is None:
        raise ValueError("Sampled targets need a random key: pass key=jax.random.key(...).")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)  # a key of jax.random.PRNGKey
    product = _Pulled(function, has_aux, _sampled_fisher, samples)
    return over_dataset(product, params, batches, weights, semidefinite=True, key=key)


def empirical_fisher(
    loss_fn: LossOrRegistry,
    params: PyTree,
    batches: Iterable[Any],
    *,
    has_aux: bool = False,
    weights: Sequence[float] | None = None,
) -> Operator:
    """The empirical Fisher sum_n s_n s_n', with s_n the score of example n at its own targets.

    s_n = sum_{i in n} sqrt|w_i| J_i' g_i sums over all units i of the example (positions, output
    dimensions, heads) before the product is taken, as `curvature.EmpiricalFisher` does. With
    w = 1/N (a mean loss with one unit per example) it is the mean of the outer products of
    per-example gradients, but for several losses with coefficients (see that class). No such
    gradient is made: <s_n, v> is taken in the space of outputs.

    Examples are the leading axis of a loss's units, the same in each iteration of a scan and for
    every loss: where logits are flattened, every position is one, and under `vmap` the mapped axis.
    The blockwise estimator finds examples in the trace and may differ there. It is no approximation
    of the Fisher (Kunstner, Balles and Hennig 2019).

    Args:
      loss_fn: as for `hessian`, with at least one loss of `curvature.losses`.
      params: the parameters, a tree of arrays.
      batches: the data, see `hessian`.
      has_aux: whether `loss_fn` returns `(loss, aux)`.
      weights: the coefficient of each batch, see `hessian`.

    Returns:
      A positive semi-definite operator on trees like `params`.

    Raises:
      TypeError: `batches` can be iterated only once, or is no iterable of batches.
      ValueError: `batches` is empty, the loss function has no tagged loss, or its losses have
        different numbers of examples.
    """
    function, has_aux = _function(loss_fn, has_aux)
    product = _Pulled(function, has_aux, _empirical_fisher)
    return over_dataset(product, params, batches, weights, semidefinite=True)


def pullback(
    function: Callable[..., Any],
    metric: Metric,
    params: PyTree,
    batches: Iterable[Any],
    *,
    weights: Sequence[float] | None = None,
) -> Operator:
    """The pullback J' G_z J of a metric of the output space of z = f(params, *args).

    Args:
      function: f, from parameters and one batch's arguments to a tree of arrays z.
      metric: a metric for every array of z, or a tree of them; or a function `rho(z, z')` of whole
        outputs, a scalar, whose Hessian at z = z' is the metric.
      params: the parameters, a tree of arrays.
      batches: the data, see `hessian`.
      weights: the coefficient of each batch. By default 1: the pullback by the function that
        returns the outputs for all batches.

    Returns:
      An operator on trees like `params`, positive semi-definite as metrics are.

    Raises:
      TypeError: `batches` can be iterated only once, or is no iterable of batches.
      ValueError: `batches` is empty.

    >>> import jax.numpy as jnp
    >>> from curvature import metrics, operators
    >>> rho = metrics.Euclidean()
    >>> op = operators.pullback(lambda w, x: x @ w, rho, jnp.ones(2), [2 * jnp.eye(2)])
    >>> op @ jnp.array([1.0, 2.0])
    Array([4., 8.], dtype=float32)
    """
    product = _Pullback(function, metric=metric)
    return over_dataset(product, params, batches, weights, semidefinite=True, averaged=False)


def _function(loss_fn: LossOrRegistry, has_aux: bool) -> tuple[Callable[..., Any], bool]:
    if isinstance(loss_fn, Registry):
        return loss_fn.loss_fn, loss_fn.has_aux
    return loss_fn, has_aux


# Products on one batch ---------------------------------------------------------------------------


class _Hessian(Product):
    def __call__(
        self, params: PyTree, args: tuple[PyTree, ...], key: jax.Array | None, vector: PyTree
    ) -> PyTree:
        """Forward over reverse."""
        del key

        def gradient(params: PyTree) -> PyTree:
            out = jax.grad(self.function, has_aux=self.has_aux)(params, *args)
            return out[0] if self.has_aux else out

        return jax.jvp(gradient, (params,), (vector,))[1]


class _Pullback(Product):
    def __call__(
        self, params: PyTree, args: tuple[PyTree, ...], key: jax.Array | None, vector: PyTree
    ) -> PyTree:
        """J' G_z J v."""
        del key
        z, push = jax.linearize(lambda p: self.function(p, *args), params)
        product = automatic(functools.partial(apply, self.metric), z, push(vector), like=z)
        (result,) = jax.linear_transpose(push, params)(product)
        return result


class _Pulled(Product):
    """J' G_z J v at the outputs of the tagged losses; `metric` is an `OutputMetric`."""

    def __call__(
        self, params: PyTree, args: tuple[PyTree, ...], key: jax.Array | None, vector: PyTree
    ) -> PyTree:
        """One forward pass, J v, J' g."""
        found = linearise(self.function, self.has_aux, params, args)
        # In float32 at least, whatever the activations are.
        tags = [o.tag for o in found.outputs]
        seen = [(o.z, o.targets, o.weights) for o in found.outputs]

        def cotangents(seen: Any, tangents: Any, key: jax.Array | None) -> list[jax.Array]:
            exact = [
                Output(tag, _widened(z), targets, _widened(weights, z))
                for tag, (z, targets, weights) in zip(tags, seen, strict=True)
            ]
            made = self.metric(exact, [_widened(u) for u in tangents], self.samples, key)
            return [g.astype(z.dtype) for g, (z, *_) in zip(made, seen, strict=True)]

        zs = [z for z, *_ in seen]
        return found.pullback(automatic(cotangents, seen, found.pushforward(vector), key, like=zs))


def _widened(x: jax.Array, *others: jax.Array) -> jax.Array:
    return x.astype(accumulator(x.dtype, *(other.dtype for other in others)))


def _per_unit(output: Output, values: jax.Array) -> jax.Array:
    """One value per unit, shaped so that it multiplies z."""
    return values.reshape(values.shape + (1,) * len(output.event))


def _weighted(output: Output, cotangent: jax.Array) -> jax.Array:
    return _per_unit(output, jnp.abs(output.weights)) * cotangent


def _loss_gauss_newton(
    outputs: Sequence[Output], tangents: Sequence[jax.Array], samples: int, key: jax.Array | None
) -> list[jax.Array]:
    del samples, key
    return [
        _weighted(o, o.tag.loss.gauss_newton_mvp(u, o.z, o.targets))
        for o, u in zip(outputs, tangents, strict=True)
    ]


def _loss_fisher(
    outputs: Sequence[Output], tangents: Sequence[jax.Array], samples: int, key: jax.Array | None
) -> list[jax.Array]:
    del samples, key
    return [
        _weighted(o, o.tag.loss.fisher_mvp(u, o.z, o.targets))
        for o, u in zip(outputs, tangents, strict=True)
    ]


def _sampled_fisher(
    outputs: Sequence[Output], tangents: Sequence[jax.Array], samples: int, key: jax.Array | None
) -> list[jax.Array]:
    """The mean over draws of s <s, u>, one unit at a time; one draw is held at a time."""
    assert key is not None
    cotangents = []
    for i, (output, u) in enumerate(zip(outputs, tangents, strict=True)):

        def add(
            total: jax.Array, k: jax.Array, output: Output = output, u: jax.Array = u
        ) -> tuple[jax.Array, None]:
            s = output.tag.loss.sampled_score(k, output.z, output.targets)
            return total + s * jnp.sum(s * u, axis=output.event, keepdims=True), None

        keys = jax.random.split(jax.random.fold_in(key, i), samples)
        total, _ = jax.lax.scan(add, jnp.zeros_like(u), keys)
        cotangents.append(_weighted(output, total / samples))
    return cotangents


def _empirical_fisher(
    outputs: Sequence[Output], tangents: Sequence[jax.Array], samples: int, key: jax.Array | None
) -> list[jax.Array]:
    """r_n <r_n, u>, with r = sqrt|w| g and the product summed over all of example n's entries."""
    del samples, key
    axes = [len(o.tag.lead) if o.tag.units.shape else None for o in outputs]
    counts = {1 if a is None else o.weights.shape[a] for o, a in zip(outputs, axes, strict=True)}
    if len(counts) > 1:
        raise ValueError(
            f"The tagged losses have {sorted(counts)} examples, expected as many for each: the "
            "leading axis of a loss's value is the example. The empirical Fisher multiplies "
            "gradients of examples, so it has to know which units belong to the same one."
        )
    scores = [
        o.tag.loss.score(o.z, o.targets) * _per_unit(o, jnp.sqrt(jnp.abs(o.weights)))
        for o in outputs
    ]
    inner = jnp.zeros((), accumulator(*(u.dtype for u in tangents)))
    for s, u, axis in zip(scores, tangents, axes, strict=True):
        others = tuple(a for a in range(s.ndim) if a != axis)
        inner = inner + jnp.sum(s * u, axis=others).astype(inner.dtype)

    def along(s: jax.Array, axis: int | None) -> jax.Array:
        return inner.reshape(-1, *[1] * (s.ndim - axis - 1)) if axis is not None else inner.sum()

    return [(s * along(s, a)).astype(s.dtype) for s, a in zip(scores, axes, strict=True)]
