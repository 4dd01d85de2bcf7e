"""Training and held-out loss as a PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from digits.plots import INK, finish, save

LINES = {"loss": ("training batch", "#9db7d5", 1.2), "held_out": ("held out", "#1f5fa8", 1.8)}


def curve(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Both losses against steps and against seconds."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, against in zip(panels, ("step", "seconds"), strict=True):
        for name, (label, colour, width) in LINES.items():
            x, y = ([row[key] for row in rows] for key in (against, name))
            axes.plot(x, y, label=label, color=colour, linewidth=width)
    finish(panels[0], "steps", "loss, nats a byte", log=False)
    finish(panels[1], "seconds in steps (compilation excluded)", "", log=False)
    panels[1].legend(frameon=False, labelcolor=INK)
    figure.suptitle(title, fontsize=12, color=INK)
    save(figure, path)
