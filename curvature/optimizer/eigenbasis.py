"""Any optax transformation in the eigenbasis of the curvature.

A diagonal method such as Adam depends on the coordinates. In those of the eigenvectors of a layer's
Kronecker factors, gradients are nearly uncorrelated and a diagonal is what there is to know.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from curvature.blocks.eigen_kronecker import from_basis, into_basis
from curvature.meshes import automatic, divided, entering
from curvature.optimizer.arguments import (
    Gather,
    Period,
    ScalarOrSchedule,
    check_configuration,
    check_params,
    check_state,
    check_transformation,
    check_update,
    own,
)
from curvature.optimizer.averaging import Averaging, Gathered
from curvature.optimizer.moments import Layout, Moment
from curvature.optimizer.options import Options
from curvature.optimizer.preconditioner import masked
from curvature.optimizer.refresh import QR, Eigh
from curvature.optimizer.refresh.cond import finite, when
from curvature.optimizer.refresh.eigenbases import Blocks, Eigenbases, Moved
from curvature.optimizer.shampoo import GradientAveraging, Shampoo
from curvature.precision import FAST, Precision
from curvature.sides import WideFactors
from curvature.statistics import Fisher, Kind
from curvature.statistics.eigenbasis import BASES
from curvature.statistics.stacks import Arrays, Stack, in_full
from curvature.trace import Layer, Registry, check_registry
from curvature.trace.layers import EXCLUDED

PyTree = Any
_FISHER, _QR = Fisher(), QR()


class EigenbasisStats(NamedTuple):
    """What happened, for any logger.

    Attributes:
      skipped: steps skipped because the gradient, the statistics or the update was not finite.
      idle: steps in a row, up to the latest, that were skipped.
      failed_refreshes: refreshes in which some basis was not finite, so that the previous one was
        kept.
      staleness: how stale the bases had become that were renewed at the latest refresh, before it:
        the largest; see `Eigh`.
    """

    skipped: jax.Array
    idle: jax.Array
    failed_refreshes: jax.Array
    staleness: jax.Array


class EigenbasisState(NamedTuple):
    """State of `in_eigenbasis`: a pytree of arrays.

    Attributes:
      step: steps taken (skipped ones not counted); negative during burn-in.
      weight: total weight of the exponential average.
      statistics: the exponential averages of the factors, times that weight.
      bases: their eigenvectors, by stack of layers of one shape
        (see `curvature.statistics.stacks`); ones where a factor is diagonal.
      refreshed: whether they are known yet; before, they are the coordinates themselves.
      micro: micro-batches since the latest step.
      gradient: the sum of their gradients; empty without accumulation.
      inner: the state of the inner transformation, of trees {stack: block coordinates}.
      stats: what happened.
    """

    step: jax.Array
    weight: jax.Array
    statistics: Arrays
    bases: Arrays
    refreshed: jax.Array
    micro: jax.Array
    gradient: PyTree
    inner: optax.OptState
    stats: EigenbasisStats


def in_eigenbasis(
    registry: Registry,
    inner: optax.GradientTransformation,
    kind: Kind | Shampoo = _FISHER,
    *,
    decay: ScalarOrSchedule | None = None,
    burn_in: int = 0,
    accumulate: int = 1,
    statistics_every: Period | None = None,
    statistics_batch: float | None = None,
    refresh_every: Period = 5,
    warmup_steps: int = 20,
    refresh: Eigh | QR = _QR,
    spread: bool = True,
    refresh_over: NamedSharding | None = None,
    gather: Gather = "inverses",
    max_factor_dim: int = 8192,
    wide_factors: WideFactors = "diagonal",
    axis_name: str | Sequence[str] | None = None,
    precision: Precision = FAST,
    storage_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Applies a transformation in the eigenbasis of every layer's Kronecker factors.

    With the eigenvectors Q_A and Q_B of the averaged factors A (x) B of a layer, `inner` sees
    Q_A' G Q_B for its gradient G (in block coordinates), and an update V of it becomes Q_A V Q_B'.
    It sees what has no factors as it is, and so does a diagonal side.

    When a basis is renewed, the state of `inner` follows: what is odd in the gradient, as Adam's
    mean, is rotated, which is to keep it in the original coordinates; what is even, as the mean
    square, becomes the diagonal in the new basis of the operator that it was in the old.

    With `optax.scale_by_adam` and `Shampoo()` this is SOAP (Vyas et al. 2024), but for the mean
    square, which SOAP leaves as it is.

    Args:
      registry: what is in the model, from `curvature.register`.
      inner: a transformation of gradients, such as `optax.scale_by_adam(b2=0.99)`. It is
        initialised with, and given, parameters in the coordinates it works in.
      kind: of which factors: `Fisher`, `EmpiricalFisher`, `GaussNewton`, whose statistics are as
        those of `scale_by_curvature`, or `Shampoo()`: outer products of the gradient, which need
        no `loss_args` and no key.
      decay: weight of the past in the exponential average of the factors, in [0, 1): by default
        0.8, and 0.95 for `Shampoo()`, whose factors say less each time.
      burn_in: calls at the start that only average statistics: their updates are zero.
      accumulate: micro-batches for a step; see `scale_by_curvature`.
      statistics_every: steps between statistics, a number or a schedule: by default 5, and 1 for
        `Shampoo()`, whose factors cost no pass through the model.
      statistics_batch: the share of a batch's examples that they are taken of, as
        `scale_by_curvature` takes it; not with `Shampoo()`, which sees no examples.
      refresh_every: steps in which every basis is renewed once; with `spread=False` a schedule,
        too.
      warmup_steps: steps at the start that all take statistics and renew every basis.
      refresh: how bases are found: `Eigh()` or `QR()`.
      spread: whether each of these steps renews a part of them; else the first one all.
      refresh_over: over whose devices they are dealt to be renewed; see `scale_by_curvature`.
      gather: `"inverses"`, here bases, or `"updates"`; see there. What `inner` keeps is divided as
        the bases are.
      max_factor_dim: the widest side that has one eigenbasis.
      wide_factors: what a wider one has: its own coordinates (`"diagonal"`), or an eigenbasis for
        each of `"blocks"` of at most `max_factor_dim` coordinates that follow each other.
      axis_name: as `scale_by_curvature` takes it.
      precision: of the products of float32 in statistics and of changes of basis; see there.
      storage_dtype: what bases are kept in between steps, as `jnp.bfloat16`; see there.

    Returns:
      An optax transformation with extra arguments; its state is an `EigenbasisState`. `update`
      takes `loss_args` and `key` as that of `scale_by_curvature`; others are passed on to `inner`.

    Raises:
      ValueError: at once for an argument out of range, or an inner transformation whose state
        cannot follow a change of basis; by `init` and `update` as `scale_by_curvature`.

    >>> import jax, jax.numpy as jnp, optax, curvature
    >>> def loss_fn(params, x, y):
    ...     return curvature.losses.l2_loss(x @ params["w"], y).mean()
    >>> params, x, y = {"w": jnp.ones((2, 3))}, jnp.ones((4, 2)), jnp.zeros((4, 3))
    >>> registry = curvature.register(loss_fn, params, x, y)
    >>> tx = optax.chain(
    ...     curvature.in_eigenbasis(registry, optax.scale_by_adam()),
    ...     optax.scale_by_learning_rate(1e-2),
    ... )
    >>> grads, key = jax.grad(loss_fn)(params, x, y), jax.random.key(0)
    >>> updates, state = tx.update(grads, tx.init(params), params, loss_args=(x, y), key=key)
    >>> bool(loss_fn(optax.apply_updates(params, updates), x, y) < loss_fn(params, x, y))
    True
    """
    options = options_of(locals())
    check_transformation("inner", inner)
    return transformation(registry, inner, Layout.of(inner), kind, options)


