"""One trace of a loss, analysed: its layers and losses, and the program for the estimator.

Where parameters are computed with before they meet the data, the trace is written anew (`respell`),
and the better of the two is kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from curvature import _jax
from curvature.trace import liveness, mixing
from curvature.trace.batch_axis import batch_axes, batch_size, more_examples
from curvature.trace.environment import Inputs
from curvature.trace.grouping import Gradients, assemble
from curvature.trace.interpreter import Finder
from curvature.trace.layers import Layer
from curvature.trace.layouts import Batch, Examples
from curvature.trace.program import LossTag, Program, settle
from curvature.trace.respell import HELD, respelled
from curvature.trace.terms import Term, check_covered, untagged
from curvature.trace.views import View

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Analysis:
    """One trace of the loss: its program, layers and losses for one set of shapes.

    Attributes:
      program: what the estimator executes.
      layers: see `Registry`.
      losses: see `Registry`.
      batch_found: see `Registry`.
      masked: whether the weight of some unit of a loss may be zero.
      blocked: equations that no gradient can pass, with where they are and the parameters that
        come before them.
      untagged: see `Registry`.
      batch: see `Registry`.
    """

    program: Program
    layers: tuple[Layer, ...]
    losses: tuple[LossTag, ...]
    batch_found: bool
    masked: bool
    blocked: tuple[str, ...]
    untagged: tuple[Term, ...]
    batch: tuple[Batch | None, ...]


def analyse(
    loss_fn: Callable[..., Any],
    has_aux: bool,
    params: PyTree,
    args: tuple[PyTree, ...],
    *,
    search: bool = True,
    known: Sequence[Batch | None] = (),
    larger: int | None = None,
) -> Analysis:
    """Traces a loss.

    Args:
      loss_fn: the loss function.
      has_aux: whether it returns `(loss, aux)`.
      params: the parameters, or their shapes.
      args: its other arguments, or theirs.
      search: whether to look for a larger batch: not where there was none before.
      known: where the batch was found before, to be tried first.
      larger: a number of examples for which it is traced anyway.

    Raises:
      TypeError: the loss is not a scalar.
      ValueError: it has no tagged loss, or side effects, or no parameter reaches the tagged loss.
    """
    jaxpr, out = _jax.trace(loss_fn, params, *args)
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(
            f"loss_fn returned {type(out).__name__}, expected (loss, aux) because has_aux is True."
        )
    _check_scalar(out[0] if has_aux else out)
    _check_pure(jaxpr)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    twin, closure = None, False
    batches: tuple[Examples, ...] = (Examples(1),)
    if search:
        twin, batches = more_examples(loss_fn, params, args, jaxpr, known, larger)
    if twin is None:
        number, closure = batch_size(jaxpr, args)
        batches = (Examples(number),)
    walked = functools.partial(_walked, leaves=leaves, closure=closure, batches=batches)
    analysis, computed = walked(jaxpr, twin)
    if not computed:
        return analysis
    spelled = _respelled(jaxpr, twin, len(leaves))
    if spelled is None:
        return analysis
    other, _ = walked(*spelled[:2])
    if _known(other) <= _known(analysis):
        return analysis
    return dataclasses.replace(other, layers=tuple(map(spelled[2], other.layers)))


def _known(analysis: Analysis) -> tuple[int, int]:
    """How many entries are in layers, and in layers all of whose uses see the data."""
    structured = [layer for layer in analysis.layers if layer.structured]
    seeing = sum(layer.size for layer in structured if not layer.unbatched)
    return sum(layer.size for layer in structured), seeing


def _respelled(
    jaxpr: _jax.Jaxpr, twin: _jax.Jaxpr | None, leaves: int
) -> tuple[_jax.Jaxpr, _jax.Jaxpr | None, Callable[[Layer], Layer]] | None:
    """Both traces with products of parameters taken apart, and what to say of layers then."""
    rest = len(jaxpr.invars) - leaves
    if twin is None:
        data = [False] * leaves + [True] * (rest + len(jaxpr.consts))
    else:
        pairs = zip(jaxpr.invars, twin.invars, strict=True)
        data = [mine.aval.shape != other.aval.shape for mine, other in pairs]
    spelled = respelled(jaxpr, leaves, data)
    if spelled is None:
        return None
    new, held = spelled
    twins = None if twin is None else respelled(twin, leaves, data)

    def noted(layer: Layer) -> Layer:
        if not held.intersection(view.source for view in layer.leaves):
            return layer
        return dataclasses.replace(layer, reason=f"{layer.reason}; {HELD}")

    return new, twins and twins[0], noted


def _walked(
    jaxpr: _jax.Jaxpr,
    twin: _jax.Jaxpr | None,
    *,
    leaves: Sequence[tuple[Any, Any]],
    closure: bool,
    batches: tuple[Examples, ...],
) -> tuple[Analysis, bool]:
    """What one walk through a trace finds, and whether parameters were computed with on the way."""
    paths, shapes = [path for path, _ in leaves], [tuple(leaf.shape) for _, leaf in leaves]
    rest = len(jaxpr.invars) - len(leaves)
    finder = Finder([jax.tree_util.keystr(path) for path in paths])
    inputs = Inputs(
        values=[*(View.of(i, shape) for i, shape in enumerate(shapes)), *[None] * rest],
        after=[False] * len(jaxpr.invars),
        varies=[False] * len(leaves) + [True] * rest,
        first=[True] * len(jaxpr.invars),
        closure=closure,
        batches=batches,
    )
    program, _, _ = finder.walk(jaxpr, twin, inputs, [False] * len(jaxpr.outvars))
    if not finder.losses:
        _raise_untagged(jaxpr)
    terms = untagged(jaxpr, len(leaves))
    reached = liveness.reaches_output(jaxpr)[: len(leaves)]
    gradients = Gradients(
        frozenset(i for i, on in enumerate(reached) if on),
        frozenset(i for term in terms for i in term.leaves),
        frozenset(finder.stopped),
    )
    live = liveness.reaches_loss(jaxpr, [False] * len(jaxpr.outvars))[1][: len(leaves)]
    check_covered(jaxpr, finder.losses, terms, used=any(live))
    mixing.mark(program, twin, len(leaves), batches)
    layers = assemble(finder.uses, paths, shapes, gradients, batches)
    settle(program)
    analysis = Analysis(
        program,
        layers,
        tuple(finder.losses),
        batch_found=twin is not None,
        masked=finder.masked,
        blocked=tuple(finder.blocked),
        untagged=terms,
        batch=batch_axes(jaxpr.invars[len(leaves) :], twin, batches),
    )
    return analysis, finder.computed


def _raise_untagged(jaxpr: _jax.Jaxpr) -> NoReturn:
    ruled = _jax.with_own_rule(jaxpr)
    hint = ""
    if ruled:
        hint = (
            f" A loss in the derivative's rule of a custom_jvp or custom_vjp (there is one at "
            f"{ruled}) is not seen: register a function of its own that has the tagged loss, with "
            "objective=False, and pass the gradients of yours to update."
        )
    raise ValueError(
        "The loss function has no tagged loss: nothing says where the network ends. Use a loss "
        "of curvature.losses in place of its namesake in optax.losses, for example "
        f"curvature.losses.softmax_cross_entropy_with_integer_labels.{hint}"
    )


def _check_pure(jaxpr: _jax.Jaxpr) -> None:
    """Raises for side effects other than debugging output: the loss is evaluated once more."""
    for equation in jaxpr.equations:
        for inner in _jax.nested(equation):
            _check_pure(inner)
        effect = None if _jax.nested(equation) else _jax.side_effect(equation)
        if effect is not None:
            instead = "return what you need as aux instead, or move the effect out of the loss"
            if effect.startswith("debug"):
                instead = "print with ordered=False"
            raise ValueError(
                f"The loss function has a side effect, {effect} at {_jax.location(equation)}. "
                f"Curvature evaluates it once more, for many vectors at a time: {instead}."
            )


def _check_scalar(loss: Any) -> None:
    shape = getattr(loss, "shape", None)
    if shape is None:
        raise TypeError(
            f"loss_fn returned {type(loss).__name__}, expected a scalar array. If it returns "
            "(loss, aux), pass has_aux=True."
        )
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise TypeError(
            f"loss_fn returned an array of {loss.dtype}, expected floating point: a loss that "
            "can be differentiated."
        )
    if shape != ():
        raise TypeError(
            f"loss_fn returned an array of shape {shape}, expected a scalar: average it."
        )
