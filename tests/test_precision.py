"""Every contraction of curvature's own says how precise it is, and stays so.

The model's contractions have a precision of their own here, HIGH, which their derivatives inherit:
so whatever is at the default is one of ours where it was forgotten.
"""

from __future__ import annotations

import ast
import functools
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import curvature
from curvature import _jax, losses
from curvature.optimizer.quadratic import Quadratic
from curvature.precision import FAST, product

DEFAULT, HIGH, HIGHEST = (
    getattr(jax.lax.Precision, name) for name in ("DEFAULT", "HIGH", "HIGHEST")
)
ROOT = pathlib.Path(curvature.__file__).parent
# What is done in every step and refresh; reports and exact operators have tests of their figures.
FILES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if not {"comparison", "operators", "proximal", "metrics", "losses", "examples"}
    & set(path.relative_to(ROOT).parts)
)


def normal(i: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(i), shape, jnp.float32)


PARAMS = {
    "k": normal(0, 2, 2, 2, 4),
    "groups": normal(10, 2, 2, 1, 4),
    "c": normal(1, 4),
    "table": normal(2, 5, 4),
    "w": normal(3, 4, 4),
    "b": normal(4, 4),
    "recurrent": normal(5, 4, 4),
    "stacked": normal(6, 2, 4, 4),
    "scale": normal(7, 4),
    "experts": normal(8, 2, 4, 3),
}
BATCH = (normal(9, 6, 3, 3, 2), jnp.arange(12).reshape(6, 2) % 5, jnp.arange(6) % 3)


