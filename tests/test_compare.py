"""`curvature.compare` against brute force on dense matrices, and its errors against the truth."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import curvature
from curvature.comparison import Figure, arguments, compare, structured
from curvature.comparison.projection import PARTS, Projection, folded, width
from curvature.comparison.result import WHOLE
from curvature.dataset import shares

RNG = np.random.default_rng(0)
X, Y = jnp.asarray(RNG.normal(size=(30, 5))), jnp.asarray(RNG.integers(0, 3, 30))
PARAMS = {
    "b": jnp.asarray(RNG.normal(size=6)),
    "v": jnp.asarray(RNG.normal(size=(6, 3))),
    "w": jnp.asarray(RNG.normal(size=(5, 6)) / 2),
}
BATCHES = [(X[:12], Y[:12]), (X[12:], Y[12:])]  # of different size
KINDS = {"F": curvature.Fisher(samples=None), "E": curvature.EmpiricalFisher()}
KEY = jax.random.key(0)
OPTIONS = {"key": KEY, "kinds": KINDS, "progress": False, "approximations": (), "damping": 1e-2}


def net(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


def loss_fn(p, x, y):
    losses = curvature.losses.softmax_cross_entropy_with_integer_labels(net(p, x), y)
    return losses.mean()


REGISTRY = curvature.register(loss_fn, PARAMS, *BATCHES[0])


def dense():
    """The two matrices and the gradient of the mean loss, from Jacobians: order b, v, w."""
    flat, unravel = ravel_pytree(PARAMS)
    jacobian = jax.jacrev(lambda f: net(unravel(f), X))(flat)
    q = jax.nn.softmax(net(PARAMS, X))
    hessian = jax.vmap(lambda q: jnp.diag(q) - jnp.outer(q, q))(q)
    fisher = jnp.einsum("nci,ncd,ndj->ij", jacobian, hessian, jacobian) / 30
    scores = jnp.einsum("nci,nc->ni", jacobian, q - jax.nn.one_hot(Y, 3, dtype=q.dtype))
    return np.array(fisher), np.array(scores.T @ scores / 30), np.array(scores.mean(0))


def blocks():
    """Each block's indices, in the order of `dense`."""
    b, v, w = np.arange(6), np.arange(6, 24), np.arange(24, 54)
    return {WHOLE: np.arange(54), "v": v, "w": np.concatenate([w, b])}


def brute(f, e, g, damping, top=5):
    """Every figure of a pair, written apart from the library."""
    (fv, fu), (ev, eu) = ((x[::-1], y[:, ::-1]) for x, y in map(np.linalg.eigh, (f, e)))
    cosines = np.linalg.svd(fu[:, :top].T @ eu[:, :top], compute_uv=False)
    eye = np.eye(len(f))
    x, y = (-np.linalg.solve(m + damping * eye, g) for m in (f, e))

    def model(v):
        return g @ v + v @ (f + damping * eye) @ v / 2

    best = min(model(t * y) for t in [-(g @ y) / (y @ (f + damping * eye) @ y)])
    return {
        "trace_ratio": np.trace(e) / np.trace(f),
        "cosine": np.sum(f * e) / np.linalg.norm(f) / np.linalg.norm(e),
        "angles": np.degrees(np.arccos(np.minimum(cosines, 1))),
        "frobenius_distance": np.linalg.norm(e - f) / np.linalg.norm(f),
        "spectral_distance": np.linalg.norm(e - f, 2) / np.linalg.norm(f, 2),
        "largest": (fv[:top], ev[:top]),
        "dimension": [np.trace(np.linalg.solve(m + damping * eye, m)) for m in (f, e)],
        "direction_cosine": x @ y / np.linalg.norm(x) / np.linalg.norm(y),
        "length_ratio": np.linalg.norm(y) / np.linalg.norm(x),
        "decrease": model(y) / model(x),
        "best_decrease": best / model(x),
    }


def values(figures):
    assert all(f.error is None for f in figures)
    return [f.value for f in figures]


