"""The benchmark: one protocol for all optimizers, files with what readers need, kept results."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

import benchmark
import curvature
from benchmarks import kfac_jax, optimizers, physics, problems, protocol, results

pytestmark = pytest.mark.usefixtures("standard_promotion")
PROBLEM = "digits_classifier"


def run_quick(folder, *arguments):
    quick = ["--quick", "--problem", PROBLEM, "--optimizer", "adam", "kfac"]
    assert benchmark.main([*quick, "--out", str(folder), *arguments]) == 0
    return json.loads((folder / f"{PROBLEM}.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The files of a quick run, which several tests look at."""
    folder = tmp_path_factory.mktemp("benchmarks")
    with jax.numpy_dtype_promotion("standard"):
        run_quick(folder)
    return folder


@pytest.mark.slow
def test_a_quick_run_writes_json_and_plot(finished):
    found = json.loads((finished / f"{PROBLEM}.json").read_text())
    assert (finished / f"{PROBLEM}.png").read_bytes().startswith(b"\x89PNG")
    assert (found["parameters"], found["examples"], found["batch_size"]) == (3190, 1500, 500)
    assert list(found["optimizers"]) == ["adam", "kfac"]
    for entry in found["optimizers"].values():
        assert entry["environment"]["versions"]["jax"]
        assert entry["setting"] in [trial["setting"] for trial in entry["trials"]]
        assert len(entry["trials"]) == entry["protocol"]["trials"] == 2
        (run,) = entry["runs"]
        assert run["steps"] == [0, 1, 2, 3] and run["stopped"] is None
        assert run["measures"]["loss"][-1] < run["measures"]["loss"][0]
        assert len(run["measures"]["accuracy"]) == 4
        assert sorted(run["seconds"]) == run["seconds"] and run["seconds"][0] == 0
        assert 0 < run["median_step_seconds"] <= run["slowest_step_seconds"]
        assert run["compile_seconds"] > 0
    assert found["optimizers"]["adam"]["split"] is None
    parts = {"forward_backward", "statistics", "refresh", "apply"}
    assert set(found["optimizers"]["kfac"]["split"]) == parts


@pytest.mark.slow
def test_results_are_kept_unless_the_protocol_differs(finished, capsys):
    path = finished / f"{PROBLEM}.json"
    before = json.loads(path.read_text())
    assert run_quick(finished) == before
    text = capsys.readouterr().out
    assert "adam: kept from" in text and "steps to Adam's best" in text
    with pytest.raises(SystemExit, match="or --fresh"):
        arguments = ["--problem", PROBLEM, "--optimizer", "adam", "--out", str(finished)]
        benchmark.main([*arguments, "--steps", "7"])


def test_results_of_another_problem_are_refused(tmp_path):
    path = tmp_path / "results.json"
    problem = problems.PROBLEMS[PROBLEM]()
    path.write_text(json.dumps({**results.start(problem, path), "batch_size": 7}))
    with pytest.raises(SystemExit, match="remove it"):
        results.start(problem, path)


@pytest.mark.slow
def test_fresh_measures_again_what_is_asked_for_and_keeps_the_rest(tmp_path):
    quick = ["--quick", "--problem", PROBLEM, "--out", str(tmp_path)]
    path = tmp_path / f"{PROBLEM}.json"
    benchmark.main([*quick, "--optimizer", "adam", "sgd"])
    before = json.loads(path.read_text())["optimizers"]
    benchmark.main([*quick, "--optimizer", "sgd", "--fresh"])
    after = json.loads(path.read_text())["optimizers"]
    assert after["adam"] == before["adam"]
    assert after["sgd"]["runs"][0]["seconds"] != before["sgd"]["runs"][0]["seconds"]
    assert after["sgd"]["runs"][0]["measures"] == before["sgd"]["runs"][0]["measures"]


@pytest.mark.slow
def test_the_seed_decides_the_start_for_every_optimizer():
    problem = problems.PROBLEMS[PROBLEM]()
    starts = {
        (name, seed): protocol.run(name, problem, setting[0], seed, 1, None).measures["loss"][0]
        for name, setting in optimizers.SETTINGS.items()
        for seed in (1, 2)
        if name in ("adam", "sgd", "foof")
    }
    assert len({loss for (_, seed), loss in starts.items() if seed == 1}) == 1
    assert len(set(starts.values())) == 2


def test_a_diverged_run_says_so_and_is_never_the_best_setting():
    problem = problems.PROBLEMS[PROBLEM]()
    run = protocol.run("sgd", problem, {"learning_rate": math.inf}, 1, 50, None)
    assert run.stopped == protocol.DIVERGED and len(run.steps) == 2
    trials = [{"setting": {"a": 1}, "loss": run.final_loss}, {"setting": {"a": 2}, "loss": 9.0}]
    assert protocol.best(trials) == {"a": 2}
    with pytest.raises(RuntimeError, match="All settings diverged"):
        protocol.best(trials[:1])


def test_seconds_end_a_run():
    problem = problems.PROBLEMS[PROBLEM]()
    run = protocol.run("sgd", problem, {"learning_rate": 0.1}, 1, 50, 1e-9)
    assert run.steps == [0, 1] and "seconds were over" in run.stopped