def loss_fn(
    p: Any, images: jax.Array, ids: jax.Array, labels: jax.Array, *, centred: bool = False
) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    h = images
    for name, groups in (("k", 1), ("groups", 4)):
        h = jax.lax.conv_general_dilated(
            h,
            p[name],
            (1, 1),
            "SAME",
            dimension_numbers=numbers,
            feature_group_count=groups,
            precision=HIGH,
        )
    h = jnp.tanh(h + p["c"]).mean((1, 2))
    words = jnp.einsum("ntd,de->nte", p["table"][ids], p["w"], precision=HIGH) + p["b"]
    h = h + jnp.tanh(words).sum(1) * p["scale"]

    def cell(h: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        h = jnp.tanh(jnp.matmul(h, w, precision=HIGH))
        return jnp.tanh(jnp.matmul(h, p["recurrent"], precision=HIGH)), None

    h, _ = jax.lax.scan(cell, h, p["stacked"])
    z = jnp.einsum("nd,edf->enf", h, p["experts"], precision=HIGH).sum(0)
    z = z - z.mean(0) if centred else z
    return losses.softmax_cross_entropy_with_integer_labels(z, labels).mean()


def contractions(jaxpr: _jax.Jaxpr) -> Iterator[Any]:
    for equation in jaxpr.equations:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation
        for inner in _jax.nested(equation):
            yield from contractions(inner)


EXACT = (
    "curvature/linalg.py",
    "curvature/optimizer/quadratic.py",
    "curvature/optimizer/refresh/methods.py",
)
assert all((ROOT.parent / name).is_file() for name in EXACT)


def traced(function: Any, *args: Any, exact: tuple[str, ...] = EXACT) -> set[tuple[str, int]]:
    """The lines of curvature that were run to trace a function; its contractions are checked.

    In the files that are `exact` they are at HIGHEST.
    """
    lines: set[tuple[str, int]] = set()
    files = set(map(str, FILES))

    def on_line(frame: Any, event: str, _: Any) -> Any:
        lines.add((frame.f_code.co_filename, frame.f_lineno))
        return on_line

    def on_call(frame: Any, event: str, _: Any) -> Any:
        return on_line if frame.f_code.co_filename in files else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        jaxpr, _ = _jax.trace(function, *args)
    finally:
        sys.settrace(before)
    # JAX's own patches of images have a kernel of ones and zeros, which has no more digits.
    for equation in contractions(jaxpr):
        patches = [(HIGHEST, DEFAULT)] if equation.primitive.name.startswith("conv") else []
        precision = equation.params["precision"]
        where = _jax.source_info_util.summarize(equation.source_info, num_frames=20)
        allowed = [(HIGH, HIGH), (HIGHEST, HIGHEST)]
        allowed += [] if any(name in where for name in exact) else [FAST]
        assert precision in allowed + patches, f"{equation.primitive} at {precision}, {where}"
    return lines


BLOCKS = (
    "kronecker",
    "kronecker_reduce",
    "kronecker_weighted",
    "ekfac",
    "foof",
    "diagonal",
    "identity",
    "dense",
)
METHODS = {
    "cholesky": curvature.Cholesky(tolerance=0.1),
    "newton": curvature.NewtonSchulz(),
    "eigh": curvature.Eigh(tolerance=0.1),
    "qr": curvature.QR(),
}


def of_block(block: str, *, centred: bool = False) -> set[tuple[str, int]]:
    loss = functools.partial(loss_fn, centred=centred)
    registry = curvature.register(loss, PARAMS, *BATCH)
    registry = registry.with_blocks(lambda x: block_for(x, block))
    estimators = [curvature.Estimator(registry), curvature.Estimator(registry, max_factor_dim=3)]
    if block in ("kronecker", "ekfac"):
        blocks = curvature.Estimator(registry, max_factor_dim=3, wide_factors="blocks")
        estimators.append(blocks)

    def everything(p: Any, key: jax.Array) -> Any:
        out = []
        for one in estimators:
            op = one(p, *BATCH, key=key)
            inverse = op.damped_inverse(0.1)
            out += [op @ p, op.solve(p, 0.1), op.power(p, -0.5, 0.1), op.trace(), inverse @ p]
            out += [op.logdet(0.1), op.eigenvalues(), op.diagonal(), inverse.diagonal()]
            out += [one.rebased(one.statistics(p, *BATCH, key=key), restart) for restart in (0, 1)]
            out += [[b.to_dense() for b in op.blocks.values()]]
        return out

    operators = ("blocks/kronecker.py", "blocks/dense.py", "(EigenKronecker.")
    return traced(everything, PARAMS, jax.random.key(0), exact=(*EXACT, *operators))


def block_for(layer: curvature.Layer, block: str) -> str | None:
    from curvature.trace.overrides import _obstacle

    return None if _obstacle(layer, block) else block


def of_measured_step() -> set[tuple[str, int]]:
    damping = curvature.LevenbergMarquardt(0.1)
    return of_step(METHODS["eigh"], curvature.QuadraticModel(), "ekfac", damping=damping)


def of_quadratic() -> set[tuple[str, int]]:
    def values(linear: jax.Array, matrix: jax.Array) -> Any:
        model = Quadratic(linear, matrix, jnp.zeros(()))
        return model(model.minimiser()), model.length(linear)

    return traced(values, jnp.ones(2, jnp.float32), jnp.eye(2, dtype=jnp.float32))


def of_step(
    method: Any, rate: Any, block: str, *, exact: tuple[str, ...] = EXACT, **options: Any
) -> set[tuple[str, int]]:
    registry = curvature.register(loss_fn, PARAMS, *BATCH)
    registry = registry.with_blocks(lambda x: block_for(x, block))
    return of_update(curvature.kfac(registry, rate, refresh=method, **options), exact)


def of_update(tx: Any, exact: tuple[str, ...] = EXACT) -> set[tuple[str, int]]:
    def step(p: Any, key: jax.Array) -> Any:
        state, gradient = tx.init(p), jax.grad(loss_fn)(p, *BATCH)
        return tx.update(gradient, state, p, loss_args=BATCH, key=key)

    return traced(step, PARAMS, jax.random.key(0), exact=exact)


def of_eigenbasis(kind: Any, exact: tuple[str, ...] = EXACT, **options: Any) -> Any:
    registry = curvature.register(loss_fn, PARAMS, *BATCH)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam cannot stand the strict one
        return of_update(curvature.eigen_adam(registry, 0.1, kind=kind, **options), exact)


@pytest.mark.parametrize("block", BLOCKS)
def test_statistics_and_operators(block: str) -> None:
    assert of_block(block)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_steps_with_every_refresh(method: str) -> None:
    assert of_step(METHODS[method], 0.1, "kronecker")


@pytest.mark.slow
def test_steps_that_measure_themselves() -> None:
    assert of_measured_step()
    assert of_quadratic()


def test_examples_that_meet() -> None:
    assert of_block("diagonal", centred=True)


def passed_on(value: ast.expr) -> bool:
    """Whether a precision is the one that a function, or the model's own equation, was given."""
    return ast.unparse(value) in ("precision", "equation.params['precision']")


def declared() -> dict[tuple[str, int, int], str]:
    """Every call in the library that says how precise it is, by file and lines."""
    found = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and (
                any(k.arg == "precision" and not passed_on(k.value) for k in node.keywords)
                or (isinstance(node.func, ast.Name) and node.func.id == "product")
            ):
                assert node.end_lineno is not None
                where = (str(path), node.lineno, node.end_lineno)
                found[where] = f"{path.relative_to(ROOT)}:{node.lineno}"
    return found


@pytest.mark.slow
def test_no_place_can_lose_its_precision_unnoticed() -> None:
    jax.clear_caches()  # what has been traced before is not traced again
    seen: set[tuple[str, int]] = set()
    for block in BLOCKS:
        seen |= of_block(block)
    for method in METHODS.values():
        for block in ("kronecker", "ekfac"):
            seen |= of_step(method, 0.1, block)
    seen |= of_block("diagonal", centred=True)
    seen |= of_measured_step() | of_quadratic()
    seen |= of_eigenbasis(curvature.Fisher()) | of_eigenbasis(curvature.Shampoo())
    missed = [
        name
        for (path, first, last), name in declared().items()
        if not any(file == path and first <= line <= last for file, line in seen)
    ]
    assert not missed, f"No test traces {missed}"


@pytest.mark.parametrize("block", ["kronecker", "ekfac"])
def test_a_precision_that_is_given_holds_everywhere(block: str) -> None:
    everything = ("curvature/",)
    assert of_step(METHODS["qr"], 0.1, block, precision="highest", exact=everything)


@pytest.mark.parametrize("kind", [curvature.Fisher(), curvature.Shampoo()])
def test_a_precision_that_is_given_holds_in_an_eigenbasis(kind: Any) -> None:
    assert of_eigenbasis(kind, ("curvature/",), precision="highest")


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("precision", [3, "full", True])
def test_what_is_no_precision_is_refused_at_once(precision: Any) -> None:
    registry = curvature.register(loss_fn, PARAMS, *BATCH)
    for recipe in (curvature.kfac, curvature.eigen_adam):
        with pytest.raises(ValueError, match="DotAlgorithmPreset"):
            recipe(registry, 0.1, precision=precision)


def test_products_of_16_bits_are_exact() -> None:
    x = normal(0, 300, 20).astype(jnp.bfloat16)
    found = product("ni,nj->ij", x, x)
    wide = np.asarray(x, np.float64)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wide.T @ wide, rtol=0, atol=2e-6 * 300)


