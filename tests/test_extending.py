"""A layer, a loss, a block and a framework of one's own: a file each, and a line where a table is.

Each is compared with the same thing spelled by what is there already.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

import curvature
from curvature import operators
from curvature.blocks import BLOCKS, Block, BlockKind
from curvature.blocks.block import Spectrum, safe_power, shifted
from curvature.losses.output import Elementwise, shaped_like, tag
from curvature.trace.layouts import Dense
from curvature.trace.rules import CONTRACTIONS, Contracted

N, D_IN, D_OUT = 6, 4, 3
X, Y = (jax.random.normal(jax.random.key(i), (N, d)) for i, d in enumerate((D_IN, D_OUT)))
PARAMS = {"w": jax.random.normal(jax.random.key(2), (D_OUT, D_IN)), "b": jnp.ones(D_OUT)}
EXACT = curvature.Fisher(samples=None)


def curvature_of(registry, params, *args, kind=EXACT):
    estimator = curvature.Estimator(registry, kind)
    return jax.jit(lambda *args: estimator.statistics(*args))(params, *args)


def equal(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, expected)


# A kind of layer: a primitive that multiplies by a weight it has transposed


def _transposed(x, w):
    return x @ w.T


layer = Primitive("transposed_dot")
layer.def_impl(_transposed)
layer.def_abstract_eval(lambda x, w: x.update(shape=(x.shape[0], w.shape[0])))
mlir.register_lowering(layer, mlir.lower_fun(_transposed, multiple_results=False))
ad.defbilinear(layer, lambda g, x, w: g @ w, lambda g, x, w: g.T @ x)


def transposed_dot(equation, data, weight):
    """The rule: rows of examples times a weight `(outputs, inputs)`."""
    del equation
    outputs, inputs = weight
    layout = Dense(0, (0, 1), (0, 1), (1,), (), data.batch.examples(N), inputs, outputs)
    return Contracted("dense", layout, ((1, 0), (inputs, outputs)))


@pytest.mark.parametrize("block", ["kronecker", "ekfac", "diagonal", "dense"])
def test_a_layer_is_a_rule_and_a_line(monkeypatch, block):
    def loss_fn(multiply):
        def loss(params, x, y):
            return curvature.losses.l2_loss(multiply(x, params["w"]) + params["b"], y).mean()

        return curvature.register(loss, PARAMS, X, Y).with_blocks(block)

    before = curvature.register(
        lambda p, x, y: curvature.losses.l2_loss(layer.bind(x, p["w"]), y).mean(), PARAMS, X, Y
    )
    assert before.coverage == 0.0
    monkeypatch.setitem(CONTRACTIONS, "transposed_dot", transposed_dot)  # the line
    found = loss_fn(layer.bind)
    assert [x.kind for x in found.layers] == ["dense"] and found.coverage == 1.0
    equal(*(curvature_of(r, PARAMS, X, Y) for r in (found, loss_fn(_transposed))))


# A loss: one class, and no line at all


@dataclasses.dataclass(frozen=True)
class Cauchy(Elementwise):
    """l = log(1 + (z - t)^2), of a Cauchy density; its Fisher information is 1 / 2."""

    fisher_is_hessian = False

    @property
    def name(self):
        return "cauchy"

    def value(self, z, targets):
        return jnp.log1p((z - targets[0]) ** 2)

    def score(self, z, targets):
        r = z - targets[0]
        return 2 * r / (1 + r**2)

    def sampled_score(self, key, z, targets):
        r = jax.random.cauchy(key, z.shape, z.dtype)
        return 2 * r / (1 + r**2)

    def second_derivative(self, z, targets):
        r2 = (z - targets[0]) ** 2
        return 2 * (1 - r2) / (1 + r2) ** 2

    def fisher_information(self, z, targets):
        return jnp.full_like(z, 0.5)


def test_a_loss_is_a_class():
    def loss_fn(params, x, y):
        z = jnp.tanh(x @ params["w"].T + params["b"])
        return tag(Cauchy(), z, shaped_like(z, y, "targets")).mean()

    def outputs(params):
        return jnp.tanh(X @ params["w"].T + params["b"])

    registry = curvature.register(loss_fn, PARAMS, X, Y).with_blocks("dense")
    assert registry.coverage == 1.0
    jacobian = jnp.concatenate(
        [  # coordinates: inputs and the bias by outputs
            jax.jacobian(outputs)(PARAMS)["w"].reshape(N * D_OUT, D_OUT, D_IN).mT,
            jax.jacobian(outputs)(PARAMS)["b"].reshape(N * D_OUT, 1, D_OUT),
        ],
        axis=1,
    ).reshape(N * D_OUT, -1)
    (fisher,) = curvature_of(registry, PARAMS, X, Y).values()
    equal(fisher["values"], 0.5 * jacobian.T @ jacobian / (N * D_OUT))
    plain = jax.grad(lambda p: jnp.log1p((outputs(p) - Y) ** 2).mean())(PARAMS)
    equal(jax.grad(loss_fn)(PARAMS, X, Y), plain)


# A block: a number for every input, the mean over outputs


class Summed(Cauchy):
    def value(self, z, targets):
        return super().value(z, targets).sum(-1)


class Shared(Cauchy):
    def sampled_score(self, key, z, targets):
        return super().sampled_score(key, z[0], targets)


@dataclasses.dataclass(frozen=True)
class Scaled(Cauchy):
    scale: jax.Array


def test_a_loss_that_does_wrong_is_told_so():
    def loss_of(family):
        return lambda params, x, y: tag(family, x @ params["w"].T, y).mean()

    for family, error, message in (
        (Cauchy, TypeError, "loss is .*Cauchy.*expected an instance of a subclass of OutputLoss"),
        (Scaled(jnp.ones(3)), TypeError, "Scaled cannot be hashed.*are targets"),
        (Summed(), ValueError, r"value of cauchy has shape \(6,\), expected \(6, 3\)"),
    ):
        with pytest.raises(error, match=message):
            curvature.register(loss_of(family), PARAMS, X, Y)
    registry = curvature.register(loss_of(Shared()), PARAMS, X, Y)
    with pytest.raises(ValueError, match=r"sampled_score of cauchy has shape \(3,\).*\(6, 3\)"):
        curvature.Estimator(registry)(PARAMS, X, Y, key=jax.random.key(0))


def test_negative_curvature_of_a_loss_counts_as_none():
    def loss_fn(params, x, y):
        return tag(Cauchy(), x @ params["w"].T, y).sum()

    y = jnp.where(jnp.arange(N)[:, None] < 3, X @ PARAMS["w"].T, 5.0)  # no residual, or a large one
    registry = curvature.register(loss_fn, PARAMS, X, y).with_blocks("dense")
    blocks = jax.jit(curvature.Estimator(registry, curvature.GaussNewton()))(PARAMS, X, y)
    r2 = (X @ PARAMS["w"].T - y) ** 2
    second = 2 * (1 - r2) / (1 + r2) ** 2
    assert second.min() < -0.02 and second.max() == 2
    v = jnp.ones_like(PARAMS["w"])
    expected = jnp.einsum("no,ni,nj,oj->oi", jnp.maximum(second, 0), X, X, v)
    exact = operators.gauss_newton(loss_fn, PARAMS, [(X, y)])
    for op in (blocks, exact):
        found = op @ {"w": v, "b": jnp.zeros(D_OUT)}
        np.testing.assert_allclose(found["w"], expected, rtol=1e-10)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows(Block):
    """G = diag of values, one for each row of the coordinates."""

    values: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    stack_ndim: int = dataclasses.field(default=0, metadata={"static": True})

    def __matmul__(self, v):
        return self.values[..., None] * v

    def spectrum(self):
        return Spectrum(self.diagonal())

    def trace(self):
        return self.diagonal().sum()

    def diagonal(self):
        return jnp.broadcast_to(self.values[..., None], self.shape)

    def to_dense(self):
        return curvature.Diagonal(self.diagonal(), self.stack_ndim).to_dense()

    def damped_inverse(self, damping):
        values = safe_power(shifted(self.values, damping), -1.0)
        return dataclasses.replace(self, values=values)


ROWS = BlockKind(
    ("dense", "conv", "embedding"),
    make=lambda statistics, shape, depth: Rows(statistics["values"], shape, depth),
    summary=lambda squares, depth: squares.mean(-1),
)


def loss_fn(params, x, y):
    return curvature.losses.l2_loss(jnp.tanh(x @ params["w"].T + params["b"]), y).mean()


def test_a_block_is_a_class_and_a_line(monkeypatch):
    registry = curvature.register(loss_fn, PARAMS, X, Y)
    with pytest.raises(ValueError, match="No layer can have the block 'rows'"):
        registry.with_blocks("rows")
    monkeypatch.setitem(BLOCKS, "rows", ROWS)  # the line
    estimators = [curvature.Estimator(registry.with_blocks(b), EXACT) for b in ("rows", "diagonal")]
    rows, diagonal = (jax.jit(e)(PARAMS, X, Y) for e in estimators)
    for found, whole in zip(rows.blocks.values(), diagonal.blocks.values(), strict=True):
        equal(found.values, whole.values.mean(-1))
        equal(found.logdet(0.1), jnp.log(found.diagonal() + 0.1).sum())
    gradient = jax.grad(loss_fn)(PARAMS, X, Y)
    damped = rows.damped_inverse(0.3)
    equal(damped @ gradient, rows.solve(gradient, 0.3))
    # Trained with: one step of kfac is the damped solve.
    tx = curvature.scale_by_curvature(
        registry.with_blocks("rows"), kind=EXACT, damping=0.3, relative_damping=False
    )
    updates, _ = jax.jit(tx.update)(gradient, tx.init(PARAMS), PARAMS, loss_args=(X, Y))
    equal(updates, damped @ gradient)


# A framework: models are objects that hold their arrays


class Linear:
    def __init__(self, w, b):
        self.w, self.b = w, b

    def __call__(self, x):
        return jnp.tanh(x @ self.w.T + self.b)


class Adapter:
    """All that a framework of mutable objects needs: its arrays as a tree, and back."""

    def __init__(self, loss_fn, model, *args, **options):
        def pure(params, *args):
            return loss_fn(type(model)(**params), *args)

        self.loss_fn = pure
        self.registry = curvature.register(pure, vars(model), *args)
        self.tx = curvature.kfac(self.registry, **options)
        self.state = self.tx.init(vars(model))

    def step(self, model, *args, key):
        gradient = jax.grad(self.loss_fn)(vars(model), *args)
        updates, self.state = jax.jit(self.tx.update)(
            gradient, self.state, vars(model), loss_args=args, key=key
        )
        vars(model).update(optax.apply_updates(vars(model), updates))


def test_a_framework_is_a_function_of_its_own_parameters():
    model = Linear(**PARAMS)

    def model_loss(model, x, y):
        return curvature.losses.l2_loss(model(x), y).mean()

    before = float(model_loss(model, X, Y))
    adapter = Adapter(model_loss, model, X, Y, learning_rate=0.1, damping=0.1)
    assert adapter.registry.coverage == 1.0
    params, registry = PARAMS, curvature.register(loss_fn, PARAMS, X, Y)
    tx = curvature.kfac(registry, learning_rate=0.1, damping=0.1)
    state = tx.init(params)
    for i in range(3):
        adapter.step(model, X, Y, key=jax.random.key(i))
        gradient = jax.grad(loss_fn)(params, X, Y)
        updates, state = jax.jit(tx.update)(
            gradient, state, params, loss_args=(X, Y), key=jax.random.key(i)
        )
        params = optax.apply_updates(params, updates)
    equal(vars(model), params)
    assert model_loss(model, X, Y) < before
