"""The plots and the table of a comparison, also of what is left of a partial one."""

import re
import sys

import pytest
from comparisons import EF, PARTIAL, block, comparison, pair, realistic


@pytest.fixture(params=PARTIAL)
def partial(request):
    return PARTIAL[request.param]()


# --- plots ----------------------------------------------------------------------------------------


def test_a_plot_has_labels_and_error_bars():
    made = realistic(3)
    figure = made.plot()
    axes = {ax.get_title(): ax for ax in figure.axes}
    assert list(axes) == [
        "trace ratio",
        "cosine",
        "cosine of steps",
        "length of steps",
        "decrease at best length",
        "largest eigenvalues, whole network",
        "principal angles",
    ]
    assert figure.get_suptitle() == "empirical Fisher against true Fisher"
    ratio = axes["trace ratio"]
    assert [t.get_text() for t in ratio.get_yticklabels()] == [b.name for b in made.blocks]
    (bars,) = ratio.containers
    assert bars.has_xerr and ratio.get_xscale() == "log"
    ends = [path.vertices[:, 0].tolist() for path in bars.lines[2][0].get_paths()]
    value, error = made.blocks[0].pairs[EF].trace_ratio
    assert ends[0] == pytest.approx([value - error, value + error])
    spectra = axes["largest eigenvalues, whole network"]
    assert len(spectra.containers) == 3 and all(found.has_yerr for found in spectra.containers)
    assert [t.get_text() for t in spectra.get_legend().get_texts()] == [
        "true Fisher",
        "empirical Fisher",
        "Gauss-Newton matrix",
    ]


def test_plots_of_what_is_there(partial, tmp_path):
    if not any(found.pairs for found in partial.blocks):
        with pytest.raises(ValueError, match="no pair to draw"):
            partial.plot()
        return
    figure = partial.plot()
    figure.savefig(tmp_path / "plot.png", dpi=40)
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_many_blocks_get_a_taller_figure():
    small, large = (realistic(count).plot().get_size_inches() for count in (3, 60))
    assert small[0] == large[0] and large[1] > 2 * small[1]


def test_a_plot_of_another_pair_on_a_given_figure():
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(12, 6), layout="constrained")
    left, _ = figure.subfigures(1, 2)
    assert realistic(2).plot(("Fisher", "Gauss-Newton"), figure=left) is left
    assert left.get_suptitle() == "Gauss-Newton matrix against true Fisher"
    with pytest.raises(ValueError, match=r"No block has the pair \('a', 'b'\). The pairs compared"):
        realistic(2).plot(("a", "b"))


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'curvature\[report\]'"):
        realistic(2).plot()


# --- table ----------------------------------------------------------------------------------------


def test_the_table_has_a_line_for_each_block_and_pair():
    made = realistic()
    lines = made.table().splitlines()
    assert lines[0] == "empirical Fisher against Fisher"
    assert lines[2].split()[:4] == ["block", "entries", "trace", "ratio"]
    assert lines[4].startswith("whole network")
    assert "0.190 ± 0.016" in lines[4] and "38 ± 4°" in lines[4]
    told = lines[lines.index("Gauss-Newton against Fisher") + 2]
    assert told == "the same up to rounding in all 13 blocks"
    assert lines[-6].startswith("model: Over 2,048 examples the mean loss is 0.113")
    for found in made.blocks:
        assert sum(line.startswith(f"{found.name} ") for line in lines) == 1


def test_pairs_without_the_reference_come_last():
    other = ("empirical Fisher", "Gauss-Newton")
    pairs = {other: pair(), ("Fisher", "Gauss-Newton"): pair(), EF: pair()}
    lines = comparison([block("a", 9, pairs)]).table().splitlines()
    assert [line for line in lines if " against " in line] == [
        "empirical Fisher against Fisher",
        "Gauss-Newton against Fisher",
        "Gauss-Newton against empirical Fisher",
    ]


def test_the_table_is_narrow(partial):
    lines = partial.table().split("\n")
    assert max(map(len, lines)) <= 100
    assert all(line == line.rstrip() and (line.isprintable() or not line) for line in lines)
    assert "nan" not in re.findall(r"[a-z]+", " ".join(lines))


def test_names_that_are_cut_can_still_be_told_apart():
    names = [f"encoder/{'very_' * 12}long_{i}/attention/query/kernel" for i in range(4)]
    made = comparison([block(name, 9, {EF: pair()}) for name in names], notes=())
    first = [line.split()[0] for line in made.table().splitlines()[4:8]]
    assert len(set(first)) == 4


def test_nothing_to_compare():
    assert "no two kinds" in comparison([], notes=()).table()
