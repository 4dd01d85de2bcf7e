"""Where results meet `curvature.report`, which reads them: imported late, and nowhere else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curvature.comparison.result import Comparison


def table(comparison: "Comparison") -> str:
    """The main figures as text."""
    from curvature.report.table import table

    return table(comparison)


def save_html(comparison: "Comparison", path: str | Path) -> None:
    """Writes one HTML file that needs no network."""
    from curvature.report.html import save_html

    save_html(comparison, path)


def plot(comparison: "Comparison", pair: tuple[str, str] | None, figure: Any) -> Any:
    """Draws one pair."""
    from curvature.report.plots import plot

    return plot(comparison, pair, figure=figure)


def plot_history(
    records: Sequence[Mapping[str, float]], reference: str, kind: str | None, figure: Any
) -> Any:
    """Draws scalars over training steps."""
    from curvature.report.history_plot import plot

    return plot(records, reference, kind, figure=figure)