def test_exact_figures_are_those_of_dense_matrices():
    found = compare(REGISTRY, PARAMS, BATCHES, **OPTIONS)
    fisher, empirical, gradient = dense()
    assert [block.name for block in found.blocks] == list(blocks())
    for block in found.blocks:
        index = blocks()[block.name]
        f, e = (m[np.ix_(index, index)] for m in (fisher, empirical))
        want = brute(f, e, gradient[index], 1e-2)
        pair, directions = block.pairs["F", "E"], block.pairs["F", "E"].directions
        names = ("trace_ratio", "cosine", "frobenius_distance", "spectral_distance")
        got = values([getattr(pair, name) for name in names])
        np.testing.assert_allclose(got, [want[name] for name in names], rtol=1e-8)
        np.testing.assert_allclose(values(pair.angles), want["angles"], atol=1e-5)
        names = ("length_ratio", "decrease", "best_decrease")
        got = values([directions.cosine, *(getattr(directions, name) for name in names)])
        np.testing.assert_allclose(
            got, [want["direction_cosine"], *(want[n] for n in names)], rtol=1e-8
        )
        spectra = [block.spectra[name] for name in "FE"]
        for spectrum, largest, m in zip(spectra, want["largest"], (f, e), strict=True):
            np.testing.assert_allclose(values(spectrum.largest), largest, rtol=1e-8)
            np.testing.assert_allclose(spectrum.trace.value, np.trace(m), rtol=1e-8)
        got = values([s.effective_dimension for s in spectra])
        np.testing.assert_allclose(got, want["dimension"], rtol=1e-8)
        assert block.size == len(index) and block.projected is None


def test_the_directions_agree_from_the_damping_of_agreement_on():
    found = compare(REGISTRY, PARAMS, BATCHES, **OPTIONS)
    fisher, empirical, gradient = dense()
    agreement = found.whole.pairs["F", "E"].directions.agreement.value

    def cosine(damping):
        return brute(fisher, empirical, gradient, damping)["direction_cosine"]

    np.testing.assert_allclose(cosine(agreement), 0.99, rtol=1e-6)
    assert all(cosine(agreement * factor) > 0.99 for factor in (1.01, 2, 10, 1e3))


def test_the_density_counts_eigenvalues():
    found = compare(REGISTRY, PARAMS, BATCHES, **OPTIONS)
    values = np.linalg.eigvalsh(dense()[0])
    density = np.array(found.whole.spectra["F"].density)
    counted = np.sum(values > 10 ** (density[0, 0] - 0.125))
    assert density[:, 1].sum() == counted > 10
    top = density[density[:, 1] > 0][-1, 0]
    assert abs(top - np.log10(values[-1])) <= 0.125


def test_the_state_of_the_model():
    state = compare(REGISTRY, PARAMS, BATCHES, **OPTIONS).state
    z = net(PARAMS, X)
    q = jax.nn.softmax(z)
    assert state.examples == 30
    np.testing.assert_allclose(state.loss, loss_fn(PARAMS, X, Y), rtol=1e-12)
    np.testing.assert_allclose(state.wrong, np.mean(np.asarray(z.argmax(-1) != Y)), rtol=1e-12)
    np.testing.assert_allclose(state.entropy, -np.sum(q * np.log(q), axis=1).mean(), rtol=1e-12)


@pytest.mark.parametrize("name", ["kronecker", "ekfac", "diagonal"])
def test_structured_approximations_are_compared_with_the_exact_block(name):
    options = OPTIONS | {"approximations": [name]}
    found = compare(REGISTRY, PARAMS, [(X, Y)], **options)
    registry = REGISTRY.with_blocks(name)
    for kind, matrix in zip("FE", dense()[:2], strict=True):
        op = jax.jit(curvature.Estimator(registry, KINDS[kind]))(PARAMS, X, Y)
        for block in found.blocks[1:]:
            index = blocks()[block.name]
            exact = matrix[np.ix_(index, index)]
            approximate = np.asarray(op.blocks[block.name].to_dense())
            got = block.structured[kind][name]
            want = [
                np.trace(approximate) / np.trace(exact),
                np.sum(exact * approximate) / np.linalg.norm(exact) / np.linalg.norm(approximate),
                np.linalg.norm(exact - approximate) / np.linalg.norm(exact),
            ]
            got = values([got.trace_ratio, got.cosine, got.frobenius_distance])
            np.testing.assert_allclose(got, want, rtol=1e-8)


