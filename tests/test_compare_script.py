"""scripts/compare.py, and comparisons while scripts/train.py trains."""

import importlib
import json
import sys
import textwrap

import pytest
from test_resume import events, rows

import compare
import train
from comparing import examples
from curvature.comparison import history
from digits import watch

pytestmark = pytest.mark.usefixtures("standard_promotion", "wide")

MODEL = """
    import jax, jax.numpy as jnp, curvature

    X, Y = jax.random.normal(jax.random.key(0), (24, 4)), jnp.arange(24) % 3
    PARAMS = {"first": jnp.ones((4, 2)) / jnp.arange(1.0, 5.0)[:, None], "second": jnp.eye(2, 3)}

    def loss_fn(params, x, y):
        logits = jnp.tanh(x @ params["first"]) @ params["second"]
        return curvature.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def model():
        return loss_fn, PARAMS, [(X[:12], Y[:12]), (X[12:], Y[12:])]

    def with_aux():
        return lambda *args: (loss_fn(*args), args[1]), PARAMS, [(X, Y)], True

    def untagged():
        return lambda p, x, y: jnp.sum((x @ p["first"]) ** 2), PARAMS, [(X, Y)]

    def two(): return loss_fn, PARAMS
    def number(): return 3.0
    def no_loss(): return PARAMS, loss_fn, [(X, Y)]
    def bad_aux(): return loss_fn, PARAMS, [(X, Y)], 3
    def empty(): return loss_fn, PARAMS, []
    def array(): return loss_fn, PARAMS, X
    def broken(): return loss_fn, PARAMS, [(X.T, Y)]
    THING = 3
"""
QUICK = ["--quiet", "--approximations"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the module `nets` in it."""
    (tmp_path / "nets.py").write_text(textwrap.dedent(MODEL))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop("nets", None)


def run(folder, *arguments):
    """Compares; gives what comparison.json holds."""
    assert compare.main([*arguments, *QUICK, "--out", str(folder / "out")]) == 0
    return json.loads((folder / "out" / "comparison.json").read_text())


def refused(capsys, *arguments):
    """What the program says when it stops."""
    with pytest.raises(SystemExit) as stop:
        compare.main([*arguments, *QUICK])
    assert stop.value.code == 2
    return capsys.readouterr().err


# A function of one's own --------------------------------------------------------------------------


def test_a_function_is_compared_and_everything_is_written(folder, capsys):
    found = run(folder, "nets:model")
    assert found["state"]["examples"] == 24
    assert [block["name"] for block in found["blocks"]] == ["whole network", "first", "second"]
    assert list(found["kinds"]) == ["Fisher", "empirical Fisher"]
    assert not any(block["structured"] for block in found["blocks"])
    assert "<html" in (folder / "out" / "comparison.html").read_text()
    assert (folder / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert text.startswith("nets:model\n14 parameters\n")
    assert "Over 24 examples the mean loss is" in text
    assert "empirical Fisher against Fisher" in text
    assert "out/comparison.html" in text
    assert max(map(len, text.splitlines()[:-1])) <= 100


@pytest.mark.slow
def test_options_reach_the_comparison(folder):
    arguments = ["nets.py:with_aux", "--blocks", "second", "--damping", "0.5", "--limit", "10"]
    kinds = ["--kinds", "empirical", "fisher:3", "gauss-newton"]
    more = ["--no-directions", "--seed", "4", "--approximations", "kronecker", "diagonal"]
    assert compare.main([*arguments, *kinds, *more, "--quiet", "--out", str(folder)]) == 0
    found = json.loads((folder / "comparison.json").read_text())
    assert list(found["kinds"]) == ["empirical Fisher", "Fisher (3 samples)", "Gauss-Newton"]
    (block,) = found["blocks"]
    assert (block["name"], found["damping"], found["settings"]["limit"]) == ("second", 0.5, 10)
    assert all(pair["directions"] is None for pair in block["pairs"].values())
    assert set(block["structured"]["Gauss-Newton"]) == {"kronecker", "diagonal"}


def test_batches_bound_the_data(folder):
    assert run(folder, "nets:model", "--batches", "1")["state"]["examples"] == 12


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nets", "'nets' is not of the form module:function"),
        ("nowhere:model", "There is no module 'nowhere': looked in the current folder"),
        ("nets.inner:model", "There is no module 'nets.inner'"),
        ("nowhere.py:model", "There is no file nowhere.py"),
        ("nets:modle", "nets has no 'modle'. Functions there: loss_fn, model, with_aux"),
        ("nets:THING", "nets has a int, not a function, as 'THING'"),
        ("nets:two", "returned 2 things (function, dict), expected (loss_fn, params, batches), or"),
        ("nets:number", "returned a float, expected (loss_fn, params, batches)"),
        ("nets:no_loss", "returned a dict as loss_fn, which cannot be called"),
        ("nets:bad_aux", "returned a int as has_aux, which is True or False"),
        ("nets:empty", "batches is empty"),
        ("nets:array", "Put a single batch into a list"),
        ("nets:untagged", "curvature.losses"),
    ],
)
def test_what_cannot_be_compared_is_named(folder, capsys, name, message):
    assert message in refused(capsys, name)


def test_errors_of_ones_own_code_keep_their_traceback(folder):
    (folder / "wrong.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        compare.main(["wrong:model"])
    with pytest.raises(TypeError, match="dot_general"):
        compare.main(["nets:broken", *QUICK])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one model, found nothing"),
        (["nets:model", "--example", "curves"], "found nets:model and curves"),
        (["nets:model", "--train-steps", "3"], "--train-steps needs --example"),
        (["--example", "mlp"], "invalid choice 'mlp' for argument '--example'"),
        (["nets:model", "--kinds", "fischer"], "'fischer' is not one of fisher, empirical"),
        (["nets:model", "--kinds", "fisher:0"], "'0' is not a number of samples"),
        (["nets:model", "--kinds", "empirical:2"], "draws no samples"),
        (["nets:model", "--kinds", "fisher"], "needs two kinds or more that differ"),
        (["nets:model", "--kinds", "fisher", "fisher"], "needs two kinds or more that differ"),
        (["nets:model", "--limit", "9"], "9 is not at least 10"),
        (["nets:model", "--damping", "0"], "0 is not a finite number above 0"),
        (["nets:model", "--blocks", "third"], "The layers are: first, second"),
    ],
)
def test_bad_options_stop_at_once(folder, capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_many_outputs_are_warned_of(monkeypatch):
    from curvature import EmpiricalFisher, Fisher, GaussNewton

    class Tag:
        lead, columns = (8,), 16

    class Registry:
        losses = (Tag, Tag)

    warning = compare.kinds.warning
    assert "256 backward passes" in warning([EmpiricalFisher(), Fisher(samples=None)], Registry)
    assert "256 backward passes" in warning([GaussNewton()], Registry)
    assert warning([EmpiricalFisher(), Fisher(samples=3)], Registry) is None


def test_help_says_what_a_function_returns(capsys):
    with pytest.raises(SystemExit) as stop:
        compare.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "returns (loss_fn, params, batches)" in text
    assert all(name in text for name in examples.EXAMPLES)


# Examples and checkpoints -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits_deep", "digits_batchnorm", "digits_autoencoder"])
def test_an_example_is_compared_after_training(tmp_path, capsys, name):
    cheap = ["--limit", "20", "--no-directions", "--batches", "1"]
    found = run(tmp_path, "--example", name, "--train-steps", "2", *cheap)
    assert found["state"]["examples"] == 250
    assert found["blocks"][0]["name"] == "whole network"
    assert "after 2 steps of Adam" in capsys.readouterr().out


SGD = ["--quiet", "--optimizer", "sgd", "--batch-size", "60", "--model", "deep"]


@pytest.fixture
def few(monkeypatch):
    """Few images, small matrices, and no approximations: what takes the time."""

    def cheaper(function):
        return lambda *args, **options: function(
            *args, **options | {"limit": 20, "approximations": ()}
        )

    monkeypatch.setattr(watch, "IMAGES", 40)
    monkeypatch.setattr(history, "compare", cheaper(history.compare))
    monkeypatch.setattr(watch.curvature, "compare", cheaper(watch.curvature.compare))


@pytest.mark.slow
def test_a_checkpoint_is_the_network_that_was_trained(tmp_path, capsys, few):
    """Whose loss on the compared images a comparison while training has logged."""
    place = tmp_path / "run"
    options = ["--steps", "3", "--checkpoint-every", "3", "--compare-every", "3", "--seed", "5"]
    assert train.main([*SGD, *options, "--out", str(place)]) == 0
    cheap = ["--limit", "20", "--no-directions", "--blocks", "Dense_5"]
    found = run(tmp_path, "--checkpoint", str(place), *cheap)
    assert "linen deep network after 3 steps of SGD with momentum" in capsys.readouterr().out
    logged = rows(place)[-1]
    assert found["state"]["loss"] == pytest.approx(logged["compare/loss"], rel=1e-5)
    assert found["state"]["wrong"] == pytest.approx(logged["compare/wrong"])


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["linen", "nnx", "haiku"])
def test_checkpoints_of_every_framework_and_of_kfac(tmp_path, framework):
    place = tmp_path / "run"
    options = ["--quiet", "--framework", framework, "--model", "batchnorm", "--adaptive"]
    more = ["--steps", "2", "--checkpoint-every", "2", "--out", str(place)]
    assert train.main([*options, *more]) == 0
    found = run(tmp_path, "--checkpoint", str(place), "--limit", "20", "--no-directions")
    assert found["state"]["examples"] == 500  # and not the 64 of the running statistics
    assert len(found["blocks"]) > 3 and not any("left out" in note for note in found["notes"])


def test_a_folder_without_a_checkpoint_is_told_apart(tmp_path, capsys):
    def message(path):
        return refused(capsys, "--checkpoint", str(path))

    assert "missing does not exist. Expected the --out folder" in message(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()
    assert "holds no checkpoint of train.py" in message(tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    (tmp_path / "metrics.jsonl").touch()
    assert "holds a run of train.py that made no checkpoint" in message(tmp_path)
    assert "is a file, not a folder" in message(tmp_path / "metrics.jsonl")


# While training -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_resumed_run_compares_as_if_never_stopped(tmp_path, capsys, few):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*SGD, "--record-every", "4", "--compare-every", "3"]

    def go(folder, *more):
        assert train.main([*options, "--out", str(folder), *more]) == 0

    go(whole, "--steps", "7")
    text = capsys.readouterr().out
    assert "whole/comparison.html" in text and "empirical Fisher against Fisher" in text
    assert [row["step"] for row in rows(whole)] == [0, 3, 4, 6, 7]
    compared = [row["step"] for row in rows(whole) if "compare/wrong" in row]
    assert compared == [0, 3, 6]
    name = "compare/trace_ratio/empirical Fisher/whole network"
    assert rows(whole)[1][name] > 0
    assert rows(whole)[1][name.replace("ratio", "ratio_error")] > 0
    assert name in events(whole)[3]
    assert not any("_error" in tag for tag in events(whole)[3])
    for ending in ("html", "png"):
        assert (whole / f"comparison.{ending}").stat().st_size > 10_000

    go(parts, "--steps", "4", "--checkpoint-every", "2")
    with (parts / "metrics.jsonl").open("a") as file:  # as if killed after the checkpoint
        file.write('{"step": 6, "loss": 1.0, "compare/wr')
    go(parts, "--steps", "7", "--checkpoint-every", "2", "--resume")
    assert rows(parts) == rows(whole)
    with pytest.raises(SystemExit):
        train.main([*options[:-1], "2", "--steps", "9", "--out", str(parts), "--resume"])
    assert "compare_every is 2, was 3" in capsys.readouterr().err


@pytest.mark.slow
def test_a_diverged_run_draws_what_it_has(tmp_path, capsys, few):
    options = ["--model", "mlp", "--learning-rate", "1e9", "--steps", "20", "--compare-every", "1"]
    assert train.main([*SGD, *options, "--out", str(tmp_path)]) == 1
    last = rows(tmp_path)[-1]
    assert last["loss"] is None and "compare/loss" not in last
    assert (tmp_path / "comparison.png").exists()
    assert not (tmp_path / "comparison.html").exists()
    assert "no longer finite" in capsys.readouterr().err
