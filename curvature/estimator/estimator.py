"""The blockwise estimator: statistics of every block from a few backward passes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from curvature.blocks import BlockDiagonal, block_of
from curvature.estimator import statistics as stats
from curvature.estimator.alive import alive_rows
from curvature.estimator.evaluate import Sweep, evaluate
from curvature.estimator.kinds import Draw, Fisher, Kind
from curvature.estimator.statistics import Statistics
from curvature.precision import accumulator
from curvature.registry import Layer, Registry
from curvature.registry.layers import EXCLUDED
from curvature.registry.registry import Analysis

PyTree = Any
_FISHER = Fisher()
_PASSES_AT_ONCE = 32  # backward passes vectorised together; more are run one group after another


@dataclasses.dataclass(frozen=True, eq=False)
class Estimator:
    """Block-diagonal curvature of a registered model at given parameters and data.

    Attributes:
      registry: what is in the model.
      kind: what is averaged: `Fisher`, `EmpiricalFisher` or `GaussNewton`.
      max_factor_dim: a Kronecker factor wider than this keeps its diagonal only.

    >>> import jax, jax.numpy as jnp, curvature
    >>> def loss_fn(params, x, y):
    ...     return curvature.losses.l2_loss(x @ params["w"], y).sum()
    >>> params, y = {"w": jnp.ones((2, 1))}, jnp.zeros((2, 1))
    >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> registry = curvature.register(loss_fn, params, x, y)
    >>> fisher = curvature.Estimator(registry, curvature.Fisher(samples=None))(params, x, y)
    >>> fisher @ {"w": jnp.ones((2, 1))}
    {'w': Array([[1.],
           [4.]], dtype=float32)}
    """

    registry: Registry
    kind: Kind = _FISHER
    max_factor_dim: int = 8192

    def __post_init__(self) -> None:
        if isinstance(self.kind, type):
            raise TypeError(
                f"kind is the class {self.kind.__name__}, expected an instance: "
                f"{self.kind.__name__}()."
            )

    @property
    def needs_key(self) -> bool:
        """Whether calls need a random key."""
        return self.kind.needs_key(pooled=any(layer.pooled for layer in self._blocks))

    @property
    def _blocks(self) -> list[Layer]:
        return [layer for layer in self.registry.layers if layer.block != EXCLUDED]

    def __call__(
        self, params: PyTree, *args: PyTree, key: jax.Array | None = None
    ) -> BlockDiagonal:
        """The curvature at `params` on the data in `args`, as an operator on parameter trees.

        Args:
          params: the parameters, as registered.
          *args: the other arguments of the loss function.
          key: random key, where the kind needs one.

        Raises:
          ValueError: the key is missing, or an argument differs from what was registered.
        """
        return self.operator(self.statistics(params, *args, key=key))

    def statistics(
        self, params: PyTree, *args: PyTree, key: jax.Array | None = None
    ) -> dict[str, Statistics]:
        """The statistics of every block, by layer name; linear averages of these are meaningful.

        A Kronecker block has `input` (mean over rows of a a') and `output` (sum over rows of g g'),
        a diagonal one `values`. The sum over examples is weighted by dL/dl: the curvature of the
        loss itself, not of a single example.
        """
        if self.needs_key and key is None:
            raise ValueError(
                f"{self.kind} needs a random key here: pass key=jax.random.key(...). Sampling "
                "needs one, and so does every kind where some parameters are generic."
            )
        if key is not None and not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)  # a key of jax.random.PRNGKey
        analysis = self.registry.analyse(params, args)
        draws = self.kind.draw(analysis.losses, key)
        passes = jax.tree.leaves(draws)[0].shape[0]
        try:
            alive = self._alive(analysis, params, args)
            summed = _sum_passes(
                lambda draw: self._pass(analysis, params, args, draw, alive), draws, passes
            )
        except (ValueError, NotImplementedError) as error:
            if not analysis.blocked:
                raise
            raise ValueError(
                "The loss cannot be differentiated: between its parameters (in parentheses) and a "
                f"tagged loss stands {'; '.join(analysis.blocked)}. Use scan or a fori_loop with "
                "constant bounds, give the function a custom_vjp, or exclude the parameters."
            ) from error
        return {
            layer.name: stats.combined(layer, summed[layer.name], passes, self.kind.averaged)
            for layer in analysis.layers
            if layer.block != EXCLUDED
        }

    def operator(self, statistics: dict[str, Statistics]) -> BlockDiagonal:
        """The operator made from (averages of) `statistics`."""
        layers = tuple(self._blocks)
        blocks = {layer.name: block_of(layer, statistics[layer.name]) for layer in layers}
        return BlockDiagonal(blocks, layers, jax.tree.structure(self.registry.params))

    def zeros(self) -> dict[str, Statistics]:
        """Statistics of nothing, of the shapes that `statistics` returns."""
        return {
            layer.name: stats.zeros(layer, self._dtype(layer), self.max_factor_dim)
            for layer in self._blocks
        }

    def _dtype(self, layer: Layer) -> Any:
        leaves = jax.tree.leaves(self.registry.params)
        return accumulator(*(leaves[v.source].dtype for v in layer.leaves))

    def _alive(self, analysis: Analysis, params: PyTree, args: PyTree) -> dict[int, jax.Array]:
        layers = {layer.name: layer for layer in analysis.layers}
        return alive_rows(analysis, layers, [*jax.tree.leaves(params), *jax.tree.leaves(args)])

    def _pass(
        self,
        analysis: Analysis,
        params: PyTree,
        args: PyTree,
        draws: tuple[Draw, ...],
        alive: dict[int, jax.Array],
    ) -> dict[str, Statistics]:
        """One backward pass: the raw statistics of every layer."""
        layers = {layer.name: layer for layer in analysis.layers}
        leaves = jax.tree.leaves(params)
        structured, generic = {}, {}
        for name, layer in layers.items():
            if layer.structured:
                structured[name] = stats.tokens(layer, self._dtype(layer), self.max_factor_dim)
            elif layer.block != EXCLUDED:
                generic[name] = leaves[layer.views[0].source]

        def loss(tokens: dict[str, Statistics], generic: dict[str, jax.Array]) -> jax.Array:
            inputs = list(leaves)
            for name, leaf in generic.items():
                inputs[layers[name].views[0].source] = leaf
            sweep = Sweep(layers, self.kind, tokens, dict(enumerate(draws)), alive)
            outs, _ = evaluate(analysis.plan, [*inputs, *jax.tree.leaves(args)], sweep)
            value: jax.Array = outs[0]
            return value

        raw, gradients = jax.grad(loss, argnums=(0, 1))(structured, generic)
        done = {name: stats.finished(layers[name], raw[name]) for name in structured}
        for name, gradient in gradients.items():
            layer = layers[name]
            done[name] = stats.of_generic(layer.gather({layer.views[0].source: gradient}))
        return done


def _sum_passes(one: Any, draws: PyTree, passes: int) -> dict[str, Statistics]:
    """The sum over passes of `one(draw)`, vectorised in groups."""
    if passes == 1:
        result: dict[str, Statistics] = one(jax.tree.map(lambda d: d[0], draws))
        return result

    def group(part: PyTree) -> dict[str, Statistics]:
        return jax.tree.map(lambda s: s.sum(axis=0), jax.vmap(one)(part))

    size = min(passes, _PASSES_AT_ONCE)
    groups, rest = divmod(passes, size)
    total = group(jax.tree.map(lambda d: d[:size], draws))
    if groups > 1:
        parts = jax.tree.map(
            lambda d: d[size : groups * size].reshape((groups - 1, size, *d.shape[1:])), draws
        )

        def add(total: dict[str, Statistics], part: PyTree) -> tuple[dict[str, Statistics], None]:
            return jax.tree.map(jnp.add, total, group(part)), None

        total, _ = jax.lax.scan(add, total, parts)
    if rest:
        total = jax.tree.map(jnp.add, total, group(jax.tree.map(lambda d: d[-rest:], draws)))
    return total