@pytest.mark.parametrize("name", structured.NAMES)
@pytest.mark.parametrize("kind", ["F", "E"])
def test_inner_products_with_approximations_need_no_matrix(name, kind):
    plan, _ = arguments.planned(REGISTRY, PARAMS, BATCHES[0], KINDS, None, 10, 1e9)
    found = structured.Approximations(
        plan, kind, PARAMS, lambda: shares(BATCHES, None, averaged=True), KEY
    )
    exact = dict(zip("FE", dense()[:2], strict=True))[kind]
    blocks_ = found.blocks(name)
    assert blocks_.keys() == {"v", "w"}
    for layer, block in blocks_.items():
        moments = found.moments(name, layer, block)
        a = exact[np.ix_(blocks()[layer], blocks()[layer])]
        k = structured.dense(block)
        want = [np.trace(k), np.linalg.norm(k), np.sum(a * k), np.trace(a)]
        got = [moments.trace, moments.norm, moments.inner.value, moments.trace_of_block.value]
        np.testing.assert_allclose(got, want, rtol=1e-8)
        assert moments.inner.error is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kronecker", "diagonal"])
def test_inner_products_from_samples_cover_that_with_the_exact_block(name):
    """Also where the approximation is itself from samples, which are others."""
    kinds = {"F": curvature.Fisher(samples=4)}
    plan, _ = arguments.planned(REGISTRY, PARAMS, BATCHES[0], kinds, None, 10, 1e9)
    index = blocks()["w"]
    exact = dense()[0][np.ix_(index, index)]
    hits = []
    for i in range(100):
        found = structured.Approximations(
            plan, "F", PARAMS, lambda: shares(BATCHES, None, averaged=True), jax.random.key(i)
        )
        block = found.blocks(name)["w"]
        moments = found.moments(name, "w", block)
        truths = np.sum(exact * structured.dense(block)), np.trace(exact)
        figures = moments.inner, moments.trace_of_block
        hits.append([abs(f.value - t) < f.error for f, t in zip(figures, truths, strict=True)])
    assert (np.mean(hits, axis=0) >= 0.9).all()


def test_statistics_of_approximations_are_averaged_over_batches():
    """EKFAC's diagonal in the basis of the averaged factors has the whole data's trace."""
    options = OPTIONS | {"approximations": ["ekfac", "diagonal", "kronecker_reduce"]}
    found = compare(REGISTRY, PARAMS, BATCHES, **options)
    for block in found.blocks[1:]:
        for kind in "FE":
            for name in ("ekfac", "diagonal"):
                ratio = block.structured[kind][name].trace_ratio.value
                np.testing.assert_allclose(ratio, 1, rtol=1e-8)
            assert block.structured[kind]["ekfac"].cosine.value <= 1


def flat(value, path=""):
    """Every figure by its path."""
    if isinstance(value, Figure):
        return {path: value}
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, tuple):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {}
    parts = [flat(v, f"{path}/{k}") for k, v in value.items()]
    return {path: figure for part in parts for path, figure in part.items()}


OF_A_DRAW = ("directions", "effective_dimension")  # of as many samples as the kind asks for


