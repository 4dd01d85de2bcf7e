"""Flax linen: the training state that linen users have, for optimizers with extra arguments."""

from __future__ import annotations

from typing import Any

import jax
import optax
from flax import struct
from flax.training import train_state


class TrainState(train_state.TrainState):
    """`flax.training.train_state.TrainState` for optimizers that look at the loss.

    `apply_gradients` passes `loss_args` and `key` on to the optimizer's `update`; the original
    does not. Optimizers of optax ignore them, so the loop stays the same for every optimizer.

    Attributes:
      model_state: the other variable collections (`batch_stats`, ...), as `apply` returns them.

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

    def apply_gradients(
        self,
        *,
        grads: Any,
        loss_args: tuple[Any, ...] = (),
        key: jax.Array | None = None,
        **kwargs: Any,
    ) -> TrainState:
        """One step of the optimizer.

        Args:
          grads: gradients, of the structure of `params`.
          loss_args: the arguments of the registered loss function after `params`.
          key: random key for the optimizer.
          **kwargs: fields to replace, such as `model_state`.

        Returns:
          The state after the step.
        """
        tx = optax.with_extra_args_support(self.tx)
        updates, opt_state = tx.update(
            grads, self.opt_state, self.params, loss_args=tuple(loss_args), key=key
        )
        return self.replace(
            step=self.step + 1,
            params=optax.apply_updates(self.params, updates),
            opt_state=opt_state,
            **kwargs,
        )
