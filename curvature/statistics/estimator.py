"""The blockwise estimator: statistics of every block from a few backward passes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from curvature.block_diagonal import BlockDiagonal, block_of
from curvature.meshes import automatic, on_mesh
from curvature.precision import FAST, Precision, accumulator, check_precision
from curvature.sides import Limit, WideFactors, check_limit
from curvature.statistics import devices
from curvature.statistics import layer as stats
from curvature.statistics.devices import Axes
from curvature.statistics.eigenbasis import BASES, of_factors, rebased, without_noise
from curvature.statistics.evaluate import evaluate
from curvature.statistics.factors import Statistics, factors_of
from curvature.statistics.kinds import Draw, Fisher, Kind
from curvature.statistics.passes import sum_passes
from curvature.statistics.row_mask import alive_rows
from curvature.statistics.same_inputs import shared
from curvature.statistics.share import check_share, examples_of, ratios, sums
from curvature.statistics.sweep import Sweep
from curvature.trace import Layer, Registry, check_registry
from curvature.trace.analysis import Analysis
from curvature.trace.layers import EXCLUDED

PyTree = Any
_FISHER = Fisher()


@dataclasses.dataclass(frozen=True, eq=False)
class Estimator:
    """Block-diagonal curvature of a registered model at given parameters and data.

    Attributes:
      registry: what is in the model.
      kind: what is averaged: `Fisher`, `EmpiricalFisher` or `GaussNewton`.
      max_factor_dim: the widest Kronecker factor that is kept as one matrix.
      axis_name: inside `shard_map` or `pmap`, the axis, or axes, over which each device has
        examples of its own: the curvature is that of the mean of their losses. `()` keeps the
        devices apart.
      precision: of products of float32, as `jax.lax.dot` takes it. By default three products of
        bfloat16 halves where there is hardware for it; `"highest"` is float32 everywhere.
      wide_factors: what a wider factor keeps: its `"diagonal"`, or `"blocks"` along it of at most
        `max_factor_dim` coordinates that follow each other.

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
    axis_name: str | Sequence[str] | None = None
    precision: Precision = FAST
    wide_factors: WideFactors = "diagonal"

    def __post_init__(self) -> None:
        check_registry(self.registry)
        check_precision(self.precision)
        if isinstance(self.kind, type):
            raise TypeError(
                f"kind is the class {self.kind.__name__}, expected an instance: "
                f"{self.kind.__name__}()."
            )
        if not isinstance(self.kind, Kind):
            raise TypeError(
                f"kind is {self.kind!r}, expected Fisher(), EmpiricalFisher() or GaussNewton()."
            )
        check_limit(self.max_factor_dim, self.wide_factors)
        devices.axes_of(self.axis_name)

    @property
    def limit(self) -> Limit:
        """How wide factors may be."""
        return Limit(self.max_factor_dim, self.wide_factors)

    @property
    def axes(self) -> Axes:
        """`axis_name` as a tuple."""
        return devices.axes_of(self.axis_name)

    @property
    def needs_key(self) -> bool:
        """Whether calls need a random key."""
        return self.kind.needs_key(pooled=any(layer.pooled for layer in self.layers))

    def _why(self) -> str:
        """Why a key is needed."""
        if self.kind.needs_key(pooled=False):
            return "Sampling needs one."
        mixed = next((layer for layer in self.layers if layer.mixed), None)
        pooled = next((layer for layer in self.layers if layer.pooled), None)
        if mixed is None and pooled is not None:
            why = "is used where it does not see the data" if pooled.unbatched else "is generic"
            if pooled.structured and not pooled.unbatched:
                why = f"has a {pooled.block} block, and its examples cannot be told apart"
            return (
                f"Layer {pooled.name!r} {why}: only the sum over examples can be seen there, and "
                "each gets a random sign, so that its square is an estimate, right in the mean."
            )
        assert mixed is not None
        return (
            f"Between layer {mixed.name!r} and its loss examples meet ({mixed.meeting}), so each "
            "gets a random sign: without, what one example's output owes to the rows of another "
            "would be lost. The curvature is then an estimate, right in the mean."
        )

    @property
    def layers(self) -> list[Layer]:
        """The layers that have a block."""
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
        self,
        params: PyTree,
        *args: PyTree,
        key: jax.Array | None = None,
        bases: Mapping[str, Statistics] | None = None,
        share: float | None = None,
    ) -> dict[str, Statistics]:
        """The statistics of every block, by layer name; linear averages of these are meaningful.

        A Kronecker block has sums over rows, `input` of a a' and `output` of g g', and `rows`,
        their number: `operator` divides. A diagonal one has `values`. The sum over examples is
        weighted by dL/dl: the curvature of the loss itself, not of a single example.

        An EKFAC block has the factors, their eigenvectors `input_basis` and `output_basis`, and
        `values`, the second moments of per-example gradients in that basis (George et al. 2018).
        They take a second sweep of backward passes, with the same draws; none with known `bases`.

        Args:
          params: the parameters, as registered.
          *args: the other arguments of the loss function.
          key: random key, where the kind needs one.
          bases: statistics whose bases the corrections of EKFAC blocks are taken in, so that
            averages of corrections are meaningful; for example those of `rebased`. Their other
            entries are not looked at.
          share: of the examples that are looked at, evenly spaced: they stand for all of them. By
            default all are.

        Raises:
          ValueError: the key is missing, an argument differs from what was registered, `bases`
            are missing or of other shapes for some layer, no argument has examples to take a share
            of, or this is called inside `shard_map` or
            `pmap` without `axis_name`.
        """
        return self._sampled(params, args, key, bases, share, weigh=False)[0]

    def weighed_statistics(
        self,
        params: PyTree,
        *args: PyTree,
        key: jax.Array | None = None,
        bases: Mapping[str, Statistics] | None = None,
        share: float | None = None,
    ) -> tuple[dict[str, Statistics], jax.Array]:
        """`statistics`, and the total weight sum_i |dL/dl_i| of the loss's predictions.

        That is 1 where the loss is a mean over all predictions, and their number in an example
        where it is a mean over examples and a sum in each: what a KL divergence has to be divided
        by to be that of one prediction, in the mean. It takes no pass through the model unless
        weights depend on one.

        Args:
          params: as `statistics` takes them, and all that follow.
          *args: the other arguments of the loss function.
          key: random key, where the kind needs one.
          bases: for the corrections of EKFAC blocks.
          share: of the examples that statistics are taken of; the weight is that of all.
        """
        found, weight = self._sampled(params, args, key, bases, share, weigh=True)
        assert weight is not None
        return found, weight

    def _sampled(
        self,
        params: PyTree,
        args: PyTree,
        key: jax.Array | None,
        bases: Mapping[str, Statistics] | None,
        share: float | None,
        *,
        weigh: bool,
    ) -> tuple[dict[str, Statistics], jax.Array | None]:
        """The statistics, and the weight of the predictions if it is asked for."""
        if self.needs_key and key is None:
            raise ValueError(
                f"{self.kind} needs a random key here: pass key=jax.random.key(...). {self._why()}"
            )
        if key is not None and not hasattr(key, "dtype"):
            raise TypeError(f"key is {key!r}, expected a random key: jax.random.key({key!r}).")
        if key is not None and not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)  # a key of jax.random.PRNGKey
        known = None if bases is None else self._checked(bases)
        devices.check(self.axes, params, args, key, known)
        check_share(share, self.registry)
        analysis = self.registry.analyse(params, args)
        try:
            with on_mesh(params, args):
                weights: Mapping[int, jax.Array] = {}
                whole: Mapping[int, jax.Array] = {}
                if weigh or share is not None:
                    whole = sums(analysis, jax.tree.leaves((params, args)), self.kind, self.axes)
                total = self._together(sum(whole.values()), analysis) if weigh else None
                if share is not None:
                    args, size = examples_of(args, self.registry.batch, share)
                    analysis = self.registry.analyse(params, args, larger=size)
                    part = sums(analysis, jax.tree.leaves((params, args)), self.kind, self.axes)
                    weights = ratios(whole, part)
                draws = self.kind.draw(analysis.losses, key)
                return self._statistics(analysis, params, args, draws, weights, known), total
        except (ValueError, NotImplementedError) as error:
            if not analysis.blocked:
                raise
            raise ValueError(
                "The loss cannot be differentiated: between its parameters (in parentheses) and a "
                f"tagged loss stands {'; '.join(analysis.blocked)}. Use scan or a fori_loop with "
                "constant bounds, give the function a custom_vjp, or exclude the parameters."
            ) from error

    def rebased(
        self, statistics: dict[str, Statistics], restart: ArrayLike = False
    ) -> dict[str, Statistics]:
        """Statistics with the bases of EKFAC blocks computed anew from their (averaged) factors.

        The corrections are taken over to the new bases as well as a diagonal can: see
        `curvature.statistics.eigenbasis`. Statistics of other blocks are as they were.

        Args:
          statistics: as `statistics` returns them, or averages in one basis.
          restart: whether corrections become the products of the factors' eigenvalues instead,
            scaled to their trace: where they were taken in an arbitrary basis.
        """
        corrected = {x.name: x for x in self.layers if x.block == "ekfac"}
        return {
            name: self._rebased(corrected[name], found, restart) if name in corrected else found
            for name, found in statistics.items()
        }

    def _rebased(self, layer: Layer, statistics: Statistics, restart: ArrayLike) -> Statistics:
        """Statistics with new bases, and the corrections taken over to them."""

        def moved(statistics: Statistics, restart: ArrayLike) -> Statistics:
            factors = factors_of(layer, statistics)
            found = rebased(factors, len(layer.stack), restart, self.precision)
            return {name: found[name] for name in (*BASES, "values")}

        with on_mesh(statistics):
            return statistics | automatic(moved, statistics, restart)

    def operator(self, statistics: dict[str, Statistics]) -> BlockDiagonal:
        """The operator made from (averages of) `statistics`."""
        return operator_of(self.layers, statistics, self.registry.params)

    def zeros(self) -> dict[str, Statistics]:
        """Statistics of nothing, of the shapes that `statistics` returns."""
        return {
            layer.name: stats.zeros(layer, self._dtype(layer), self.limit) for layer in self.layers
        }

    def _dtype(self, layer: Layer) -> Any:
        leaves = jax.tree.leaves(self.registry.params)
        return accumulator(*(leaves[v.source].dtype for v in layer.leaves))

    def _alive(self, analysis: Analysis, params: PyTree, args: PyTree) -> dict[int, jax.Array]:
        layers = {layer.name: layer for layer in analysis.layers}
        inputs = [*jax.tree.leaves(params), *jax.tree.leaves(args)]
        return alive_rows(analysis, layers, inputs, self.axes)

    def _together(self, tree: PyTree, analysis: Analysis) -> PyTree:
        """What is linear in the loss's weights, of the loss of all devices."""
        outputs = [tag.z for tag in analysis.losses]
        return devices.together(tree, self.axes, analysis.program.jaxpr.outvars[0].aval, outputs)

    def _checked(self, bases: Mapping[str, Statistics]) -> dict[str, Statistics]:
        """The bases of every EKFAC layer, of the right shapes."""
        found: dict[str, Statistics] = {}
        for layer in self.layers:
            if layer.block != "ekfac":
                continue
            zeros = stats.zeros(layer, self._dtype(layer), self.limit)
            found[layer.name] = {}
            for name in BASES:
                basis = bases.get(layer.name, {}).get(name)
                if basis is None or basis.shape != zeros[name].shape:
                    what = "none" if basis is None else f"shape {list(basis.shape)}"
                    raise ValueError(
                        f"bases[{layer.name!r}][{name!r}]: found {what}, expected an array of "
                        f"shape {list(zeros[name].shape)}. Pass earlier statistics as bases."
                    )
                found[layer.name][name] = basis.astype(zeros[name].dtype)
        return found

    def _statistics(
        self,
        analysis: Analysis,
        params: PyTree,
        args: PyTree,
        draws: tuple[Draw, ...],
        weights: Mapping[int, jax.Array],
        bases: dict[str, Statistics] | None,
    ) -> dict[str, Statistics]:
        """All sweeps: the corrections of EKFAC blocks come second where their bases do."""
        passes = jax.tree.leaves(draws)[0].shape[0]
        alive = self._alive(analysis, params, args)
        layers = {layer.name: layer for layer in analysis.layers if layer.block != EXCLUDED}
        tokens = {
            name: stats.tokens(layer, self._dtype(layer), self.limit)
            for name, layer in layers.items()
            if layer.structured
        }
        generic = [name for name, layer in layers.items() if not layer.structured]
        corrected = [name for name, layer in layers.items() if layer.block == "ekfac"]
        first, second = tokens, {}
        if bases is None:
            later = ("values", "gradients")
            second = {n: {k: x for k, x in tokens[n].items() if k in later} for n in corrected}
            early = {n: {k: x for k, x in tokens[n].items() if k not in later} for n in corrected}
            first = tokens | early

        def sweep(
            tokens: dict[str, Statistics],
            generic: list[str],
            bases: dict[str, Statistics],
            met: set[str],
        ) -> dict[str, Statistics]:
            one = functools.partial(
                self._pass, analysis, params, args, alive, weights, tokens, generic, bases, met
            )
            summed = self._together(sum_passes(one, draws, passes), analysis)
            averaged = self.kind.averaged
            return {name: stats.combined(x, passes, averaged) for name, x in summed.items()}

        known = bases or {}
        found = shared(
            functools.partial(sweep, generic=generic, bases=known), first, analysis, layers
        )
        if bases is None:
            bases = {
                name: automatic(functools.partial(_bases, layers[name]), found[name])
                for name in corrected
            }
            values = sweep(second, [], bases, set()) if corrected else {}
            for name in corrected:
                clean = functools.partial(_known, layers[name])
                found[name] |= automatic(clean, found[name] | values[name] | bases[name])
        return {name: found[name] | bases.get(name, {}) for name in layers}

    def _pass(
        self,
        analysis: Analysis,
        params: PyTree,
        args: PyTree,
        alive: dict[int, jax.Array],
        weights: Mapping[int, jax.Array],
        tokens: dict[str, Statistics],
        generic: list[str],
        bases: dict[str, Statistics],
        met: set[str],
        draws: tuple[Draw, ...],
    ) -> dict[str, Statistics]:
        """One backward pass: the raw statistics of the layers with tokens and the generic ones."""
        layers = {layer.name: layer for layer in analysis.layers}
        leaves = jax.tree.leaves(params)

        def loss(
            tokens: dict[str, Statistics], generic: dict[str, jax.Array], ground: jax.Array
        ) -> jax.Array:
            inputs = list(leaves)
            for name, leaf in generic.items():
                inputs[layers[name].views[0].source] = leaf
            draw = dict(enumerate(draws))
            around = devices.around(self.axes)
            sweep = Sweep(
                layers,
                self.kind,
                tokens,
                draw,
                alive,
                bases=bases,
                devices=around,
                ground=ground,
                precision=self.precision,
                weights=weights,
                met=met,
            )
            outs, _ = evaluate(analysis.program, [*inputs, *jax.tree.leaves(args)], sweep)
            value: jax.Array = outs[0]
            return value

        whole = {name: leaves[layers[name].views[0].source] for name in generic}
        tokens, whole = devices.own((tokens, whole), self.axes)
        raw, gradients, _ = jax.grad(loss, argnums=(0, 1, 2))(tokens, whole, jnp.zeros(()))

        def finished(raw: Any, gradients: Any, bases: Any) -> dict[str, Statistics]:
            done = {
                name: stats.finished(
                    layers[name], found, bases.get(name), self.limit, self.precision
                )
                for name, found in raw.items()
            }
            for name, gradient in gradients.items():
                layer = layers[name]
                part = layer.gather({layer.views[0].source: gradient})
                done[name] = stats.of_generic(layer, part)
            return done

        return automatic(finished, raw, gradients, bases)


def operator_of(
    layers: Sequence[Layer], statistics: Mapping[str, Statistics], params: PyTree
) -> BlockDiagonal:
    """The operator made of some layers' statistics, or of blocks' arrays."""
    blocks = {x.name: block_of(x, factors_of(x, statistics[x.name])) for x in layers}
    return BlockDiagonal(blocks, tuple(layers), jax.tree.structure(params))


def _bases(layer: Layer, statistics: Statistics) -> Statistics:
    return of_factors(factors_of(layer, statistics), layer.shape[-2:], len(layer.stack))


def _known(layer: Layer, statistics: Statistics) -> Statistics:
    """The corrections of an EKFAC layer without what is a rounding error."""
    known = without_noise(factors_of(layer, statistics), len(layer.stack))
    return {"values": known["values"]}
