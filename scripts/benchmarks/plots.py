"""Loss against steps and against seconds, medians over seeds, as a PNG file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.optimizers import LABELS
from benchmarks.results import median_curve
from digits.plots import finish, save

COLOURS = {
    "kfac": "#1f5fa8",
    "ekfac": "#3aa0c9",
    "foof": "#6b4fa0",
    "kfac_jax": "#2e8b57",
    "adam": "#d9730d",
    "adamw": "#e0b040",
    "sgd": "#7a7a7a",
    "muon": "#c03a3a",
    "eigen_adam": "#111111",
    "soap": "#b06ab3",
}
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


def draw(path: Path, results: dict[str, Any]) -> None:
    """Draws a problem's results."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    by_step, by_second = figure.subplots(1, 2, sharey=True)
    for name, entry in results["optimizers"].items():
        curve = median_curve(entry)
        loss = np.where(np.isfinite(curve.loss), curve.loss, np.nan)
        style = {"color": COLOURS[name], "linewidth": 1.6, "label": LABELS[name]}
        by_step.plot(curve.steps, loss, **style)
        by_second.plot(curve.seconds, loss, **style)
    finish(by_step, "steps", results.get("measured", "training loss, all examples"))
    finish(by_second, "seconds in steps (compilation excluded)", "")
    for axes in (by_step, by_second):  # runs are of very different lengths
        axes.set_xscale("log")
        axes.autoscale(axis="x")
        axes.xaxis.set_major_formatter(PLAIN)
        axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = by_step.get_ylim()
    if high < 10 * low:  # else powers of ten say enough
        by_step.yaxis.set_minor_formatter(PLAIN)
    by_second.legend(frameon=False)
    figure.suptitle(f"{results['description']}, batch {results['batch_size']:,}", fontsize=12)
    save(figure, path)