def options_of(arguments: dict[str, Any]) -> Options:
    """The options among arguments, with what suits the kind where the pace of factors is None."""
    decay, period = (0.95, 1) if isinstance(arguments["kind"], Shampoo) else (0.8, 5)
    suited = {"decay": decay, "statistics_every": period}
    return Options.of(arguments | {k: x for k, x in suited.items() if arguments[k] is None})


def transformation(
    registry: Registry,
    inner: optax.GradientTransformation,
    layout: Layout,
    kind: Kind | Shampoo,
    options: Options,
) -> optax.GradientTransformationExtraArgs:
    """`in_eigenbasis` with a known layout of the inner transformation's state."""
    check_registry(registry)
    if not isinstance(options.refresh, Eigh | QR):
        raise TypeError(f"refresh is {options.refresh!r}, expected Eigh() or QR().")
    own_factors = isinstance(kind, Shampoo)
    if own_factors and options.statistics_batch is not None:
        raise ValueError(
            f"statistics_batch is {options.statistics_batch}, but Shampoo() takes its factors from "
            "the gradient, which has no examples: leave it out."
        )
    source = _FISHER if isinstance(kind, Shampoo) else kind  # the Fisher is not asked for
    stacked = options.stacks(_factored_alone(registry), source, alone=not layout.by_entry)
    averaging = (GradientAveraging if own_factors else Averaging)(stacked, options)
    rotation = Rotation.create(registry, averaging, inner, layout)
    apart = stacked.over

    def placed(inner: optax.OptState) -> optax.OptState:
        """The inner state with its moments on the devices of their bases."""
        return layout.joined(inner, divided(layout.split(inner), apart))

    def init(params: PyTree) -> EigenbasisState:
        check_params(params, registry)
        if not jax.tree.leaves(params):
            # `optax.tree_utils.tree_map_params` asks for the state of a placeholder.
            params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), registry.params)
        zero = jnp.zeros((), jnp.int32)
        bases = rotation.eigenbases.identity()
        state = EigenbasisState(
            **averaging.zeros(params),
            bases=bases,
            refreshed=jnp.zeros((), bool),
            inner=placed(rotation.inner.init(rotation.into(bases, params))),
            stats=EigenbasisStats(zero, zero, zero, jnp.zeros((), jnp.result_type(float))),
        )
        return own(state)

    @functools.cache
    def expected() -> EigenbasisState:
        return jax.eval_shape(init, registry.params)

    def update(
        updates: PyTree,
        state: EigenbasisState,
        params: PyTree | None = None,
        *,
        loss_args: tuple[PyTree, ...] | None = None,
        key: jax.Array | None = None,
        **extra: Any,
    ) -> tuple[PyTree, EigenbasisState]:
        args = (loss_args or ()) if own_factors else check_update(params, loss_args)
        check_state(state, EigenbasisState)
        check_configuration(state, expected())
        # It may have been made, or restored, elsewhere.
        kept = divided((state.statistics, state.bases), apart)
        state = state._replace(statistics=kept[0], bases=kept[1], inner=placed(state.inner))
        gathered = averaging.gathered(updates, state, params, args, key)
        act = functools.partial(step, gathered, params, extra)
        return when(gathered.due, act, (jax.tree.map(jnp.zeros_like, updates), gathered.state))

    def step(
        gathered: Gathered,
        params: PyTree,
        extra: dict[str, Any],
        carry: tuple[PyTree, EigenbasisState],
    ) -> tuple[PyTree, EigenbasisState]:
        _, old = carry
        state = refreshed(old, gathered.sound)
        seen = rotation.into(state.bases, gathered.gradient)
        there = None if params is None else rotation.into(state.bases, params)
        found, after = rotation.inner.update(seen, state.inner, there, **extra)
        direction = rotation.out_of(state.bases, found, gathered.gradient)
        good = gathered.sound & finite(direction)
        skipped = state.stats.skipped + jnp.where(good, 0, 1).astype(jnp.int32)
        idle = jnp.where(good, 0, state.stats.idle + 1)
        kept = jax.tree.map(functools.partial(jnp.where, good), after, state.inner)
        state = state._replace(
            step=jnp.where(good, state.step + 1, state.step),
            inner=kept,
            stats=state.stats._replace(skipped=skipped, idle=idle),
        )
        return masked(good, direction), state

    def refreshed(state: EigenbasisState, sound: jax.Array) -> EigenbasisState:
        """Renews the bases whose turn it is; all of them in the first steps."""
        early = ~state.refreshed | (state.step < options.warmup_steps)
        parts = rotation.layout.split(state.inner)
        clock, none = options.clock(state.step, sound, early), jnp.full_like(state.weight, -1)
        old = Moved(state.bases, parts["vector"], parts["diagonal"], jnp.asarray(False), none)
        everything = rotation.eigenbases.refresh(
            state.statistics, state.weight, ~state.refreshed, clock, old
        )
        failed = state.stats.failed_refreshes + everything.failed.astype(jnp.int32)
        stale = jnp.where(everything.staleness < 0, state.stats.staleness, everything.staleness)
        moments: dict[Moment, Any] = {
            "vector": everything.vectors,
            "diagonal": everything.diagonals,
        }
        return state._replace(
            bases=everything.bases,
            refreshed=state.refreshed | clock.due,
            inner=rotation.layout.joined(state.inner, moments),
            stats=state.stats._replace(failed_refreshes=failed, staleness=stale),
        )

    return entering(optax.GradientTransformationExtraArgs(init, update))


