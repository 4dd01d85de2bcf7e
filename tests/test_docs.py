"""The documentation's site has every public name and page, its links lead somewhere, it builds."""

import collections
import importlib
import importlib.util
import inspect
import os
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree

import pytest

import curvature
import curvature.operators

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FENCE = re.compile(r"^( *)(```+).*?^\1\2$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
DIRECTIVE = re.compile(r"^::: (\S+)$", re.MULTILINE)
OWN = {"curvature.operators", "curvature_flax", "curvature_haiku"}
"""Modules whose introduction is shown, though no `__all__` names them."""


def read(page):
    return page.read_text(encoding="utf-8")


def prose(page):
    """A page without its blocks of code."""
    return FENCE.sub("", read(page))


def directives():
    return [name for page in (DOCS / "api").glob("*.md") for name in DIRECTIVE.findall(prose(page))]


def defined_in(name):
    """The public functions and classes that a module without `__all__` defines."""
    for key, value in vars(importlib.import_module(name)).items():
        own = inspect.isfunction(value) or inspect.isclass(value)
        if own and value.__module__ == name and not key.startswith("_"):
            yield f"{name}.{key}"


def public_names():
    top = {f"curvature.{name}" for name in curvature.__all__}
    names = set(top)
    for module in ("losses", "metrics", "proximal", "operators"):
        found = importlib.import_module(f"curvature.{module}").__all__
        names |= {f"curvature.{module}.{name}" for name in found}
    comparison = importlib.import_module("curvature.comparison")
    names |= {
        f"curvature.comparison.{name}"
        for name in comparison.__all__
        if getattr(curvature, name, None) is not getattr(comparison, name)
    }
    for module in ("curvature_flax.linen", "curvature_flax.nnx", "curvature_haiku"):
        names |= set(defined_in(module))
    return names


def test_the_reference_has_every_public_name_once():
    found = collections.Counter(directives())
    assert [name for name, times in found.items() if times > 1] == []
    assert sorted(set(found) - OWN) == sorted(public_names())
    assert set(found) >= OWN


def test_every_page_is_in_the_navigation_and_the_other_way_round():
    nav = read(ROOT / "mkdocs.yml").partition("\nnav:\n")[2]
    named = re.findall(r"[\w./-]+\.md$", nav, re.MULTILINE)
    assert len(named) == len(set(named))
    assert sorted(named) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


def slug(heading):
    """The anchor of a heading, as the repository's host and the site make it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


def anchors(page):
    text = prose(page)
    return {slug(x) for x in re.findall(r"^#+ (.+)$", text, re.MULTILINE)} | {
        *DIRECTIVE.findall(text)
    }


def dead(page):
    """The links of a page that lead nowhere."""
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.is_file() or (anchor and anchor not in anchors(file)):
            yield target


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *PAGES], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_links_lead_somewhere(page):
    assert list(dead(page)) == []
    assert "](/" not in prose(page)


def test_a_control_dead_links_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# Other\n\n## `kl_clip`, and more\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n\n[a](other.md#kl_clip-and-more) [b](#title) [c](other.md#less) [d](none.md)\n"
        "```text\n[e](none.md)\n```\n[f](https://example.org/none) [g](#other)\n"
    )
    assert list(dead(page)) == ["other.md#less", "none.md", "#other"]


def hooks():
    pytest.importorskip("latex2mathml", reason="the extra docs has it")
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "site_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_formula_is_drawn():
    found = [(page, *pair) for page in PAGES for pair in hooks().formulas(read(page))]
    assert len(found) > 100
    for page, formula, display in found:
        drawn = xml.etree.ElementTree.fromstring(hooks().mathml(formula, display))
        for element in drawn.iter():
            tag = element.tag.rpartition("}")[2]
            parts = {"mfrac": 2, "msub": 2, "msup": 2, "munder": 2, "mover": 2, "msubsup": 3}
            assert len(element) == parts.get(tag, len(element)), (page, formula)


def test_a_control_formulas():
    assert hooks().formulas("`$a$` $b_1$\n```\n$c$\n```\n$$d$$ costs $5 or $6") == [
        ("b_1", False),
        ("d", True),
    ]
    assert "<mfrac><mn>1</mn><mn>2</mn></mfrac>" in hooks().mathml(r"\frac12 v^\top")
    with pytest.raises(ValueError, match="unheardof"):
        hooks().mathml(r"\unheardof")


def test_links_out_of_the_documentation_are_text_on_the_site():
    text = "[`a.py`](../../scripts/a.py) [b](../b.md#c) ![d](../../d.png) [e](e.md)"
    assert hooks().within(text, "recipes") == "`a.py` [b](../b.md#c) ![d](../../d.png) [e](e.md)"
    assert hooks().within("[b](../b.md)", "") == "b"


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_fetches_nothing(tmp_path):
    for needed in ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed: the extra docs has it")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    built = sorted(tmp_path.rglob("*.html"))
    assert len(built) > len(PAGES) / 2
    for page in built:
        fetched = re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?(\w+:)?//", read(page)
        )
        assert fetched == [], page