def test_every_optimizer_has_as_many_trials():
    assert set(optimizers.SETTINGS) == set(optimizers.OPTIMIZERS) == set(optimizers.LABELS)
    assert {len(settings) for settings in optimizers.SETTINGS.values()} == {optimizers.TRIALS}


def entry(*losses):
    """Results of a run for each list of losses."""
    return {
        "runs": [
            {
                "steps": list(range(0, 10 * len(loss), 10)),
                "seconds": [1.0 * i for i in range(len(loss))],
                "measures": {"loss": loss},
            }
            for loss in losses
        ]
    }


def test_medians_count_a_divergence_as_infinite():
    curve = results.median_curve(entry([4.0, 3.0, 2.0], [4.0, None], [5.0, 2.0, 3.0]))
    assert curve.steps == [0, 10, 20]
    np.testing.assert_array_equal(curve.loss, [4.0, 3.0, 3.0])
    np.testing.assert_array_equal(curve.seconds, [0.0, 1.0, 2.0])
    assert curve.first_at_most(3.5) == 1 and curve.first_at_most(2.5) is None
    two = results.median_curve(entry([4.0, 3.0], [4.0, None], [4.0, None]))
    assert two.loss[-1] == math.inf


def test_medians_end_where_the_first_run_was_cut_off():
    curve = results.median_curve(entry([4.0, 3.0, 2.0], [4.0, 1.0]))
    assert curve.steps == [0, 10]
    np.testing.assert_array_equal(curve.loss, [4.0, 2.0])


@pytest.mark.slow
@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_every_problem_is_found_whole_and_evaluates_its_own_loss(name):
    problem = problems.PROBLEMS[name]()
    params = problem.network.init(jax.random.key(0))
    part = jax.tree.map(lambda a: a[: 2 * problem.batch_size], problem.data)
    registry = curvature.register(problem.loss_fn, params, part)
    assert not any(layer.kind == "generic" for layer in registry.layers)
    measured = problem.evaluate(params, part)
    np.testing.assert_allclose(measured["loss"], problem.loss_fn(params, part), rtol=1e-5)


@pytest.mark.slow
def test_what_a_physics_informed_net_is_judged_by():
    problem = physics.poisson()
    params = problem.network.init(jax.random.key(0))
    registry = curvature.register(problem.loss_fn, params, problem.data)
    assert registry.coverage == 1 and len(registry.losses) == 2
    measured = problem.evaluate(params, problem.data)
    np.testing.assert_allclose(measured["objective"], problem.loss_fn(params, problem.data))
    nothing = jax.tree.map(lambda x: 0 * x, params)
    np.testing.assert_allclose(problem.evaluate(nothing, problem.data)["loss"], 1)


@pytest.mark.slow
def test_walkers_follow_the_wave_function_that_is_trained():
    problem = physics.helium()
    params = problem.network.init(jax.random.key(0))
    registry = curvature.register(problem.loss_fn, params, problem.data)
    assert registry.coverage == 1 and not registry.objective
    draw, other = problem.batches(0), problem.batches(1)
    first, second = draw(params), draw(params)
    assert np.abs(first.x - second.x).max() > 0.1 and np.abs(first.x - other(params).x).max() > 0.1
    np.testing.assert_allclose(second.y.mean(), 0, atol=1e-5)
    assert 0.01 < problem.evaluate(params, problem.data)["loss"] < 0.1
    # Far out, walkers come back: what they are drawn from is what the parameters say.
    far = dataclasses.replace(problem, data=problem.data._replace(x=3 * problem.data.x))
    back = far.batches(0)
    for _ in range(20):
        batch = back(params)
    distance = lambda x: float(np.linalg.norm(x, axis=-1).mean())  # noqa: E731
    assert distance(batch.x) == pytest.approx(distance(first.x), rel=0.1)


def test_characters_are_predicted_from_those_before():
    problem = problems.char_transformer()
    x, y = np.asarray(problem.data.x), np.asarray(problem.data.y)
    np.testing.assert_array_equal(x.ravel()[1:], y.ravel()[:-1])
    assert "def __init__(self" in "".join(problems.ALPHABET[i] for i in x.ravel())


def test_a_missing_checkout_is_said(tmp_path, capsys):
    assert "holds no kfac_jax" in kfac_jax.add_checkout(tmp_path)
    with pytest.raises(SystemExit):
        benchmark.main(["--quick", "--optimizer", "kfac_jax", "--out", str(tmp_path)])
    text = capsys.readouterr()
    assert "kfac-jax is left out: no --kfac-jax" in text.out
    assert "no optimizer is left" in text.err


@pytest.mark.slow
def test_side_by_side_measures_ours_and_adam(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # in its processes: more is compiled
    arguments = ["--side-by-side", "--quick", "--data", "random", "--out", str(tmp_path)]
    assert benchmark.main(arguments) == 0
    found = json.loads((tmp_path / "side_by_side.json").read_text())
    assert set(found["contestants"]) == {"ours", "ours_defaults"}
    for measured in found["contestants"].values():
        assert measured["losses"][0] == pytest.approx(measured["adam"]["losses"][0])
        assert measured["state_in_parameters"] > measured["adam"]["state_in_parameters"] >= 2
        assert measured["mean_to_adam"] > 1
