"""The zoo: small models of real architectures, and what `register` should find in them.

Every model is a function that returns `(loss_fn, params, args, has_aux)`, decorated with the kind
that each of its parameters is expected to get. The modules of this package fill `MODELS`. Models
are made under JAX's defaults (32 bits, standard promotion): see `defaults`.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import curvature

BATCH = 4
BLOCKS = {
    "dense": "kronecker",
    "conv": "kronecker",
    "embedding": "kronecker",
    "scale": "diagonal",
    "shift": "diagonal",
    "generic": "diagonal",
}
Kinds = str | frozenset[str] | set[str]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model and its expected kinds.

    Attributes:
      name: unique name.
      make: returns `(loss_fn, params, args, has_aux)`.
      expected: globs over slash paths, each with the kind (or possible kinds) of the parameters it
        matches; the first match counts.
    """

    name: str
    make: Callable[[], tuple[Callable[..., Any], Any, tuple[Any, ...], bool]]
    expected: Mapping[str, Kinds]

    def register(self) -> tuple[curvature.Registry, Any, tuple[Any, ...]]:
        """The registry, the parameters and the arguments."""
        loss_fn, params, args, has_aux = self.make()
        return curvature.register(loss_fn, params, *args, has_aux=has_aux), params, args


MODELS: dict[str, Model] = {}


def model(expected: Mapping[str, Kinds]) -> Callable[[Any], Any]:
    """Decorator: puts a model into `MODELS` as `module/function`."""

    def add(make: Any) -> Any:
        name = f"{make.__module__.rpartition('.')[2]}/{make.__name__}"
        assert name not in MODELS, name
        MODELS[name] = Model(name, make, expected)
        return make

    return add


@contextlib.contextmanager
def defaults() -> Iterator[None]:
    """JAX as its users have it, not as the tests set it: 32 bits and standard promotion."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


def check_kinds(
    registry: curvature.Registry, params: Any, expected: Mapping[str, Kinds]
) -> dict[str, set[str]]:
    """Raises an AssertionError that names every parameter whose layers are not as expected."""
    found: dict[str, set[str]] = {}
    wrong, used = [], set()
    shown = str(registry)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, _ in leaves:
        key = jax.tree_util.keystr(path)
        slashed = jax.tree_util.keystr(path, simple=True, separator="/")
        layers = [layer for layer in registry.layers if key in layer.parameters]
        kinds = found[slashed] = {layer.kind for layer in layers}
        if key not in shown:
            wrong.append(f"{slashed} is not in the table")
        patterns = [p for p in expected if fnmatch.fnmatchcase(slashed, p)]
        if not patterns:
            wrong.append(f"{slashed} ({', '.join(kinds)}) matches no pattern of the test")
            continue
        used.add(patterns[0])
        want = expected[patterns[0]]
        want = {want} if isinstance(want, str) else set(want)
        if not kinds or not kinds <= want:
            reasons = "; ".join(layer.reason for layer in layers)
            wrong.append(f"{slashed} is {sorted(kinds)}, expected {sorted(want)} ({reasons})")
    for layer in registry.layers:
        if layer.block != BLOCKS.get(layer.kind):
            wrong.append(f"{layer.name} is {layer.kind} and has the block {layer.block}")
        if layer.kind == "generic" and not layer.reason:
            wrong.append(f"{layer.name} is generic without a reason")
    entries = sum(math.prod(leaf.shape) for _, leaf in leaves)
    covered = sum(layer.size for layer in registry.layers)
    if covered != entries:
        wrong.append(f"the layers have {covered} entries together, the parameters {entries}")
    wrong.extend(f"the pattern {p} matches nothing" for p in expected if p not in used)
    if wrong:
        raise AssertionError("\n".join(["", *wrong, "", shown]))
    return found


def check_finite(tree: Any) -> None:
    """Raises an AssertionError that names the leaves with entries that are not finite."""
    bad = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if not np.all(np.isfinite(np.asarray(leaf, np.float64)))
    ]
    if bad:
        raise AssertionError(f"not finite: {bad}")


# Less of XLA's optimisation, which at these sizes costs more than it saves: with all of them, what
# is left is a third. A release may drop an option.
_QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}


@functools.cache
def _known_options() -> dict[str, Any]:
    def knows(name: str) -> bool:
        with contextlib.suppress(Exception):
            jax.jit(lambda: 0, compiler_options={name: _QUICK[name]})()
            return True
        return False

    return {name: value for name, value in _QUICK.items() if knows(name)}


def jit(function: Callable[..., Any]) -> Any:
    """`jax.jit`, quick to compile."""
    return jax.jit(function, compiler_options=_known_options())


# Data and parameters -------------------------------------------------------------------------


def normal(*shape: int, seed: int = 0) -> jax.Array:
    """Normal data."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def integers(high: int, *shape: int, seed: int = 0) -> jax.Array:
    """Integers below `high`."""
    return jnp.asarray(np.random.default_rng(seed).integers(high, size=shape), jnp.int32)


def fill(shapes: Any) -> Any:
    """Random arrays in place of shapes: much cheaper than compiling initialisers."""

    def one(path: Any, leaf: Any) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        values = rng.normal(size=leaf.shape)
        around_one = any(word in name.split("/")[-1] for word in ("scale", "var", "gamma"))
        values = 1 + 0.1 * np.clip(values, -3, 3) if around_one else 0.3 * values
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, shapes)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The tagged softmax cross entropy."""
    return curvature.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


def classifier(
    apply: Callable[..., jax.Array], params: Any, *inputs: jax.Array
) -> tuple[Callable[..., Any], Any, tuple[Any, ...], bool]:
    """The model `apply(params, *inputs)` with the mean cross entropy to some labels."""
    shape = jax.eval_shape(apply, params, *inputs).shape

    def loss_fn(params: Any, *args: jax.Array) -> jax.Array:
        *inputs, labels = args
        return cross_entropy(apply(params, *inputs), labels).mean()

    return loss_fn, params, (*inputs, integers(shape[-1], *shape[:-1])), False


def regressor(
    apply: Callable[..., jax.Array], params: Any, *inputs: jax.Array
) -> tuple[Callable[..., Any], Any, tuple[Any, ...], bool]:
    """The model `apply(params, *inputs)` with the mean squared error to some targets."""
    shape = jax.eval_shape(apply, params, *inputs).shape

    def loss_fn(params: Any, *args: jax.Array) -> jax.Array:
        *inputs, targets = args
        return curvature.losses.l2_loss(apply(params, *inputs), targets).mean()

    return loss_fn, params, (*inputs, normal(*shape, seed=1)), False
