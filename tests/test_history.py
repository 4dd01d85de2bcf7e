"""`curvature.comparison.History`: what a training loop logs, takes up again and draws."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from curvature.comparison import History

RNG = np.random.default_rng(0)
X, Y = jnp.asarray(RNG.normal(size=(20, 5))), jnp.asarray(RNG.integers(0, 3, 20))
PARAMS = {
    "first": jnp.asarray(RNG.normal(size=(5, 4))),
    "second": jnp.asarray(RNG.normal(size=(4, 3))),
}
KEY = jax.random.key(0)


def loss_fn(p, x, y):
    logits = jnp.tanh(x @ p["first"]) @ p["second"]
    return curvature.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()


REGISTRY = curvature.register(loss_fn, PARAMS, X, Y)


def trained(step):
    """Parameters that change with the step."""
    return jax.tree.map(lambda p: p * (1 + step / 10), PARAMS)


@pytest.fixture(scope="module")
def history():
    """Records of steps 0, 3 and 6."""
    made = History(REGISTRY, [(X, Y)], every=3, key=KEY, limit=20)
    found = [made(step, trained(step)) for step in range(8)]
    assert [step for step in range(8) if found[step]] == [0, 3, 6]
    return made


def test_the_scalars_are_those_of_the_comparison(history):
    whole = curvature.compare(
        REGISTRY, trained(6), [(X, Y)], key=KEY, limit=20, approximations=(), progress=False
    )
    record = history.records[-1]
    assert record["step"] == 6
    assert record["compare/wrong"] == whole.state.wrong
    assert record["compare/entropy"] == whole.state.entropy
    assert record["compare/nll"] == whole.state.nll
    for block in whole.blocks:
        pair = block.pairs["Fisher", "empirical Fisher"]
        for name, figure in (
            ("trace_ratio", pair.trace_ratio),
            ("cosine", pair.cosine),
            ("direction_cosine", pair.directions.cosine),
        ):
            assert record[f"compare/{name}/empirical Fisher/{block.name}"] == figure.value
            assert record.get(f"compare/{name}_error/empirical Fisher/{block.name}") == figure.error
    assert "compare/cosine_error/empirical Fisher/whole network" in record  # 32 entries in 20
    assert "compare/cosine_error/empirical Fisher/second" not in record  # 12
    assert history.latest.whole.pairs == whole.whole.pairs


def test_later_comparisons_compile_nothing(compilations):
    kinds = {"F": curvature.Fisher(samples=2), "E": curvature.EmpiricalFisher()}
    history = History(REGISTRY, every=1, key=KEY, kinds=kinds, limit=15)
    history(0, trained(0), [(X, Y)])
    assert compilations
    for step in range(1, 4):
        params, batches = trained(step), [(X + step, Y)]
        compilations.clear()  # what the test's own arithmetic takes
        assert history(step, params, batches)
        assert not compilations


def test_a_history_goes_on_from_its_json_lines(history):
    lines = [json.dumps({"loss": 1.0, **record}) for record in history.records]
    lines.insert(1, json.dumps({"step": 1, "loss": 2.0}))  # a measurement without a comparison
    other = History(REGISTRY, [(X, Y)], every=3, key=KEY, limit=20)
    other.restore(map(json.loads, lines[:3]))
    assert other.records == history.records[:2]
    assert other(6, trained(6)) is not None
    assert other.records == history.records
    other.restore([history.records[1]])  # the same step again replaces
    assert other.records == history.records


def test_json_is_strict_and_comes_back(history, tmp_path):
    made = History(REGISTRY, [(X, Y)], key=KEY)
    made.restore([*history.records, {"step": 9, "compare/loss": None}])
    assert math.isnan(made.records[-1]["compare/loss"])
    found = json.loads(made.to_json(tmp_path / "history.json"))
    assert found == json.loads((tmp_path / "history.json").read_text())
    assert found[:3] == history.records
    assert found[3] == {"step": 9, "compare/loss": None}


def test_the_plot_has_a_panel_for_each_figure(history, tmp_path):
    figure = history.plot()
    titles = [ax.get_title().split(":")[0] for ax in figure.axes]
    assert titles == ["scale", "shape", "directions", "the model", ""]
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["whole network", "first", "second"]
    lines = {line.get_label(): line for line in figure.axes[1].lines[1:]}
    assert len(lines) == 3
    assert all(line.get_xdata().tolist() == [0, 3, 6] for line in lines.values())
    figure.savefig(tmp_path / "history.png")


def test_the_plot_bears_gaps_many_layers_and_names_with_slashes(tmp_path):
    rows = []
    for step in range(3):
        row = {"step": step, "compare/loss": 1.0}
        for block in ["whole network", *(f"net/~/layer_{i}" for i in range(12)), "$x$"]:
            row[f"compare/trace_ratio/empirical Fisher/{block}"] = None if step == 1 else 0.0
            row[f"compare/cosine/empirical Fisher/{block}"] = 0.5 + step / 10
            row[f"compare/cosine_error/empirical Fisher/{block}"] = 0.1
        rows.append(row)
    made = History(REGISTRY, [(X, Y)], key=KEY)
    made.restore(rows)
    figure = made.plot()
    assert len(figure.axes) == 2  # no directions, nothing to be wrong about
    assert len(figure.axes[1].lines) == 1 + 14
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["whole network", "the layers"]
    figure.savefig(tmp_path / "history.png")


def test_every_kind_is_set_against_the_first():
    kinds = {
        "F": curvature.Fisher(samples=None),
        "E/x": curvature.EmpiricalFisher(),
        "G": curvature.GaussNewton(),
    }
    history = History(REGISTRY, [(X, Y)], key=KEY, kinds=kinds, directions=False, blocks="second")
    found = history(0, PARAMS)
    assert [name for name in found if "cosine" in name] == [
        "compare/cosine/E_x/second",
        "compare/cosine/G/second",
    ]
    assert history.plot("E/x").get_suptitle().startswith("E_x")
    assert history.plot("G").get_suptitle().startswith("G")
    with pytest.raises(ValueError, match="no kind 'H' to draw"):
        history.plot("H")


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match="every >= 1"):
        History(REGISTRY, [(X, Y)], key=KEY, every=0)
    history = History(REGISTRY, key=KEY, every=2)
    with pytest.raises(ValueError, match="no records to draw"):
        history.plot()
    assert history(1, PARAMS) is None
    with pytest.raises(ValueError, match="pass batches to History"):
        history(2, PARAMS)
    alone = History(REGISTRY, [(X, Y)], key=KEY, kinds=[curvature.EmpiricalFisher()])
    alone(0, PARAMS)
    with pytest.raises(ValueError, match="nothing to be set against"):
        alone.plot()
