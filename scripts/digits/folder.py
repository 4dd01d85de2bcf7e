"""What a run leaves behind while it goes on, so that it can be watched, and resumed after a kill.

    metrics.jsonl    one line of JSON a measurement
    events.out.*     the same for TensorBoard
    checkpoints/     everything that the rest of the run depends on

Batches and random keys are functions of the seed and the step, so that a checkpoint holds neither.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from curvature.comparison.history import is_error
from digits import report

PyTree = Any


class RunFolder:
    """The folder of one run.

    A checkpoint knows how long metrics.jsonl was when it was made. What a killed run wrote after
    that, be it half a line, is cut off when the run is resumed, and measured again.

    Args:
      path: the folder.
      settings: what has to be the same in a resumed run.
      steps: how many there will be in all.
      checkpoint_every: steps between checkpoints, of which the last step is one; None for none.
      resume: whether to go on from the checkpoint, if there is one.
      writes: whether measurements are this process's to write; checkpoints are of all together.

    Raises:
      ValueError: the checkpoint there does not lead to this run, or resuming was not asked for.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        steps: int,
        checkpoint_every: int | None,
        resume: bool,
        *,
        writes: bool = True,
    ) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self._checkpoints = ocp.CheckpointManager(
            path.absolute() / "checkpoints",
            options=ocp.CheckpointManagerOptions(
                max_to_keep=1,
                cleanup_tmp_directories=True,  # what a kill has left
                enable_async_checkpointing=False,
            ),
        )
        self._settings, self._steps, self._every = settings, steps, checkpoint_every
        self._writes = writes
        self.step = self._checkpoints.latest_step() or 0
        self.seconds = 0.0
        self.rows: list[dict[str, Any]] = []
        lines = path / "metrics.jsonl"
        if self.step:
            if not resume:
                raise ValueError(
                    f"{path} holds a checkpoint of step {self.step}: go on from there with "
                    "--resume, or give another --out"
                )
            self._take_up(lines)
        if not writes:
            return
        self._lines = lines.open("a" if self.step else "w")
        self._events = EventsWriter(str(path / "events"), f".from_step_{self.step}")
        start = SessionLog(status=SessionLog.START)  # makes TensorBoard drop this step and later
        first = self.step + 1 if self.step else 0
        self._events.write_event(Event(wall_time=time.time(), step=first, session_log=start))

    def _take_up(self, lines: Path) -> None:
        """Reads all of a checkpoint but the training state, and cuts metrics.jsonl to match."""
        args = ocp.args.Composite(run=ocp.args.JsonRestore())
        run = self._checkpoints.restore(self.step, args=args).run
        differences = [
            f"{name} is {self._settings.get(name)}, was {run['settings'].get(name)}"
            for name in sorted({*self._settings, *run["settings"]})
            if self._settings.get(name) != run["settings"].get(name)
        ]
        if differences:
            raise ValueError(
                f"--resume: the checkpoint of step {self.step} was made with other settings: "
                + "; ".join(differences)
            )
        if self.step > self._steps:
            raise ValueError(
                f"--resume: the checkpoint is of step {self.step}, more than --steps {self._steps}"
            )
        if not lines.exists() or lines.stat().st_size < run["lines_size"]:
            raise ValueError(
                f"--resume: {lines} is missing or shorter than at the checkpoint of step "
                f"{self.step}: put it back, or start again with another --out"
            )
        if self._writes:
            os.truncate(lines, run["lines_size"])
        text = lines.read_bytes()[: run["lines_size"]].decode()
        self.rows = [json.loads(line) for line in text.splitlines()]
        self.seconds = run["seconds"]

    def restore(self, state: PyTree) -> PyTree:
        """The state of the checkpoint, or the one given where there is none."""
        if not self.step:
            return state
        # Not strict: what is divided over devices is filled up for as many as there are.
        args = ocp.args.Composite(state=ocp.args.StandardRestore(state, strict=False))
        return self._checkpoints.restore(self.step, args=args).state

    def append(self, row: dict[str, Any]) -> None:
        """Writes one measurement; what a row holds besides `step` are numbers.

        TensorBoard cannot draw error bars: errors of comparisons are in metrics.jsonl alone.
        """
        if not self._writes:
            return
        self._lines.write(report.json_line(row))
        self._lines.flush()
        shown = {k: v for k, v in row.items() if k != "step" and not is_error(k)}
        values = [Summary.Value(tag=k, simple_value=v) for k, v in shown.items()]
        event = Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values))
        self._events.write_event(event)
        self._events.flush()

    def save_if_due(self, step: int, state: PyTree, seconds: float) -> None:
        """Makes a checkpoint, which is there as a whole or not at all, and drops the one before."""
        if not self._every or (step % self._every and step != self._steps):
            return
        size = self._lines.tell() if self._writes else 0  # the first process's counts
        run = {"settings": self._settings, "seconds": seconds, "lines_size": size}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))
        self._checkpoints.save(step, args=args)

    def close(self) -> None:
        """Closes all files."""
        if self._writes:
            self._lines.close()
            self._events.close()
        self._checkpoints.close()
