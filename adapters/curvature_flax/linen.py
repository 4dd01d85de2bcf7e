"""Flax linen: the training state that linen users have, for optimizers with extra arguments."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import optax
from flax import struct
from flax.training import train_state

from curvature.optimizer.progress import stop_if_idle


class TrainState(train_state.TrainState):
    """`flax.training.train_state.TrainState` for optimizers that look at the loss.

    `apply_gradients` passes extra arguments (`loss_args`, `key`, `value`, ...) on to `tx.update`;
    the original does not. Optimizers of optax ignore those that they do not know, so the loop stays
    the same for every optimizer.

    Attributes:
      model_state: the other variable collections (`batch_stats`, ...), as `apply` returns them.
      stop_after: a step fails with an error where this library's optimizer took none of so many
        steps before it, as after a run has diverged; None: never. The error comes from a callback,
        which keeps the program out of JAX's persistent compilation cache.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, curvature
    >>> from curvature_flax.linen import TrainState
    >>> model = nn.Dense(3)
    >>> x, y = jnp.ones((4, 2)), jnp.zeros((4,), int)
    >>> def loss_fn(params, x, y):
    ...     logits = model.apply({"params": params}, x)
    ...     return curvature.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> tx = curvature.kfac(curvature.register(loss_fn, params, x, y), learning_rate=0.1)
    >>> state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    >>> grads = jax.grad(loss_fn)(state.params, x, y)
    >>> state = state.apply_gradients(grads=grads, loss_args=(x, y), key=jax.random.key(1))
    >>> int(state.step)
    1
    """

    model_state: Any = struct.field(pytree_node=True, default_factory=dict)
    stop_after: int | None = struct.field(pytree_node=False, default=20)

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> TrainState:
        """One step of the optimizer.

        Args:
          grads: gradients, of the structure of `params`.
          **kwargs: fields of the state to replace, such as `model_state`; everything else is an
            extra argument of `tx.update`: `loss_args` (the arguments of the registered loss
            function after `params`), `key`, `value`, ...

        Returns:
          The state after the step.
        """
        names = {field.name for field in dataclasses.fields(self)}
        fields = {name: x for name, x in kwargs.items() if name in names}
        extra = {name: x for name, x in kwargs.items() if name not in names}
        tx = self.tx
        if not isinstance(tx, optax.MultiSteps):  # no transformation, but often used as one
            tx = optax.with_extra_args_support(tx)
        update = functools.partial(tx.update, **extra)
        bound = self.replace(tx=optax.GradientTransformation(tx.init, update))
        new = super(TrainState, bound).apply_gradients(grads=grads, **fields).replace(tx=self.tx)
        if self.stop_after is not None:
            stop_if_idle(new.opt_state, self.stop_after)
        return new