def two_layers(dtype: Any) -> tuple[Any, Any, tuple[jax.Array, ...]]:
    """A net that computes in `dtype` from parameters of float32: convolutions, a mask, a bias."""
    params = {"k": normal(0, 2, 2, 2, 4), "b": normal(1, 4), "w": normal(2, 4, 3)}

    def loss(p: Any, x: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
        p, x = jax.tree.map(lambda a: a.astype(dtype), (p, x))
        numbers = ("NHWC", "HWIO", "NHWC")
        h = jax.lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=numbers)
        z = (jnp.tanh(h + p["b"]).mean((1, 2)) @ p["w"]).astype(jnp.float32)
        each = losses.softmax_cross_entropy_with_integer_labels(z, labels)
        return jnp.sum(each * mask)

    return (
        loss,
        params,
        (normal(3, 6, 3, 3, 2), jnp.arange(6) % 3, (jnp.arange(6) % 2).astype(jnp.float32)),
    )


def test_rows_of_16_bits_are_multiplied_as_they_are() -> None:
    loss, params, batch = two_layers(jnp.bfloat16)
    registry = curvature.register(loss, params, *batch)
    estimator = curvature.Estimator(registry)
    jaxpr, _ = _jax.trace(lambda p: estimator.statistics(p, *batch, key=jax.random.key(0)), params)
    grams = [
        equation
        for equation in contractions(jaxpr)
        if equation.primitive.name == "dot_general"
        and equation.outvars[0].aval.dtype == jnp.float32
    ]
    assert len(grams) >= 4  # two sides of two layers
    for equation in grams:
        assert [v.aval.dtype for v in equation.invars] == [jnp.bfloat16] * 2


