"""Flax NNX: register a module, and an optimizer that passes on what curvature needs.

NNX models hold their state; the backend wants pure functions. The loss function stays the one that
`nnx.value_and_grad` takes, `loss_fn(model, *args)`: it is run on a merged copy of the model, whose
other state (batch statistics, random streams, ...) is the first of the pure function's arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax
from flax import nnx

import curvature
from curvature.optimizer.progress import stop_if_idle


def register(
    loss_fn: Callable[..., Any],
    model: nnx.Module,
    *args: Any,
    wrt: Any = nnx.Param,
    has_aux: bool = False,
    objective: bool = True,
) -> curvature.Registry:
    """Finds the layers of an NNX model from its loss function; see `curvature.register`.

    Args:
      loss_fn: `loss_fn(model, *args)`, as given to `nnx.value_and_grad`.
      model: the model, in the mode (`train()` or `eval()`) in which it is trained.
      *args: the other arguments (batch, keys).
      wrt: filter of the variables that are trained, as given to `nnx.Optimizer`.
      has_aux: whether `loss_fn` returns `(loss, aux)`.
      objective: whether its value is what is minimised, see `curvature.register`.

    Returns:
      The registry of the pure function `(params, rest, *args)`; `Optimizer` supplies `rest`.

    >>> import jax, jax.numpy as jnp, curvature
    >>> from flax import nnx
    >>> import curvature_flax.nnx
    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> x, y = jnp.ones((4, 2)), jnp.zeros((4,), int)
    >>> def loss_fn(model, x, y):
    ...     return curvature.losses.softmax_cross_entropy_with_integer_labels(model(x), y).mean()
    >>> registry = curvature_flax.nnx.register(loss_fn, model, x, y)
    >>> tx = curvature.kfac(registry, learning_rate=0.1)
    >>> optimizer = curvature_flax.nnx.Optimizer(model, tx, wrt=nnx.Param)
    >>> @nnx.jit
    ... def train_step(model, optimizer, x, y, key):
    ...     loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
    ...     optimizer.update(model, grads, loss_args=(x, y), key=key)
    ...     return loss
    >>> train_step(model, optimizer, x, y, jax.random.key(0)).shape
    ()
    """
    model = nnx.clone(model)  # without what it may have sown: the loss sows anew
    nnx.pop(model, nnx.Intermediate)
    graph, params, rest = nnx.split(model, wrt, ...)

    def pure_loss(params: Any, rest: Any, *args: Any) -> Any:
        return loss_fn(nnx.merge(graph, params, rest), *args)

    return curvature.register(
        pure_loss,
        nnx.as_pure(params),
        nnx.as_pure(rest),
        *args,
        has_aux=has_aux,
        objective=objective,
    )


class Optimizer(nnx.Optimizer):
    """`nnx.Optimizer` for transformations made from a registry of this module.

    The same constructor. `update` takes the loss function's arguments after the model as
    `loss_args` and adds the model's other state.

    That is the state after the gradient was taken: another dropout mask. Where the loss has to be
    evaluated with the same one (`curvature.LevenbergMarquardt` compares it with `value`), keep the
    state from before and give it to `nnx.Optimizer`, which does for these transformations, too:

        state = nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param)))
        loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
        optimizer.update(model, grads, loss_args=(state, batch), key=key)

    Attributes:
      stop_after: a step fails with an error where the optimizer took none of so many steps before
        it, as after a run has diverged; None: never. The error comes from a callback, which keeps
        the program out of JAX's persistent compilation cache.
    """

    def __init__(
        self,
        model: nnx.Module,
        tx: optax.GradientTransformation,
        *,
        wrt: Any,
        stop_after: int | None = 20,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, tx, wrt=wrt, **kwargs)
        self.stop_after = stop_after

    def update(
        self, model: Any, grads: Any, /, *, loss_args: tuple[Any, ...], **kwargs: Any
    ) -> Any:
        """One step of the optimizer, in place.

        Args:
          model: the model.
          grads: its gradients, from `nnx.grad`.
          loss_args: the arguments of the loss function after the model.
          **kwargs: further extra arguments of the transformation, such as `key`.

        Returns:
          The updates that were applied.
        """
        _, _, _, rest = nnx.split(model, self.wrt, nnx.Intermediate, ...)
        updates = super().update(model, grads, loss_args=(rest, *loss_args), **kwargs)
        if self.stop_after is not None:
            stop_if_idle(nnx.as_pure(self.opt_state), self.stop_after)
        return updates
