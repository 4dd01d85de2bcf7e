"""The report, the plots and the table of a comparison, also of what is left of a partial one."""

import dataclasses
import html.parser
import math
import re
import sys

import pytest
from comparisons import KINDS, NAN, block, comparison, pair, realistic, same, spectrum

from curvature.comparison.result import WHOLE, Comparison, Figure, ModelState, Structured

EF = ("fisher", "empirical_fisher")
NASTY = "<script>alert('x')</script>/\"a\" & `b` $x_1$ \\frac %d {0}"
VOID = {"meta", "link", "br", "wbr"}


class Reader(html.parser.HTMLParser):
    """Checks that tags are balanced and keeps what they say."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.ids = [], [], [], set()
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        assert len(dict(attributes)) == len(attributes), f"an attribute is twice in {tag}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> is in the wrong place"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.words))

    def attributes(self, name):
        return [found[name] for _, found in self.tags if name in found]


def page(made, tmp_path):
    path = tmp_path / "report.html"
    made.save_html(path)
    return path.read_text(encoding="utf-8")


def nasty():
    """Names that mean something to HTML, to plots, to terminals."""
    kinds = {"fisher": "a <b>", "empirical_fisher": NASTY, NASTY: "mine"}
    pairs = {EF: pair(0.2), ("fisher", NASTY): pair(2.0)}
    blocks = [
        block(WHOLE, 40, pairs, kinds=kinds),
        block(NASTY, 20, pairs, kinds=kinds),
        block("x" * 300, 20, pairs, kinds=kinds),
        block("tab\tnew\nline", 20, pairs, kinds=kinds),
        block("_hidden", 20, pairs, kinds=kinds),
    ]
    return comparison(blocks, kinds=kinds, notes=(NASTY,), settings={NASTY: {NASTY: [NASTY]}})


def missing():
    """Every figure is not a number."""
    gone = pair(*[NAN] * 3, directions=True)
    steps = dataclasses.replace(
        gone.directions, **{f.name: NAN for f in dataclasses.fields(gone.directions)}
    )
    gone = dataclasses.replace(
        gone,
        **dict.fromkeys(("trace_ratio", "cosine", "frobenius_distance", "spectral_distance"), NAN),
        angles=(NAN, NAN),
        directions=steps,
    )
    spectra = dict.fromkeys(
        KINDS,
        dataclasses.replace(
            spectrum(9), trace=NAN, largest=(NAN,), effective_dimension=NAN, density=()
        ),
    )
    blocks = [
        dataclasses.replace(
            block(name, 9, {EF: gone}),
            spectra=spectra,
            structured={"fisher": {"kronecker": Structured(NAN, NAN, NAN)}},
        )
        for name in (WHOLE, "a")
    ]
    return comparison(blocks, state=ModelState(8, math.nan, math.nan, math.nan))


def odd():
    """Zeros, infinities, unknown errors, tiny and huge numbers."""
    values = [0.0, 1e-300, 1e300, -1e-17, math.inf, 5e-324, 1.0]
    errors = [None, 0.0, math.nan, math.inf, 1e-12, 1e6]
    blocks = []
    for i, value in enumerate(values):
        for j, error in enumerate(errors):
            figure = Figure(value, error)
            made = pair(figure, figure, figure)
            steps = dataclasses.replace(
                made.directions,
                length_ratio=figure,
                decrease=figure,
                best_decrease=figure,
                agreement=figure,
            )
            made = dataclasses.replace(
                made, frobenius_distance=figure, angles=(figure,) * 3, directions=steps
            )
            one = dataclasses.replace(
                spectrum(9), largest=(figure, figure), density=((value, value), (0.0, 1.0))
            )
            blocks.append(
                dataclasses.replace(
                    block(f"layer_{i}_{j}", 9, {EF: made}), spectra=dict.fromkeys(KINDS, one)
                )
            )
    return comparison(blocks)


PARTIAL = {
    "realistic": realistic,
    "sixty": lambda: realistic(60),
    "one layer": lambda: realistic(1),
    "nasty": nasty,
    "missing": missing,
    "odd": odd,
    "nothing": lambda: Comparison({}, ModelState(0, math.nan, None, None), (), 0.0),
    "notes only": lambda: comparison([], notes=("The first batch failed.",)),
    "no pairs": lambda: comparison([block("a", 9, {})]),
    "no whole network": lambda: comparison([block("a", 9, {EF: pair()}), block("b", 9, {})]),
    "no directions": lambda: comparison([block(WHOLE, 9, {EF: pair(directions=False)})]),
    "no spectra": lambda: comparison(
        [dataclasses.replace(block(WHOLE, 9, {EF: pair()}), spectra={}, structured={})]
    ),
    "exact": lambda: comparison([block(WHOLE, 9, {EF: pair(error=None)})]),
    "equal": lambda: comparison([block(WHOLE, 9, {EF: same()}), block("a", 9, {EF: same()})]),
}


@pytest.fixture(params=PARTIAL)
def partial(request):
    return PARTIAL[request.param]()


# --- HTML -----------------------------------------------------------------------------------------


def test_html_is_well_formed_and_needs_nothing_else(partial, tmp_path):
    text = page(partial, tmp_path)
    read = Reader(text)
    assert text.startswith("<!doctype html>")
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", text)
    assert read.attributes("src") == []
    for link in read.attributes("href"):
        assert link == "data:," or link[1:] in read.attributes("id")
    assert [tag for tag, _ in read.tags].count("script") == 1
    assert len(read.attributes("id")) == len(set(read.attributes("id")))
    assert "nan" not in re.findall(r"[a-z]+", read.text) and "None" not in read.text
    assert not re.search(r'[dxy]="[^"]*(nan|inf)', text), "a drawing has no such place"


def test_the_numbers_are_there(tmp_path):
    made = realistic()
    text = page(made, tmp_path)
    read = Reader(text)
    for expected in ("0.190 ± 0.016", "0.74 ± 0.03", "37.8° 34–41°", "2,048 examples", "79,444"):
        assert expected in read.text, expected
    for found in made.blocks:
        assert found.name in read.text
    for note in made.notes:
        assert note.replace("`", "") in read.text
    for version in ("0.10.2", "3.11.9", "float32", "kronecker, eigen_kronecker, diagonal"):
        assert version in read.text
    exact = page(comparison([block(WHOLE, 9, {EF: pair(0.25, error=None)})]), tmp_path)
    assert re.search(r"0\.2500\s*<", exact)


def test_every_summary_sentence_is_there(tmp_path):
    from curvature.comparison.words import summary

    made = realistic()
    text = Reader(page(made, tmp_path)).text
    for paragraph in summary(made):
        assert paragraph.replace("`", "") in text


def test_names_are_escaped(tmp_path):
    text = page(nasty(), tmp_path)
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text
    assert "<b>" not in text
    assert NASTY.replace("`", "") in Reader(text).text.replace("`", "")


def test_tables_can_be_sorted_and_read(tmp_path):
    read = Reader(page(realistic(), tmp_path))
    heads = [found for tag, found in read.tags if tag == "th" and found.get("scope") == "col"]
    assert heads and all(found["aria-sort"] == "none" for found in heads)
    assert [tag for tag, _ in read.tags].count("button") == len(heads)
    boxes = [found for _, found in read.tags if found.get("role") == "region"]
    assert all(found["tabindex"] == "0" and found["aria-label"] for found in boxes)
    drawings = [found for tag, found in read.tags if tag == "svg"]
    assert all(found.get("aria-label") or found.get("aria-hidden") for found in drawings)
    for value in read.attributes("data-sort"):
        assert value


def test_what_is_missing_is_a_dash(tmp_path):
    text = page(missing(), tmp_path)
    assert text.count('<span class="none">-</span>') > 20
    assert "<svg class=" not in re.sub(r'<svg class="(key|whisker)".*?</svg>', "", text)


def test_the_files_of_the_page_are_in_the_package():
    from importlib import resources

    folder = resources.files("curvature.comparison")
    for name in ("report.css", "report.js"):
        assert folder.joinpath(name).is_file()


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from browser import Browser

    opened = Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["realistic", "sixty", "nasty", "missing", "odd", "nothing"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_it_looks_right(browser, tmp_path, name, width, dark):
    page(PARTIAL[name](), tmp_path)
    browser.open(tmp_path / "report.html", width, dark=dark)
    browser.run("document.querySelectorAll('details').forEach((x) => { x.open = true; })")
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("innerWidth") == width
    paper, ink = (
        browser.run(f"getComputedStyle(document.body).{what}.match(/\\d+/g).map(Number)[0]")
        for what in ("backgroundColor", "color")
    )
    assert (paper < 60 and ink > 200) if dark else (paper > 240 and ink < 60)
    assert browser.complaints == []


@pytest.mark.slow
def test_a_click_sorts(browser, tmp_path):
    made = realistic()
    page(made, tmp_path)
    browser.open(tmp_path / "report.html")
    table = "document.querySelector('#directions table')"

    def column(index):
        return browser.run(
            f"[...{table}.tBodies[0].rows].map((row) => row.cells[{index}].dataset.sort)"
        )

    def click(index):
        browser.run(f"{table}.tHead.rows[0].cells[{index}].querySelector('button').click()")
        return browser.run(
            f"[...{table}.tHead.rows[0].cells].map((head) => head.getAttribute('aria-sort'))"
        )

    names, angles = column(0), column(1)
    assert names[0] == WHOLE and len(names) == 12
    assert click(1)[:3] == ["none", "ascending", "none"]
    assert column(1) == sorted(angles, key=float)
    assert click(1)[1] == "descending"
    assert column(1) == sorted(angles, key=float, reverse=True)
    assert click(0)[:2] == ["ascending", "none"]
    assert column(0)[0] == "block_0/conv_0/kernel"
    click(0)
    assert click(0)[0] == "none"
    assert column(0) == names
    # The keyboard: a button with the focus sorts at Enter.
    browser.run(f"{table}.tHead.rows[0].cells[2].querySelector('button').focus()")
    for kind in ("keyDown", "keyUp"):
        browser.call(
            "Input.dispatchKeyEvent",
            type=kind,
            key="Enter",
            code="Enter",
            text="\r",
            windowsVirtualKeyCode=13,
        )
    cosines = column(2)
    assert cosines == sorted(cosines, key=float)
    assert browser.complaints == []


@pytest.mark.slow
def test_missing_figures_sort_last(browser, tmp_path):
    blocks = [
        block("a", 9, {EF: pair(0.5)}),
        block("b", 9, {EF: pair(trace_ratio=NAN)}),
        block("c", 9, {EF: pair(0.1)}),
    ]
    page(comparison(blocks), tmp_path)
    browser.open(tmp_path / "report.html")
    table = "document.querySelector('#blocks table')"
    for expected in (["c", "a", "b"], ["a", "c", "b"]):
        browser.run(f"{table}.tHead.rows[0].cells[1].querySelector('button').click()")
        rows = f"[...{table}.tBodies[0].rows].map((row) => row.cells[0].dataset.sort)"
        assert browser.run(rows) == expected


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
        "decrease",
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
    assert realistic(2).plot(("fisher", "gauss_newton"), figure=left) is left
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
    assert lines[0] == "empirical_fisher against fisher"
    assert lines[2].split()[:4] == ["block", "entries", "trace", "ratio"]
    assert lines[4].startswith("whole network")
    assert "0.190 ± 0.016" in lines[4] and "38 ± 4°" in lines[4]
    assert "gauss_newton against fisher" in lines
    for found in made.blocks:
        assert sum(line.startswith(f"{found.name} ") for line in lines) == 2


def test_the_table_is_narrow(partial):
    lines = partial.table().split("\n")
    assert max(map(len, lines)) <= 100
    assert all(line == line.rstrip() and (line.isprintable() or not line) for line in lines)
    assert "nan" not in re.findall(r"[a-z]+", " ".join(lines))


def test_names_that_are_cut_can_still_be_told_apart():
    names = [f"encoder/{'very_' * 12}long_{i}/attention/query/kernel" for i in range(4)]
    made = comparison([block(name, 9, {EF: pair()}) for name in names], notes=())
    first = [line.split()[0] for line in made.table().splitlines()[4:]]
    assert len(set(first)) == 4


def test_nothing_to_compare():
    assert "no two kinds" in comparison([], notes=()).table()
