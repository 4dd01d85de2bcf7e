"""Training curves as PNG files.

Figures are made without pyplot, so that nothing here needs a display or leaves a global behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from digits.loop import Run

COLOURS = {"kfac": "#1f5fa8", "adam": "#d9730d", "sgd": "#7a7a7a"}
INK = "#333333"


def compare(path: Path, runs: Sequence[Run], title: str, reached: tuple[Run, Run] | None) -> None:
    """Training loss against steps and against seconds.

    `reached` names a faster and a slower run: the step at which the first has the last loss of the
    second is marked.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    by_step, by_second = figure.subplots(1, 2, sharey=True)
    for run in runs:
        style = {"color": COLOURS[run.settings.name], "linewidth": 1.8}
        label = (
            f"{run.settings.label} (learning rate {run.settings.learning_rate:g}): "
            f"test loss {run.test_loss:.3g}"
        )
        by_step.plot(run.curve.steps, run.curve.loss, label=label, **style)
        by_second.plot(run.curve.seconds, run.curve.loss, label=label, **style)
    if reached is not None:
        _mark(by_step, *reached, against="steps")
        _mark(by_second, *reached, against="seconds")
    finish(by_step, "steps", "training loss, all training images")
    finish(by_second, "seconds in steps (compilation excluded)", "")
    by_second.legend(frameon=False, loc="upper right", labelcolor=INK)
    figure.suptitle(title, fontsize=12, color=INK)
    save(figure, path)


def single(path: Path, run: Run, title: str) -> None:
    """Loss and accuracy of one run."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    colour = COLOURS[run.settings.name]
    loss.plot(run.curve.steps, run.curve.loss, color=colour, linewidth=1.8)
    accuracy.plot(run.curve.steps, run.curve.accuracy, color=colour, linewidth=1.8)
    finish(loss, "steps", "training loss, all training images")
    finish(accuracy, "steps", "training accuracy", log=False)
    figure.suptitle(title, fontsize=12, color=INK)
    save(figure, path)


def _mark(axes: Axes, fast: Run, slow: Run, against: str) -> None:
    """Draws the loss that `slow` ends at, and where `fast` first has it."""
    target = slow.curve.loss[-1]
    position = fast.curve.first_at_most(target)
    if position is None:
        return
    fast_at, slow_at = getattr(fast.curve, against)[position], getattr(slow.curve, against)[-1]
    axes.plot([fast_at, slow_at], [target, target], color=INK, linewidth=0.9, linestyle=":")
    axes.plot([fast_at], [target], "o", color=COLOURS[fast.settings.name], markersize=6)
    axes.plot([slow_at], [target], "o", color=COLOURS[slow.settings.name], markersize=6)
    unit = f"step {fast_at}" if against == "steps" else f"{fast_at:.2f}"
    end = f"{slow_at}" if against == "steps" else f"{slow_at:.2f} s"
    axes.annotate(
        f"{fast.settings.label} has {slow.settings.label}'s final loss at {unit} of {end}",
        (slow_at, target),
        xytext=(0, -9),
        textcoords="offset points",
        ha="right",
        va="top",
        color=INK,
        fontsize=9,
    )


def finish(axes: Axes, x_label: str, y_label: str, log: bool = True) -> None:
    """Labels, grid and a clean frame; `log` is of the vertical axis."""
    if log:
        axes.set_yscale("log")
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.margins(x=0.01)
    axes.set_xlim(left=0)
    axes.grid(True, which="major", color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, which="both")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG file, on white."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white")