def trials(registry, params, batch, options, count):
    """Every figure of `count` seeded trials, by block and path."""
    found = {}
    for i in range(count):
        trial = compare(registry, params, [batch], **options | {"key": jax.random.key(i)})
        for block in trial.blocks:
            for path, figure in flat(block).items():
                found.setdefault((block.name, path), []).append(figure)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            {"limit": 100, "approximations": ("kronecker",)},
            id="projected",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            {"kinds": KINDS | {"F": curvature.Fisher(samples=4)}},
            id="sampled",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            {"kinds": KINDS | {"F": curvature.Fisher(samples=8)}, "limit": 100}, id="both"
        ),
    ],
)
def test_stated_errors_cover_the_truth_in_nine_of_ten_trials(options):
    rng = np.random.default_rng(1)
    x, y = jnp.asarray(rng.normal(size=(20, 8))), jnp.asarray(rng.integers(0, 3, 20))
    params = {
        "b": jnp.zeros(14),
        "v": jnp.asarray(rng.normal(size=(14, 3)) / 4),
        "w": jnp.asarray(rng.normal(size=(8, 14)) / 3),
    }
    registry = curvature.register(loss_fn, params, x, y)
    options = OPTIONS | options
    exact = OPTIONS | {"approximations": options["approximations"]}
    truth = trials(registry, params, (x, y), exact, 1)
    if options["kinds"] != KINDS:
        unprojected = trials(registry, params, (x, y), options | {"limit": 1000}, 200)
        for (block, path), figures in unprojected.items():
            if any(name in path for name in OF_A_DRAW):
                mean = np.mean([figure.value for figure in figures])
                truth[block, path] = [Figure(float(mean))]
    found = trials(registry, params, (x, y), options, 200)
    coverage = {}
    for where in found.keys() & truth.keys():
        off = [abs(figure.value - truth[where][0].value) for figure in found[where]]
        errors = [figure.error for figure in found[where]]
        if None not in errors:
            coverage[where] = np.mean(np.array(off) <= np.array(errors) + 1e-12)
    assert len(coverage) >= 20
    low = {where: share for where, share in coverage.items() if share < 0.9}
    assert not low, low


@pytest.mark.parametrize("size, total", [(300, 300), (40_000, 40_000), (500, 60_000)])
def test_a_projection_is_the_matrix_of_signs(size, total):
    """One entry in each row and part; two layers of one block share the parts' signs."""
    offset = total - size
    project = Projection(offset, size, total, 31)
    rng = np.random.default_rng(0)
    fold, parts = rng.choice([-1, 1], size), rng.choice([-1, 1], (PARTS, folded(total)))
    x = rng.normal(size=(2, size))
    found = project(jnp.asarray(x), jnp.asarray(fold), jnp.asarray(parts))
    want = np.zeros((2, PARTS, 31))
    for place in range(size):
        bucket = (offset + place) % 16_381
        sign = fold[place] if total > 16_381 else 1
        want[:, np.arange(PARTS), bucket % 31] += (
            np.outer(x[:, place], parts[:, bucket]) * sign / np.sqrt(PARTS)
        )
    np.testing.assert_allclose(found, want.reshape(2, -1), atol=1e-12)
    assert project.dim == found.shape[1] == PARTS * 31


@pytest.mark.parametrize("total, limit, dim", [(1000, 1000, 1000), (1001, 1000, 995), (60, 14, 10)])
def test_projections_have_a_prime_number_of_buckets(total, limit, dim):
    assert Projection(0, total, total, width(total, limit, limit)).dim == dim


def test_the_sampling_error_is_that_of_a_step():
    kinds = {"F": curvature.Fisher(samples=2)}
    found = compare(REGISTRY, PARAMS, [(X, Y)], **OPTIONS | {"kinds": kinds})
    fisher = dense()[0]
    dense_registry = REGISTRY.with_blocks("dense")
    estimate = jax.jit(curvature.Estimator(dense_registry, kinds["F"]))
    index = blocks()["v"]
    exact = fisher[np.ix_(index, index)]
    off = [
        np.linalg.norm(estimate(PARAMS, X, Y, key=jax.random.key(i)).blocks["v"].to_dense() - exact)
        for i in range(100)
    ]
    want = np.sqrt(np.mean(np.square(off))) / np.linalg.norm(exact)
    error = found.blocks[1].spectra["F"].sampling_error
    assert abs(error.value - want) < 0.3 * want
    assert any("not of their limit" in note for note in found.notes)


