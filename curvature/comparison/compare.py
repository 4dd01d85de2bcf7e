"""`curvature.compare`: from a registry, parameters and data to a `Comparison`."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from curvature.comparison import arguments, estimates, structured
from curvature.comparison.accumulate import Measurement, Plan
from curvature.comparison.estimates import Estimate
from curvature.comparison.result import (
    WHOLE,
    Block,
    Comparison,
    Pair,
    Spectrum,
    Structured,
)
from curvature.comparison.state import Prediction
from curvature.dataset import first_batch, shares
from curvature.statistics.kinds import Kind
from curvature.trace import Registry

PyTree = Any
_ROUGH = 0.1  # of a matrix's norm
STRUCTURED = ("kronecker", "kronecker_reduce", "ekfac", "diagonal")


def compare(
    registry: Registry,
    params: PyTree,
    batches: Iterable[Any],
    *,
    key: jax.Array,
    kinds: Mapping[str, Kind] | Sequence[Kind] | None = None,
    blocks: str | Sequence[str] | None = None,
    directions: bool = True,
    approximations: Sequence[str] = STRUCTURED,
    damping: float = 1e-3,
    top: int = 5,
    limit: int = 1000,
    memory: float = 1e9,
    progress: bool | None = None,
) -> Comparison:
    """Puts kinds of curvature of a model side by side: true Fisher, empirical Fisher, Gauss-Newton.

    For every layer, and the whole network: how the kinds differ in scale (traces), shape (Frobenius
    cosine), leading directions (principal angles) and distance; what that does to natural-gradient
    steps; and how good K-FAC and its relatives are for each kind.

    The data is gone through once, one batch in memory, with one backward pass for each column of
    the exact kinds and for each sample of the others. Matrices of up to `limit` entries a side are
    made exactly; larger blocks are projected to `limit` random directions (more than 20 layers to
    half as many). Where something is estimated, figures come with an error: half the width of a
    95 % interval, by the jackknife over five parts of the projection, and of sampled targets: so
    `Fisher(samples=k)` takes 5 k passes. Directions and effective dimensions, which depend on
    samples far from linearly, are those of k samples; all else is of their limit.

    Args:
      registry: what is in the model, from `curvature.register`. Layers that it excludes, and those
        whose examples cannot be told apart (`notes` say which), are left out.
      params: the parameters.
      batches: the data: an iterable that can be iterated again and again, each item a tuple of the
        loss function's other arguments, or the only one. Each batch counts by its examples. If an
        item cannot be used, figures are of those before it, and the notes say so.
      key: random key.
      kinds: the kinds by name, or without names; the first is the reference. By default the Fisher
        (exact up to 32 outputs an example, else from 4 samples), the empirical Fisher, and the
        Gauss-Newton matrix where it is another matrix than the Fisher.
      blocks: glob patterns of the layers' names, which may start at any level; None for all, and
        the whole network.
      directions: whether to compare directions.
      approximations: blocks of `Registry.with_blocks` to compare with the exact ones.
      damping: of directions and effective dimensions, in units of the curvature.
      top: how many leading eigenvalues and angles.
      limit: the largest matrix that is made.
      memory: bound on the per-example gradients held at a time, in bytes; a layer is not split.
      progress: whether to show a progress bar (tqdm); by default where tqdm is installed.

    Returns:
      The comparison: `print(result.table())`, `result.to_json(path)`, `result.save_html(path)`.

    Raises:
      ValueError: there is no data, parameters or the first batch's loss are not finite, no layer
        matches, or an argument is out of range.
      TypeError: `batches` is no iterable of batches, or can be iterated only once.

    >>> import jax, jax.numpy as jnp, curvature
    >>> def loss_fn(w, x, y):
    ...     return curvature.losses.squared_error(x @ w, y).mean()
    >>> x, y = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([2.0, 0.0])
    >>> registry = curvature.register(loss_fn, jnp.zeros(2), x, y)
    >>> found = curvature.compare(registry, jnp.zeros(2), [(x, y)], key=jax.random.key(0))
    >>> print(found.blocks[0].pairs["Fisher", "empirical Fisher"].trace_ratio)
    4
    """
    args = first_batch(batches)
    arguments.check(params, approximations, damping, top, limit)
    by_name, notes = arguments.named(registry, kinds)
    plan, left_out = arguments.planned(registry, params, args, by_name, blocks, limit, memory)
    notes = [*notes, *left_out]
    bar = _bar(progress)

    sizes: dict[tuple[Any, ...], float | None] = {}

    def size(args: tuple[PyTree, ...]) -> float | None:  # the loss knows what is no model state
        shapes = tuple(jnp.shape(leaf) for leaf in jax.tree.leaves(args))
        if shapes not in sizes:
            found = registry.analyse(params, args).losses[0].examples
            sizes[shapes] = float(found) if found > 1 else None
        return sizes[shapes]

    def data(count: int | None = None) -> Iterator[tuple[int, tuple[PyTree, ...], float]]:
        return itertools.islice(shares(batches, None, averaged=True, count_of=size), count)

    projecting, drawing, approximating = jax.random.split(_typed(key), 3)
    measured, predicted = Measurement(plan, projecting), Prediction(registry)
    notes += _measured(measured, predicted, params, data, drawing, bar, batches)
    count = measured.batches
    found: dict[str, Any] = {}
    notes += _each(
        "structured approximations of",
        plan.kinds,
        lambda name: found.update(
            {
                name: _approximated(
                    plan, name, measured, params, lambda: data(count), approximating, approximations
                )
            }
        ),
        bar,
    )
    result: list[Block] = []
    notes += _each(
        "figures of",
        plan.blocks,
        lambda name: result.append(
            _block(plan, name, measured, found, damping, top, directions=directions)
        ),
        bar,
    )
    if large := [block for block in result if block.projected]:
        least = min(block.size for block in large)
        dims = " or ".join(f"{dim:,}" for dim in sorted({block.projected or 0 for block in large}))
        notes.append(
            f"Blocks of {least:,} entries or more are projected to {dims} random directions."
        )
    if directions:
        notes += _rough(plan, result)
    return Comparison(
        kinds={name: repr(kind) for name, kind in plan.kinds.items()},
        state=predicted.state(measured.examples, measured.loss / measured.mass),
        blocks=tuple(result),
        damping=damping,
        settings=_settings(
            batches=count, top=top, limit=limit, approximations=list(approximations)
        ),
        notes=tuple(notes),
    )


def _typed(key: jax.Array) -> jax.Array:
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)  # a key of jax.random.PRNGKey


def _bar(progress: bool | None) -> Callable[..., Any]:
    """tqdm, or nothing."""
    if progress is not False:
        try:
            from tqdm import tqdm
        except ModuleNotFoundError as error:
            if progress:
                raise ModuleNotFoundError(
                    "progress=True needs tqdm, which is not installed: install the extra "
                    "'curvature[report]', or leave it out."
                ) from error
        else:
            return tqdm
    return lambda items, **_: items


def _settings(**settings: Any) -> dict[str, Any]:
    device = jax.devices()[0]
    return settings | {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": device.device_kind,
        "dtype": str(jnp.zeros(()).dtype),
    }


# What is done -------------------------------------------------------------------------------------


def _measured(
    measured: Measurement,
    predicted: Prediction,
    params: PyTree,
    data: Callable[[], Iterator[Any]],
    key: jax.Array,
    bar: Callable[..., Any],
    batches: Any,
) -> list[str]:
    """Goes through the data; a note where it could not go on."""
    total = len(batches) if hasattr(batches, "__len__") else None
    try:
        for i, args, share in bar(data(), desc="batches", total=total):
            measured.add(params, args, share, jax.random.fold_in(key, i))
            predicted.add(params, args)
    except Exception as error:
        if not measured.batches:
            if isinstance(error, FloatingPointError):
                raise ValueError(f"The first batch cannot be used: {error}.") from error
            raise
        return [
            f"Batch {measured.batches + 1} could not be used ({_said(error)}): all figures are of "
            f"the {measured.batches} before it."
        ]
    return []


def _each(
    what: str, names: Iterable[str], do: Callable[[str], None], bar: Callable[..., Any]
) -> list[str]:
    """Does something for every name, and notes for which ones it failed: the others are kept."""
    notes = []
    for name in bar(tuple(names), desc=what.rsplit(" ", 1)[0]):
        try:
            do(name)
        except Exception as error:
            notes.append(f"No {what} {name}: {_said(error)}.")
    return notes


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": .")


def _estimate(plan: Plan, measured: Measurement, kind: str, block: str) -> Estimate:
    matrices, gradient = measured.matrix(kind, block), measured.mean_gradient(block)
    if not (jnp.isfinite(matrices).all() and jnp.isfinite(gradient).all()):
        raise FloatingPointError(f"{kind} is not finite")
    projected = next(iter(plan.maps[block].values())).width is not None
    return Estimate(matrices, gradient, projected, measured.resolution(kind, block))


def _rough(plan: Plan, blocks: Sequence[Block]) -> list[str]:
    """Notes on sampled kinds whose solves more samples would change."""
    notes = []
    for kind in plan.kinds:
        found = [block.spectra[kind].sampling_error for block in blocks]
        worst = max((error.value for error in found if error is not None), default=0.0)
        if worst > _ROUGH:
            notes.append(
                f"{kind}: its samples leave it off by up to {worst:.2g} of its norm. Directions "
                "and effective dimensions are those of so many samples, not of their limit: more "
                "will change them."
            )
    return notes


def _approximated(
    plan: Plan,
    kind_name: str,
    measured: Measurement,
    params: PyTree,
    batches: Callable[[], Iterator[Any]],
    key: jax.Array,
    names: Sequence[str],
) -> dict[str, dict[str, Structured]]:
    """The figures of approximations of one kind, by layer and name."""
    approximations = structured.Approximations(plan, kind_name, params, batches, key)
    blocks = {name: approximations.blocks(name) for name in names}

    def figures_of(layer: str) -> dict[str, Structured]:
        estimate = _estimate(plan, measured, kind_name, layer)
        of_layer = {name: found[layer] for name, found in blocks.items() if layer in found}
        if not estimate.projected:
            return {name: structured.beside(estimate, block) for name, block in of_layer.items()}
        return {
            name: structured.beside_moments(estimate, approximations.moments(name, layer, block))
            for name, block in of_layer.items()
        }

    layers = (layer.name for layer in plan.layers)
    return {layer: found for layer in layers if (found := figures_of(layer))}


def _block(
    plan: Plan,
    name: str,
    measured: Measurement,
    approximated: dict[str, dict[str, dict[str, Structured]]],
    damping: float,
    top: int,
    *,
    directions: bool,
) -> Block:
    """Everything about one block."""
    found = {kind: _estimate(plan, measured, kind, name) for kind in plan.kinds}
    layers = [x for x in plan.layers if x.name in (plan.whole if name == WHOLE else (name,))]
    spectra: dict[str, Spectrum] = {
        kind: estimates.spectrum(estimate, damping, top) for kind, estimate in found.items()
    }
    order = list(plan.kinds)
    pairs: dict[tuple[str, str], Pair] = {
        (a, b): estimates.pair(found[a], found[b], damping, top, directions=directions)
        for i, a in enumerate(order)
        for b in order[i + 1 :]
    }
    projected = next(iter(found.values())).projected
    return Block(
        name=name,
        parameters=tuple(path for layer in layers for path in layer.parameters),
        size=sum(layer.size for layer in layers),
        projected=plan.dim(name) if projected else None,
        spectra=spectra,
        pairs=pairs,
        structured={k: found[name] for k, found in approximated.items() if name in found},
    )
