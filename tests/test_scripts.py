"""The example programs: every framework and model trains, files are written, bad options stop."""

import itertools
import json

import pytest

import cost
import demo
import train
from digits import data, loop, options, problems

pytestmark = pytest.mark.usefixtures("standard_promotion", "wide")


def run_train(folder, *arguments):
    """Trains for a few steps; gives the exit status and what metrics.json holds."""
    quick = ["--steps", "3", "--batch-size", "60", "--quiet", "--out", str(folder)]
    status = train.main([*quick, *arguments])
    return status, read_json(folder / "metrics.json")


def read_json(path):
    def refuse(constant):
        raise AssertionError(f"{path} holds {constant}, which is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def combinations():
    """Every framework with every model; all frameworks and models stay in the quick tests."""
    quick = {("linen", "mlp"), ("nnx", "batchnorm"), ("haiku", "deep")}
    return [
        pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow)
        for pair in itertools.product(problems.FRAMEWORKS, problems.ARCHITECTURES)
    ]


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("framework", "model"), combinations())
def test_kfac_trains_every_model_in_every_framework(tmp_path, framework, model):
    status, metrics = run_train(tmp_path, "--framework", framework, "--model", model)
    assert status == 0
    assert is_png(tmp_path / "training.png")
    assert metrics["problem"] == f"{framework} {model}"
    assert metrics["optimizer"]["name"] == "kfac"
    assert metrics["curve"]["steps"] == [0, 1, 2, 3]
    assert metrics["curve"]["loss"][-1] < metrics["curve"]["loss"][0]


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_baselines_take_the_same_loop(tmp_path, optimizer):
    status, metrics = run_train(tmp_path, "--optimizer", optimizer, "--record-every", "2")
    assert status == 0
    assert set(metrics["optimizer"]) == {"name", "learning_rate", "momentum"}
    assert metrics["curve"]["steps"] == [0, 2, 3]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--fisher", "exact", "--damping", "0.1"], marks=pytest.mark.slow),
        ["--fisher", "empirical", "--statistics-every", "2", "--refresh-every", "3"],
        pytest.param(
            ["--samples", "2", "--decay", "0.5", "--initial-damping", "1", "--momentum", "0"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_kfac_options_reach_the_optimizer(tmp_path, arguments):
    status, metrics = run_train(tmp_path, *arguments)
    assert status == 0
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    for option, value in given.items():
        assert str(metrics["optimizer"][option[2:].replace("-", "_")]).removesuffix(".0") == value


def test_the_same_seed_gives_the_same_run(tmp_path):
    first, second, other = (
        run_train(tmp_path, "--optimizer", "sgd", "--seed", seed)[1]["curve"]["loss"]
        for seed in ("1", "1", "2")
    )
    assert first == second != other


def test_a_diverged_run_says_so_in_status_json_and_text(tmp_path, capsys):
    options = ["--optimizer", "sgd", "--learning-rate", "1e9", "--steps", "20"]
    status, metrics = run_train(tmp_path, *options)
    assert status == 1
    assert metrics["final"]["training_loss"] is None
    assert "no longer finite" in metrics["stopped"]
    assert "no longer finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "0 is not at least 1"),
        (["--steps", "many"], "'many' is not a whole number"),
        (["--batch-size", "1501"], "1501 is not between 1 and 1500, all training images"),
        (["--learning-rate", "-1"], "-1 is not a finite number above 0"),
        (["--learning-rate", "nan"], "nan is not a finite number above 0"),
        (["--momentum", "1"], "1 is not in [0, 1)"),
        (["--seed", "-1"], "-1 is not between 0"),
        (["--framework", "torch"], "invalid choice 'torch' for argument '--framework'"),
        (["--optimizer", "adam", "--damping", "1"], "--optimizer adam has no --damping"),
        (["--fisher", "exact", "--samples", "2"], "--samples needs --fisher sampled"),
        (["--halve-damping-every", "2"], "needs --initial-damping"),
        (["--optimizer", "sgd", "--adaptive"], "--optimizer sgd has no --adaptive"),
        (["--adaptive", "--learning-rate", "1"], "--adaptive chooses what --learning-rate"),
        (["--step", "3"], "Unrecognized options: --step"),
    ],
)
def test_bad_options_stop_at_once(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("program", [train, demo])
def test_out_must_not_be_a_file(tmp_path, capsys, program):
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(SystemExit):
        program.main(["--out", str(path)])
    assert "is a file, not a folder" in capsys.readouterr().err


def test_a_missing_framework_is_named(monkeypatch, capsys):
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        train.main(["--framework", "haiku"])
    assert "pip install dm-haiku" in capsys.readouterr().err


@pytest.mark.parametrize("program", [train, demo])
def test_help_shows_defaults_and_examples(capsys, program):
    with pytest.raises(SystemExit) as stop:
        program.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "examples:" in text
    assert "(default:" in text


@pytest.mark.slow
def test_demo_writes_its_files_and_prints_its_tables(tmp_path, capsys):
    quick = ["--steps", "5", "--quick", "--batch-size", "100", "--quiet", "--out", str(tmp_path)]
    assert demo.main(quick) == 0
    metrics = read_json(tmp_path / "metrics.json")
    assert is_png(tmp_path / "training.png")
    assert {name: run["curve"]["steps"][-1] for name, run in metrics["runs"].items()} == {
        "kfac": 1,
        "adam": 5,
        "sgd": 5,
    }
    assert all(run["search"] for run in metrics["runs"].values())
    starts = {run["curve"]["loss"][0] for run in metrics["runs"].values()}
    assert len(starts) == 1, "every optimizer starts from the same network"
    assert metrics["verdict"]["target_ratio"] == 5
    layers = metrics["fisher"]["initial"]
    assert len(layers) == 7  # the whole network first
    for layer in layers:
        assert layer["trace_ratio"]["value"] > 0
        assert abs(layer["cosine"]["value"]) <= 1.0001 + (layer["cosine"]["error"] or 0)
    text = capsys.readouterr().out
    assert "3,190 of 3,190 parameters" in text
    assert "K-FAC" in text and "Adam" in text and "SGD with momentum" in text
    assert "Target (" in text


@pytest.mark.parametrize(
    ("kfac_losses", "steps", "met"),
    [([3.0, 2.0, 1.0], 2, True), ([3.0, 2.9, 2.8], None, False), ([0.5, 0.4, 0.3], 0, True)],
)
def test_verdict_counts_steps_to_the_baselines_last_loss(kfac_losses, steps, met):
    kfac, adam = loop.Curve(), loop.Curve()
    for step, loss in enumerate(kfac_losses):
        kfac.append(step, step * 0.1, loss, 0.0)
    for step in range(11):
        adam.append(step, step * 0.1, 11.0 - step, 0.0)
    verdict = demo.judge(kfac, adam)
    assert (verdict.kfac_steps, verdict.met) == (steps, met)
    assert ("met" if met else "missed") in str(verdict)


def test_data_split_is_disjoint_complete_and_fixed():
    first, second = data.load(0), data.load(0)
    assert (first.train.size, first.test.size) == (1500, 297)
    assert bool((first.train.x == second.train.x).all())
    assert bool((data.load(1).train.y != first.train.y).any())
    assert float(first.train.x.min()) >= 0 and float(first.train.x.max()) == 1


def test_batches_cover_an_epoch_without_repeats_and_start_anywhere():
    part = data.Batch(data.load().train.x[:10], data.load().train.y[:10])
    stream = data.batches(part, 3, seed=0)
    found = [next(stream).x.tolist() for _ in range(8)]
    assert len({tuple(row) for batch in found[:3] for row in batch}) == 9
    assert found[0] != found[3]  # another epoch, another order
    for first in range(8):
        later = data.batches(part, 3, seed=0, first=first)
        assert [next(later).x.tolist() for _ in range(8 - first)] == found[first:]


def test_what_a_step_costs_is_measured_row_by_row(tmp_path, capsys):
    small = "--layers 1 --width 16 --heads 2 --vocabulary 32 --context 8 --batch-size 2 --steps 2"
    out = tmp_path / "cost.json"
    rows = ["adamw", "kfac, a quarter every 10, inverses in 100"]
    assert cost.main([*small.split(), "--network", "gpt", "--row", *rows, "--out", str(out)]) == 0
    found = read_json(out)
    assert list(found["gpt"]["rows"]) == rows
    assert all(row["mean_ms"] > 0 for row in found["gpt"]["rows"].values())
    assert "compile / adamw" in capsys.readouterr().out