def test_without_kinds_the_fisher_is_exact_where_outputs_are_few():
    found = compare(REGISTRY, PARAMS, BATCHES, key=KEY, progress=False, approximations=())
    assert list(found.kinds) == ["Fisher", "empirical Fisher"]
    assert found.kinds["Fisher"] == "Fisher(samples=None)"
    assert any("Gauss-Newton" in note for note in found.notes)

    def wide(p, x, y):
        z = x @ p
        return curvature.losses.softmax_cross_entropy_with_integer_labels(z, y).mean()

    p = jnp.zeros((5, 40))
    registry = curvature.register(wide, p, X, Y)
    found = compare(registry, p, [(X, Y)], key=KEY, progress=False, approximations=())
    assert found.kinds["Fisher"] == "Fisher(samples=4)"
    assert any("40 outputs" in note for note in found.notes)

    def huber(p, x, y):
        return curvature.losses.huber_loss(x @ p, y).mean()

    registry = curvature.register(huber, jnp.zeros(5), X, X[:, 0])
    found = compare(registry, jnp.zeros(5), [(X, X[:, 0])], key=KEY, progress=False)
    assert list(found.kinds) == ["Fisher", "empirical Fisher", "Gauss-Newton"]


def test_what_cannot_be_compared_is_left_out_with_its_reason():
    def odd(p, x, y):
        z = x @ jnp.sort(p["sorted"]) + p["b"]
        return curvature.losses.l2_loss(z, y).mean() + 0 * p["unused"].sum()

    params = {"b": jnp.zeros(2), "sorted": jnp.ones((5, 2)), "unused": jnp.ones(3)}
    registry = curvature.register(odd, params, X, X[:, :2])
    found = compare(registry, params, [(X, X[:, :2])], **OPTIONS)
    assert [block.name for block in found.blocks] == [WHOLE, "b"]
    notes = "\n".join(found.notes)
    assert "sorted is left out" in notes and "unused is left out" in notes


def test_blocks_are_chosen_by_patterns():
    found = compare(REGISTRY, PARAMS, BATCHES, **OPTIONS, blocks="v*")
    assert [block.name for block in found.blocks] == ["v"] and found.whole is None
    with pytest.raises(ValueError, match="The layers are: v, w"):
        compare(REGISTRY, PARAMS, BATCHES, **OPTIONS, blocks=["x"])


@pytest.mark.parametrize(
    "batches, error, match",
    [
        ([], ValueError, "batches is empty"),
        (iter(BATCHES), TypeError, "only once"),
        ((X, Y), Exception, "."),
    ],
)
def test_data_that_is_none_is_refused(batches, error, match):
    with pytest.raises(error, match=match):
        compare(REGISTRY, PARAMS, batches, **OPTIONS)


def test_parameters_that_are_not_finite_are_refused():
    params = PARAMS | {"v": PARAMS["v"].at[0, 0].set(jnp.nan)}
    with pytest.raises(ValueError, match=r"params\['v'\] has entries that are not finite"):
        compare(REGISTRY, params, BATCHES, **OPTIONS)
    with pytest.raises(ValueError, match="The first batch cannot be used: the loss is nan"):
        compare(REGISTRY, PARAMS, [(X * jnp.nan, Y)], **OPTIONS)


def test_a_bad_batch_does_not_lose_those_before_it():
    good = compare(REGISTRY, PARAMS, BATCHES[:1], **OPTIONS)
    found = compare(REGISTRY, PARAMS, [BATCHES[0], (X * jnp.nan, Y)], **OPTIONS)
    assert found.blocks == good.blocks and found.state == good.state
    assert any("Batch 2 could not be used" in note for note in found.notes)

    class Broken:
        def __iter__(self):
            yield BATCHES[0]
            raise OSError("disk gone")

    found = compare(REGISTRY, PARAMS, Broken(), **OPTIONS | {"approximations": ["diagonal"]})
    assert any("disk gone" in note for note in found.notes)
    assert "diagonal" in found.blocks[1].structured["F"]


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"damping": 0.0}, "damping > 0"),
        ({"top": 0}, "top >= 1"),
        ({"limit": 3}, "limit >= 10"),
        ({"kinds": []}, "kinds is empty"),
        ({"kinds": [curvature.Fisher]}, "expected instances"),
        ({"kinds": [curvature.Fisher(), curvature.Fisher()]}, "the same"),
    ],
)
def test_arguments_out_of_range_are_refused(wrong, match):
    with pytest.raises((ValueError, TypeError), match=match):
        compare(REGISTRY, PARAMS, BATCHES, **OPTIONS | wrong)