def test_moments_of_16_bits_are_those_of_the_same_rows_in_64() -> None:
    loss, params, batch = two_layers(jnp.bfloat16)
    registry = curvature.register(loss, params, *batch)
    found = curvature.Estimator(registry, curvature.EmpiricalFisher()).statistics(params, *batch)
    image = np.asarray(batch[0].astype(jnp.bfloat16), np.float64)
    padded = np.pad(image, ((0, 0), (0, 1), (0, 1), (0, 0)))
    rows = np.stack(
        [
            np.append(padded[n, i : i + 2, j : j + 2].transpose(2, 0, 1).ravel(), 1.0)
            for n in np.flatnonzero(np.asarray(batch[2]))
            for i in range(3)
            for j in range(3)
        ]
    )
    layer = next(x for x in registry.layers if x.kind == "conv")
    input_sum = np.asarray(found[layer.name]["input"])
    np.testing.assert_allclose(input_sum, rows.T @ rows, rtol=2e-6, atol=1e-5)


PLATFORMS = ("cpu", "cuda", "tpu")
TYPES = re.compile(r"tensor<(?:[0-9]+x)*(\w+)>")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_products_as_each_platform_gets_them(platform: str, dtype: Any) -> None:
    """By export, which needs no device: three products of halves, 16 bits, or full precision."""
    loss, params, batch = two_layers(dtype)
    registry = curvature.register(loss, params, *batch)
    tx = curvature.scale_by_curvature(registry, refresh=curvature.NewtonSchulz())
    gradient = jax.tree.map(jnp.ones_like, params)

    def update(state: Any) -> Any:
        return tx.update(gradient, state, params, loss_args=batch, key=jax.random.key(0))[0]

    module = export.export(jax.jit(update), platforms=[platform])(tx.init(params)).mlir_module()
    found = set()
    for line in module.splitlines():
        if "stablehlo.dot_general" not in line:
            continue
        signature = line.rsplit(" : ", 1)[1]
        left, right, out = TYPES.findall(signature)
        if (left, right, out) == ("bf16", "bf16", "f32"):
            found.add("rows")
        elif "num_primitive_operations = 3" in line:
            found.add("halves")
        elif "[HIGHEST, HIGHEST]" in line:
            found.add("full")
        else:  # the model's own: with the logits at the default
            found.add(f"{left} {right} {out}")
    own = {"f32 f32 f32"} if dtype == jnp.float32 else {"bf16 bf16 bf16", "rows"}
    ours = {"full"} if platform == "cpu" else {"halves", "full"}
    assert found == ours | own, found
