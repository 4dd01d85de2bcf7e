"""The example programs on uses of curvature: the files they write, and what they claim."""

import json

import numpy as np
import pytest

from examples import continual, influence, laplace, pruning

pytestmark = pytest.mark.usefixtures("standard_promotion")


def run(program, folder):
    """The results of a quick run, as written."""
    name = program.__name__.rpartition(".")[2]
    found = program.main(["--quick", "--out", str(folder)])
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((folder / "results.json").read_text())
    assert written == json.loads(json.dumps(found))
    return written


@pytest.mark.slow
def test_laplace_is_better_than_the_mode_on_images_unlike_those_of_training(tmp_path):
    found = run(laplace, tmp_path)
    mode, last, full = found["MAP"], found["last layer"], found["full"]
    assert mode[0]["NLL"] < min(last[0]["NLL"], full[0]["NLL"])
    for angle, *rows in zip(found["angles"], mode, last, full, strict=True):
        if angle >= 20:
            assert rows[2]["NLL"] < rows[1]["NLL"] < rows[0]["NLL"]
            assert rows[2]["ECE"] < rows[1]["ECE"] < rows[0]["ECE"]


@pytest.mark.slow
def test_influence_predicts_what_leaving_images_out_does(tmp_path):
    found = run(influence, tmp_path)
    for without, kfac, hessian in zip(
        found["no curvature"], found["K-FAC"], found["Hessian"], strict=True
    ):
        assert hessian > 0.95
        assert without < kfac
        assert kfac > 0.8


def test_a_fisher_penalty_remembers_and_kfac_remembers_more(tmp_path):
    found = run(continual, tmp_path)
    ends = [found[name]["best"]["test"][-1] for name in ("no penalty", "diagonal", "K-FAC")]
    plain, diagonal, kfac = ends
    assert plain[0] < diagonal[0] < kfac[0]  # on the first task
    assert np.mean(plain) < np.mean(diagonal) < np.mean(kfac)


def test_curvature_tells_which_weights_can_go(tmp_path):
    found = run(pruning, tmp_path)
    rules = [found[name] for name in ("magnitude", "diagonal", "K-FAC")]
    for i, share in enumerate(found["shares"]):
        if 0.4 <= share <= 0.8:
            magnitude, diagonal, kfac = (rule["loss"][i] for rule in rules)
            assert kfac < diagonal < magnitude
    at = found["shares"].index(0.7)
    lost = [rule["accuracy"][0] - rule["accuracy"][at] for rule in rules]
    assert lost[2] < 0.02 and min(lost[:2]) > 0.08