@dataclasses.dataclass(frozen=True, eq=False)
class Rotation:
    """From parameter trees to blocks in eigenbases and back.

    Attributes:
      layers: stacks of all layers of the model: together they hold every parameter.
      eigenbases: of those with factors.
      inner: what is applied there.
      layout: where in its state there are vectors and diagonals.
    """

    layers: tuple[Stack, ...]
    eigenbases: Eigenbases
    inner: optax.GradientTransformationExtraArgs
    layout: Layout

    @classmethod
    def create(
        cls,
        registry: Registry,
        averaging: Averaging,
        inner: optax.GradientTransformation,
        layout: Layout,
    ) -> Rotation:
        """The rotation of a registry's layers."""
        wrapped = optax.with_extra_args_support(inner)
        zeros = jax.eval_shape(averaging.zeros, registry.params)["statistics"]
        factored, options = averaging.stacks.layers, averaging.options
        assert isinstance(options.refresh, Eigh | QR)
        how = options.refresh, options.turns, options.precision, options.refresh_over
        eigenbases = Eigenbases(factored, zeros, *how, options.storage_dtype)
        known = {layer.name for stack in factored for layer in stack.members}
        others = [layer for layer in registry.layers if layer.name not in known]
        return cls((*factored, *averaging.stacks.of(others)), eigenbases, wrapped, layout)

    def into(self, bases: Arrays, tree: PyTree) -> Blocks:
        """Block coordinates of every stack, in its eigenbases."""

        def rotated(bases: Arrays, leaves: Sequence[jax.Array]) -> Blocks:
            blocks = {layer.name: layer.gather(leaves) for layer in self.layers}
            return self._turned(into_basis, bases, blocks)

        like = {x.name: PartitionSpec(*(x.over.spec[:1] if x.over else ())) for x in self.layers}
        return automatic(rotated, bases, jax.tree.leaves(tree), like=like)

    def out_of(self, bases: Arrays, blocks: Blocks, like: PyTree) -> PyTree:
        """A tree like the parameters from blocks in eigenbases."""
        leaves, structure = jax.tree.flatten(like)

        def back(bases: Arrays, blocks: Blocks, leaves: Sequence[jax.Array]) -> list[jax.Array]:
            found: list[Any] = [None] * len(leaves)
            straight = self._turned(from_basis, bases, blocks)
            for layer in self.layers:
                for leaf, x in layer.scatter(straight[layer.name]).items():
                    found[leaf] = x if found[leaf] is None else found[leaf] + x
            pairs = zip(found, leaves, strict=True)
            return [jnp.zeros_like(v) if x is None else x.astype(v.dtype) for x, v in pairs]

        return jax.tree.unflatten(structure, automatic(back, bases, blocks, leaves, like=leaves))

    def _turned(self, turn: Callable[..., jax.Array], bases: Arrays, blocks: Blocks) -> Blocks:
        turned = dict(blocks)
        for name, statistics in self.eigenbases.factors.items():
            full = in_full(bases[name], statistics)
            both = [full[basis] for basis in BASES]
            turned[name] = turn(both, blocks[name], 1, self.eigenbases.precision)
        return turned


def _factored_alone(registry: Registry) -> Registry:
    """The registry with curvature for layers with Kronecker factors alone."""

    def one(layer: Layer) -> Layer:
        if not layer.factored or layer.uses == 0:
            return dataclasses.replace(layer, block=EXCLUDED)
        # Corrections are not asked for.
        return dataclasses.replace(layer, block="kronecker") if layer.block == "ekfac" else layer

    return dataclasses.replace(registry, layers=tuple(map(one, registry.layers)))
