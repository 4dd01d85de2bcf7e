"""scripts/train.py: what it writes while it goes on, and resuming, also after `kill -9`."""

import json
import os
import pathlib
import random
import signal
import struct
import subprocess
import sys
import time

import pytest
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

import train
from digits import data, loop, optimizers, problems

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("standard_promotion")
QUICK = ["--quiet", "--batch-size", "400", "--adaptive", "--model", "batchnorm"]


def run(folder, *arguments):
    assert train.main([*QUICK, "--out", str(folder), *arguments]) == 0


def rows(folder):
    """metrics.jsonl without the times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found]


def curve(folder):
    """The curve in metrics.json without the times."""
    found = json.loads((folder / "metrics.json").read_text())["curve"]
    return {k: v for k, v in found.items() if k != "seconds"}


def events(folder):
    """{step: {tag: value}} as TensorBoard shows it: a start drops what there is of later steps."""
    shown = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in read_events(path):
            if event.session_log.status == SessionLog.START:
                shown = {step: values for step, values in shown.items() if step < event.step}
            if event.summary.value:
                shown[event.step] = {v.tag: v.simple_value for v in event.summary.value}
    return shown


def read_events(path):
    """Length, checksum, event, checksum; a kill may have cut off the last one."""
    content = path.read_bytes()
    while len(content) >= 12 and len(content) >= (end := struct.unpack("Q", content[:8])[0] + 16):
        yield Event.FromString(content[12 : end - 4])
        content = content[end:]


def check_same(folder, expected):
    """The whole of a run, bit by bit, without gaps or duplicates."""
    assert rows(folder) == rows(expected)
    assert curve(folder) == curve(expected)
    shown = events(folder)
    assert sorted(shown) == [row["step"] for row in rows(expected)]
    for row in rows(expected):
        step = row.pop("step")
        assert {k: shown[step][k] for k in row} == pytest.approx(row, rel=1e-6)


def stats_of_kfac():
    """The names of what `state.stats` holds."""
    problem = problems.make("linen", "mlp")
    registry = loop.register(problem, data.load().train, loop.Plan(1, 400))
    tx = optimizers.make(optimizers.Settings("kfac", 0.1), registry)
    return tx.init(registry.params).stats._fields


@pytest.mark.slow
def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, "--steps", "7", "--record-every", "2")
    assert [row["step"] for row in rows(whole)] == [0, 2, 4, 6, 7]
    names = {"step", "loss", "accuracy", *stats_of_kfac()}
    assert all(set(row) == names for row in rows(whole))
    run(parts, "--steps", "4", "--record-every", "2", "--checkpoint-every", "3")
    with (parts / "metrics.jsonl").open("a") as file:  # as if killed after the checkpoint
        file.write('{"step": 6, "loss": 1.0}\n{"step": 7, "lo')
    stale = EventsWriter(str(parts / "events"), ".also")
    values = [Summary.Value(tag="loss", simple_value=1)]
    stale.write_event(Event(step=5, summary=Summary(value=values)))
    stale.close()
    assert 5 in events(parts)
    capsys.readouterr()
    run(parts, "--steps", "7", "--record-every", "2", "--resume")
    assert "resumed after step 4" in capsys.readouterr().out
    check_same(parts, whole)


SGD = ["--optimizer", "sgd", "--quiet", "--steps", "2", "--checkpoint-every", "1"]


def test_resuming_without_a_checkpoint_starts_and_says_so(tmp_path, capsys):
    assert train.main([*SGD, "--out", str(tmp_path), "--resume"]) == 0
    assert "no checkpoint, a new run" in capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2]
    assert set(rows(tmp_path)[0]) == {"step", "loss", "accuracy"}
    before = curve(tmp_path)
    assert train.main([*SGD, "--out", str(tmp_path), "--resume"]) == 0  # nothing is left to do
    assert curve(tmp_path) == before


def test_a_run_that_cannot_be_resumed_stops_with_the_reason(tmp_path, capsys):
    command = [*SGD, "--out", str(tmp_path)]
    assert train.main(command) == 0
    before = rows(tmp_path)

    def message(*arguments):
        with pytest.raises(SystemExit) as stop:
            train.main([*command, *arguments])
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "holds a checkpoint of step 2: go on from there with --resume" in message()
    other = message("--resume", "--seed", "3", "--learning-rate", "0.5", "--steps", "9")
    assert "other settings: learning_rate is 0.5, was 0.1; seed is 3, was 0\n" in other
    assert "optimizer is adam, was sgd" in message("--resume", "--optimizer", "adam")
    assert "of step 2, more than --steps 1" in message("--resume", "--steps", "1")
    assert rows(tmp_path) == before
    (tmp_path / "metrics.jsonl").write_text("")
    assert "shorter than at the checkpoint of step 2" in message("--resume")


KILLED = [*QUICK, "--steps", "60"]


def start(folder, *arguments):
    """The program as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "scripts/train.py", *KILLED, "--out", str(folder), *arguments],
        cwd=ROOT,
        env=os.environ
        | {"PYTHONPATH": f"{ROOT}:{ROOT / 'adapters'}", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        stdout=subprocess.DEVNULL,
    )


def finish(process):
    assert process.wait(timeout=300) == 0


def checkpoints(folder):
    """The steps of those that are complete, and the names of those that are not."""
    names = os.listdir(folder / "checkpoints") if (folder / "checkpoints").exists() else []
    return [int(n) for n in names if n.isdigit()], [n for n in names if not n.isdigit()]


def wait_until(condition, process):
    while not condition():
        assert process.poll() is None, "the program ended before it was killed"
        time.sleep(0.001)


def kill_at_random(folder, process):
    """Kills it up to 0.3 seconds after its first checkpoint."""
    had = max(checkpoints(folder)[0], default=0)
    wait_until(lambda: max(checkpoints(folder)[0], default=0) > had, process)
    time.sleep(random.uniform(0, 0.3))
    process.kill()
    process.wait()


def kill_while_it_saves(folder, process):
    """Stops the process to look; what is incomplete then stays so."""
    while True:
        wait_until(lambda: checkpoints(folder)[0] and checkpoints(folder)[1], process)
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        if checkpoints(folder)[1]:
            break
        process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait()
    assert checkpoints(folder)[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "every, kills",
    [(7, [kill_at_random]), (1, [kill_at_random, kill_while_it_saves])],
    ids=["every-7", "every-1"],
)
def test_a_killed_run_goes_on_as_if_never_stopped(tmp_path, whole, every, kills):
    random.seed(every)
    arguments = ("--resume", "--checkpoint-every", str(every))
    for kill in kills:
        process = start(tmp_path, *arguments)
        kill(tmp_path, process)
        assert process.returncode == -signal.SIGKILL
    assert 0 < max(checkpoints(tmp_path)[0]) < 60
    finish(start(tmp_path, *arguments))
    check_same(tmp_path, whole)
