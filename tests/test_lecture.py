"""The pages that are programs run, their assertions hold, and the repository has their pictures."""

import importlib.util
import os
import pathlib
import re

import jax
import pytest

LECTURE = pathlib.Path(__file__).parents[1] / "docs" / "lecture"
LIMIT = 150_000  # bytes a picture

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")


def load_runner():
    spec = importlib.util.spec_from_file_location("lecture_run", LECTURE / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runner = load_runner()
PAGES = runner.pages()
*LESSONS, GUIDE = PAGES
pictures = runner.pictures


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


SLOW = ("compare", "empirical-fisher", "tanh_and_sigmoid", "true_and_empirical_fisher")


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.slow] if p.stem in SLOW else [], id=p.stem) for p in PAGES],
)
def test_page_runs_and_draws_its_pictures(page, tmp_path):
    with jax.numpy_dtype_promotion("standard"):  # as its readers have it
        runner.run(page, tmp_path)
    assert files(tmp_path) == pictures(page)
    for name in pictures(page):
        assert 0 < (page.parent / name).stat().st_size < LIMIT
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists()


@pytest.mark.parametrize("page", LESSONS, ids=lambda page: page.stem)
def test_page_is_listed_and_has_the_parts_of_a_page(page):
    link = pathlib.Path(os.path.relpath(page, LECTURE)).as_posix()
    assert f"({link})" in (LECTURE / "README.md").read_text(encoding="utf-8")
    text = page.read_text(encoding="utf-8")
    for part in ("## What to learn", "## The formula", "## The code", "## What it shows", "assert"):
        assert part in text


def test_there_are_pages_and_no_stray_pictures():
    assert len(PAGES) == 7
    shown = {page.parent / name for page in PAGES for name in pictures(page)}
    folders = (LECTURE.parent / page.stem for page in PAGES if page.parent != LECTURE)
    assert {*LECTURE.glob("*.png"), *(path for f in folders for path in f.iterdir())} == shown


def test_a_control_a_wrong_number_in_a_page_is_an_error(tmp_path):
    page = tmp_path / "wrong.md"
    page.write_text("# Title\n\n```python\nx = 1\n```\n\nText\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as raised:
        runner.run(page, tmp_path)
    assert raised.traceback[-1].lineno + 1 == 10  # where it stands in the page