def test_layers_in_a_scan_and_with_positions():
    """Columns of a scanned layer, all copies together, against the dense empirical Fisher."""
    params = {"head": jnp.ones((4, 2)) / 3, "w": jnp.asarray(RNG.normal(size=(3, 4, 4)) / 2)}
    x = jnp.asarray(RNG.normal(size=(6, 5, 4)))
    y = jnp.asarray(RNG.integers(0, 2, (6, 5)))

    def logits(p, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])
        return x @ p["head"]

    def scanned(p, x, y):
        z = logits(p, x)
        return curvature.losses.softmax_cross_entropy_with_integer_labels(z, y).mean()

    registry = curvature.register(scanned, params, x, y)
    found = compare(registry, params, [(x, y)], **OPTIONS)
    flat_params, unravel = ravel_pytree(params)

    def of_example(f, x, y):
        return scanned(unravel(f), x[None], y[None])

    # Each position's weight is 1/30: an example's score is sqrt(1/30) times the sum over its five.
    g = jax.vmap(jax.grad(of_example), (None, 0, 0))(flat_params, x, y) * 5 / np.sqrt(30)
    want = np.linalg.eigvalsh(np.asarray(g.T @ g))[::-1][:5]
    np.testing.assert_allclose(
        values(found.whole.spectra["E"].largest), want, rtol=1e-8, atol=1e-12
    )
    assert [block.name for block in found.blocks] == [WHOLE, "head", "w"]
    index = np.arange(8, 56)
    want = np.linalg.eigvalsh(np.asarray((g.T @ g)[np.ix_(index, index)]))[::-1][:5]
    np.testing.assert_allclose(
        values(found.blocks[2].spectra["E"].largest), want, rtol=1e-8, atol=1e-12
    )


def test_groups_of_layers_give_what_all_at_once_gives():
    one = compare(REGISTRY, PARAMS, BATCHES, **OPTIONS)
    two = compare(REGISTRY, PARAMS, BATCHES, **OPTIONS, memory=1)
    for a, b in zip(one.blocks, two.blocks, strict=True):
        for path, figure in flat(a).items():
            np.testing.assert_allclose(flat(b)[path].value, figure.value, rtol=1e-7, atol=1e-6)


def test_the_result_is_json(tmp_path):
    found = compare(REGISTRY, PARAMS, BATCHES, **OPTIONS | {"approximations": ["diagonal"]})
    text = found.to_json(tmp_path / "found.json")
    assert (tmp_path / "found.json").read_text() == text
    read = json.loads(text)
    assert read["blocks"][0]["pairs"]["F | E"]["cosine"]["error"] is None
    assert read["kinds"] == found.kinds and read["settings"]["batches"] == 2
    nothing = dataclasses.replace(found, damping=math.inf)
    assert json.loads(nothing.to_json())["damping"] is None


def test_perfect_fit_has_no_empirical_fisher():
    """With zero residuals, EF is zero: figures say so instead of dividing by zero."""

    def linear(p, x):
        return curvature.losses.squared_error(x @ p, x @ jnp.ones(5)).mean()

    registry = curvature.register(linear, jnp.ones(5), X)
    found = compare(registry, jnp.ones(5), [X], **OPTIONS)
    pair = found.whole.pairs["F", "E"]
    assert pair.trace_ratio.value == 0 and pair.cosine.value == 0 and pair.angles == ()
    assert not any(note.startswith("No ") for note in found.notes)
