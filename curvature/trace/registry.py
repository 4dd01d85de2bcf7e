"""`register`: hand over a loss function and parameters, get back what is in the model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvature.meshes import on_mesh, shape_of
from curvature.trace import table
from curvature.trace.analysis import Analysis, analyse
from curvature.trace.layers import EXCLUDED, Layer
from curvature.trace.layouts import Batch
from curvature.trace.overrides import overridden, ruled
from curvature.trace.program import LossTag
from curvature.trace.terms import Term
from curvature.trees import difference

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Registry:
    """Every parameter of a model, the layer it belongs to and the block it gets.

    Made by `register`; printing it gives the coverage table.

    Attributes:
      layers: the layers, in the order of the parameters.
      losses: the tagged output losses.
      loss_fn: the user's function, `loss_fn(params, *args)`.
      has_aux: whether it returns `(loss, aux)`.
      params: shapes and dtypes of the parameters.
      args: shapes and dtypes of the other arguments.
      batch_found: whether batch axes were found by tracing with one more example; where that is
        impossible, an axis of the batch's size, or else the leading one, of everything that depends
        on the data is taken for it.
      untagged: where the loss has a gradient that no tagged loss covers, and of which parameters.
      batch: for each leaf of the other arguments, its axis of examples; None where it has none.
      objective: whether the loss's value is what is minimised; otherwise it carries curvature
        alone.
    """

    layers: tuple[Layer, ...]
    losses: tuple[LossTag, ...]
    loss_fn: Callable[..., Any]
    has_aux: bool
    params: PyTree
    args: tuple[PyTree, ...]
    batch_found: bool = True
    untagged: tuple[Term, ...] = ()
    batch: tuple[Batch | None, ...] = ()
    objective: bool = True

    @functools.cached_property
    def traced_once(self) -> Callable[..., Any]:
        """The loss function, traced once for all calls with arguments of the same shapes."""
        return jax.jit(self.loss_fn, inline=True)

    @property
    def coverage(self) -> float:
        """Share of parameter entries with a gradient that are in a structured layer."""
        return table.coverage(self.layers)

    def __str__(self) -> str:
        paths = jax.tree_util.tree_leaves_with_path(self.params)
        names = [jax.tree_util.keystr(path) for path, _ in paths]
        return table.render(self.layers, self.losses, self.untagged, names, self.batch_found)

    def override(
        self, pattern: str, *, block: str | None = None, exclude: bool = False
    ) -> Registry:
        """A registry in which the layers of some parameters get another block, or none.

        Args:
          pattern: glob over parameter paths written with slashes, such as `"decoder/*/kernel"`;
            it may start at any level of the path.
          block: the block's name, see `with_blocks`.
          exclude: leaves the layers out of the curvature: gradients pass unchanged, or go to the
            optimizer's `fallback`.

        Returns:
          A new registry; this one is unchanged. A later override wins over an earlier one whose
          parameters it matches, too.

        Raises:
          ValueError: no parameter matches, the layer cannot have that block, or the override is
            ambiguous: it matches a part of a layer, but not its weight.
        """
        if (block is None) == (not exclude):
            raise ValueError(
                f"Expected either block=... or exclude=True, found {block=}, {exclude=}."
            )
        choice = EXCLUDED if exclude else str(block)
        layers = overridden(self.layers, pattern, choice, self.params)
        return dataclasses.replace(self, layers=layers)

    def with_blocks(self, rule: str | Callable[[Layer], str | None]) -> Registry:
        """A registry in which layers get their blocks by a rule.

        | block | curvature of a layer | for |
        |---|---|---|
        | `"kronecker"` | A (x) B over rows (K-FAC, "expand"); the default there | matrices |
        | `"kronecker_reduce"` | A (x) B, positions of an example reduced first | matrices |
        | `"kronecker_weighted"` | A (x) B, rows weighted by the other side's norm | matrices |
        | `"ekfac"` | exact second moments in the eigenbasis of A (x) B | matrices |
        | `"foof"` | A (x) c I, the input factor alone | matrices |
        | `"diagonal"` | the exact diagonal; the default elsewhere | every layer |
        | `"dense"` | the exact matrix: for small layers | all but generic parameters |
        | `"identity"` | c I, c the mean of the diagonal | every layer |

        Matrices are dense, convolutional and embedding layers.

        Args:
          rule: the name of a block, for every layer that can have it; or a function from a layer to
            the name of its block, None to keep the one it has.

        Returns:
          A new registry; this one is unchanged, and excluded layers stay excluded.

        Raises:
          ValueError: no layer can have the block, or the rule gave one a block it cannot have.

        >>> import jax.numpy as jnp, curvature
        >>> def loss_fn(params, x, y):
        ...     return curvature.losses.l2_loss(x @ params["w"] * params["scale"], y).mean()
        >>> params = {"scale": jnp.ones(2), "w": jnp.ones((3, 2))}
        >>> x, y = jnp.ones((5, 3)), jnp.ones((5, 2))
        >>> registry = curvature.register(loss_fn, params, x, y)
        >>> [layer.block for layer in registry.with_blocks("ekfac").layers]
        ['diagonal', 'ekfac']
        >>> small = lambda layer: "dense" if layer.size < 4 else None
        >>> [layer.block for layer in registry.with_blocks(small).layers]
        ['dense', 'kronecker']
        """
        return dataclasses.replace(self, layers=ruled(self.layers, rule))

    @property
    def excluded(self) -> tuple[bool, ...]:
        """For each parameter leaf, whether all of it is left out of the curvature."""
        kept = {v.source for x in self.layers if x.block != EXCLUDED for v in x.leaves}
        return tuple(i not in kept for i in range(len(jax.tree.leaves(self.params))))

    def without_generic(self) -> Registry:
        """A registry in which generic parameters are excluded, too."""
        layers = [
            x if x.structured else dataclasses.replace(x, block=EXCLUDED) for x in self.layers
        ]
        return dataclasses.replace(self, layers=tuple(layers))

    def check_params(self, params: PyTree) -> None:
        """Raises ValueError for parameters of another structure, shape or dtype than registered."""
        _check_tree("params", params, self.params, exact=True)

    def analyse(
        self, params: PyTree, args: tuple[PyTree, ...], larger: int | None = None
    ) -> Analysis:
        """Traces the loss at these arguments, which must be of the registered kind.

        Shapes of `args` may differ from the registered ones (another batch size); the layers found
        must be the same. It is traced with more examples as well: `larger` is a number of them for
        which it is traced anyway.

        Raises:
          ValueError: trees, dtypes, ranks or layers differ from the registered ones.
        """
        self.check_params(params)
        _check_tree("loss_args", args, self.args, exact=False)
        search = self.batch_found
        with on_mesh(params, args):
            analysis = analyse(
                self.loss_fn,
                self.has_aux,
                params,
                args,
                search=search,
                known=self.batch,
                larger=larger,
            )
        found = [(x.name, x.kind, x.shape) for x in analysis.layers]
        expected = [(x.name, x.kind, x.shape) for x in self.layers]
        if found != expected:
            new = [x for x in found if x not in expected]
            raise ValueError(
                f"The loss function traced to other layers than were registered (new: {new}). Its "
                "structure depends on its arguments: register once for each structure."
            )
        pairs = zip(analysis.layers, self.layers, strict=True)
        layers = tuple(dataclasses.replace(new, block=old.block) for new, old in pairs)
        return dataclasses.replace(analysis, layers=layers)


def check_registry(registry: Any) -> Registry:
    """The registry; raises for what is none, such as the loss function itself."""
    if not isinstance(registry, Registry):
        raise TypeError(
            f"registry is {registry!r}, expected what curvature.register(loss_fn, params, batch) "
            "returns."
        )
    return registry


def register(
    loss_fn: Callable[..., Any],
    params: PyTree,
    *args: PyTree,
    has_aux: bool = False,
    objective: bool = True,
) -> Registry:
    """Finds the layers and output losses of a model from its loss function.

    Nothing is computed: `loss_fn` is traced with the shapes of the arguments.

    Args:
      loss_fn: `loss_fn(params, *args)`, a scalar, or `(scalar, aux)` with `has_aux`, exactly as
        given to `jax.value_and_grad`. At least one output loss must come from `curvature.losses`.
      params: pytree of floating-point arrays, or of `jax.ShapeDtypeStruct`.
      *args: the other arguments (batch, model state, dropout keys), arrays or shapes.
      has_aux: whether `loss_fn` returns `(loss, aux)`.
      objective: whether the loss is what is minimised. Pass False for the curvature of one function
        and the gradient of another: a policy's Fisher information for a clipped objective, a
        student's for distillation, a wave function's for its energy. The gradients given to
        `update` are then those of the other one, and what would compare values of this one
        (`LevenbergMarquardt`) refuses it.

    Returns:
      The registry; `print` it to see the coverage table.

    Raises:
      TypeError: a parameter is not a floating-point array, or the loss is not a scalar.
      ValueError: the loss function has no tagged loss, or none that its value depends on and a
        parameter reaches; one of them has no predictions (an empty batch); it has side effects
        (other than unordered debugging output); or there are no parameters.

    >>> import jax.numpy as jnp, curvature
    >>> def loss_fn(params, batch):
    ...     z = batch["x"] @ params["w"] + params["b"]
    ...     return curvature.losses.l2_loss(z, batch["y"]).mean()
    >>> params = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
    >>> batch = {"x": jnp.ones((5, 3)), "y": jnp.ones((5, 2))}
    >>> registry = curvature.register(loss_fn, params, batch)
    >>> [(layer.kind, layer.parameters) for layer in registry.layers]
    [('dense', ("['w']", "['b']"))]
    """
    shapes = _param_shapes(params)
    arg_shapes = jax.tree.map(shape_of, args)
    with on_mesh(shapes, arg_shapes):
        analysis = analyse(loss_fn, has_aux, shapes, args)
    return Registry(
        analysis.layers,
        analysis.losses,
        loss_fn,
        has_aux,
        shapes,
        arg_shapes,
        batch_found=analysis.batch_found,
        untagged=analysis.untagged,
        batch=analysis.batch,
        objective=objective and all(tag.loss.objective for tag in analysis.losses),
    )


def _param_shapes(params: PyTree) -> PyTree:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("There are no parameters: params is an empty tree.")
    for path, leaf in leaves:
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not hasattr(leaf, "shape"):
            found = type(leaf).__name__
        elif not jnp.issubdtype(dtype, jnp.floating):
            found = f"an array of {dtype}"
        else:
            continue
        raise TypeError(
            f"params{jax.tree_util.keystr(path)} is {found}, expected an array of real floating "
            "point. Pass what is not trained as another argument of the loss function, and keep a "
            "complex parameter as its real and imaginary parts."
        )
    return jax.tree.map(shape_of, params)


_ADAPTERS = (  # with what differs, at most 300 characters
    "Pass trees like those given to register. (Flax NNX: curvature_flax.nnx.Optimizer; linen: "
    "curvature_flax.linen.TrainState; Haiku: curvature_haiku.register.)"
)
_LONGEST = 90


def _check_tree(name: str, found: PyTree, expected: PyTree, *, exact: bool) -> None:
    """Raises where a tree is not of the registered kind, naming the first difference."""
    differs = difference(found, expected)
    if differs is not None:
        if len(differs) > _LONGEST:
            differs = f"{differs[: _LONGEST - 3]}..."
        raise ValueError(
            f"{name} has another structure than was registered: {differs}. {_ADAPTERS}"
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, leaf), shape in pairs:
        aval = shape_of(leaf)
        same = aval.shape == shape.shape if exact else len(aval.shape) == len(shape.shape)
        if not same or aval.dtype != shape.dtype:
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} is {aval.dtype}{list(aval.shape)}, but "
                f"{shape.dtype}{list(shape.shape)} was registered."
            )
