"""Every command of the scripts that pages and help texts show is one that the scripts read."""

import pathlib
import re
import shlex

import pytest

import benchmark
import compare
import cost
import demo
import train
import train_ferminet
from digits import options
from transformer import command as transformer

pytestmark = pytest.mark.usefixtures("wide")
ROOT = pathlib.Path(__file__).parents[1]
PROGRAMS = {
    "benchmark": benchmark,
    "compare": compare,
    "cost": cost,
    "demo": demo,
    "train": train,
    "train_ferminet": train_ferminet,
}
SHOWN = re.compile(rf"scripts/({'|'.join(PROGRAMS)})(?:\.py)? +(-[^\n`]*|\w[\w./]*:\w[^\n`]*)")


def shown():
    """The commands, without the remarks beside them, which two spaces or a hash part off."""
    texts = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    found = set()
    for path in [*texts, *(ROOT / "scripts").rglob("*.py")]:
        text = re.sub(r" \\+\n +", " ", path.read_text(encoding="utf-8"))
        for program, arguments in SHOWN.findall(text):
            found.add((program, re.split(r'  | #|"', arguments)[0].strip()))
    return sorted(found)


def read(program, arguments):
    module = PROGRAMS[program]
    if program == "train" and train.asks_for_transformer(arguments):
        module = transformer
    return options.read(module.Settings, arguments, module.__doc__)


def test_the_commands_are_found():
    found = shown()
    assert len(found) > 30 and {program for program, _ in found} == set(PROGRAMS)
    assert (
        "compare",
        "my_project.nets:model --batches 10 --damping 0.01 --out runs/compare",
    ) in found
    assert any("--process 0" in arguments for _, arguments in found)  # after a line is continued


@pytest.mark.parametrize(("program", "arguments"), shown())
def test_a_command_is_read(program, arguments):
    if "--help" in arguments:
        with pytest.raises(SystemExit) as stop:
            read(program, shlex.split(arguments))
        assert stop.value.code == 0
        return
    given = dict(vars(read(program, shlex.split(arguments))))
    for part in ("kfac", "devices"):
        given |= vars(given[part]) if part in given else {}
    for flag in re.findall(r"--([\w-]+)", arguments):
        value = given[flag.replace("-", "_")]
        assert value is not None and value is not False


def test_values_arrive_as_they_are():
    found = read("benchmark", ["--problem", "poisson", "helium", "--kfac_jax", "there"])
    assert found.problem == ("poisson", "helium") and found.kfac_jax == pathlib.Path("there")
    assert found.folder == pathlib.Path("docs/benchmarks")
    assert read("benchmark", ["--quick"]).folder == pathlib.Path("runs/benchmarks")
    found = read("train", ["--decay", "0", "--steps=3", "--steps", "4"])
    assert found.steps == 4 and found.kfac.given == {"decay": 0.0}
    assert read("train", ["--adaptive"]).recipe.damping == 1.0
    found = read("train", ["--model", "transformer", "--mesh", "data=2,model=4"])
    assert found.devices.mesh == {"data": 2, "model": 4}
    assert read("compare", ["a:b", "--approximations"]).approximations == []


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("benchmark", ["--problem"], "--problem: expected at least one value"),
        ("benchmark", ["--problem", "maze"], "invalid choice 'maze' for argument '--problem'"),
        ("benchmark", ["--seeds", "0"], "--seeds: 0 is not at least 1"),
        ("compare", ["a:b", "--blocks"], "--blocks: expected at least one value"),
        ("cost", ["--net", "gpt"], "Unrecognized options: --net"),
        ("demo", ["deep"], "Unrecognized options: deep"),
        ("train", ["--steps"], "Missing value for argument '--steps'"),
        ("train", ["--damping", "0"], "--damping: 0 is not a finite number above 0"),
        (
            "train",
            ["--model", "transformer", "--statistics-batch", "1.5"],
            "--statistics-batch: 1.5 is not above 0 and at most 1",
        ),
        (
            "train",
            ["--model", "transformer", "--optimizer", "soap", "--statistics-batch", "0.5"],
            "--optimizer soap has no --statistics-batch",
        ),
        (
            "train",
            ["--model", "transformer", "--optimizer", "adamw", "--gather", "updates"],
            "--optimizer adamw has no --gather",
        ),
        ("train_ferminet", ["--row"], "--row: expected at least one value"),
    ],
)
def test_a_wrong_argument_is_named(capsys, program, arguments, message):
    with pytest.raises(SystemExit) as stop:
        read(program, arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
