"""The HTML report of a comparison, also of what is left of a partial one."""

import html.parser
import re

import pytest
from comparisons import EF, NAN, NASTY, PARTIAL, block, comparison, missing, nasty, pair, realistic

from curvature.comparison.result import WHOLE
from curvature.report.markup import prose

VOID = {"meta", "link", "br", "wbr"}


class Reader(html.parser.HTMLParser):
    """Checks that tags are balanced and keeps what they say."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.unfolded = [], [], [], []
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
            if "details" not in self.open:
                self.unfolded.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.words))

    def attributes(self, name):
        return [found[name] for _, found in self.tags if name in found]


def page(made, tmp_path):
    path = tmp_path / "report.html"
    made.save_html(path)
    return path.read_text(encoding="utf-8")


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
    assert "nan" not in re.findall(r"[a-z]+", read.text) and "None" not in read.text.replace(
        "=None", ""
    )
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
    from curvature.report.words import summary

    made = realistic()
    text = Reader(page(made, tmp_path)).text
    for paragraph in summary(made):
        plain = re.sub(r"e-(\d+)", r" × 10−\1", paragraph).replace("`", "")
        assert plain in text


def test_pairs_without_the_reference_are_folded_away(tmp_path):
    other = ("empirical Fisher", "Gauss-Newton")
    pairs = {EF: pair(0.25), ("Fisher", "Gauss-Newton"): pair(2.0), other: pair(8.0)}
    text = page(comparison([block(WHOLE, 90, pairs), block("a", 9, pairs)]), tmp_path)
    shown = "".join(Reader(text).unfolded)
    for told in ("Empirical Fisher against true Fisher", "Gauss-Newton matrix against true Fisher"):
        assert told in shown
    assert "against empirical Fisher" not in shown and "8.0 times" not in shown
    folds = re.findall(r"<details[^>]*><summary>(.*?)</summary>", text)
    told = [fold for fold in folds if Reader(fold).text.endswith("against empirical Fisher")]
    assert len(told) == 4  # the summary, the matrices, directions, angles
    assert "8.0 times larger than the empirical Fisher" in Reader(text).text


def test_nothing_is_said_of_samples_where_none_are_drawn(tmp_path):
    assert "sampling error" in Reader(page(realistic(2), tmp_path)).text
    made = comparison([block(WHOLE, 9, {EF: pair()}, kinds=["empirical Fisher"])])
    assert "sampling error" not in Reader(page(made, tmp_path)).text


def test_a_sentence_is_typeset():
    assert prose("off -5 ± 10 % (-2.0e-05) by `a-1`") == (
        "off −5\u00a0±\u00a010\u00a0% (−2.0\u00a0×\u00a010<sup>−5</sup>) by <code>a-1</code>"
    )


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

    folder = resources.files("curvature.report")
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
