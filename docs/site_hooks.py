"""What the site does to the pages: formulas are drawn, links out of the documentation are text.

Formulas are MathML, which browsers draw by themselves: no script, no fonts.
"""

import posixpath
import re

from latex2mathml.converter import convert

FORMULA = re.compile(
    r"^( *)(?P<fence>```+).*?^\1(?P=fence)$"  # code stays as it is
    r"|(?P<ticks>`+).+?(?P=ticks)"
    r"|\$\$(?P<display>.+?)\$\$"
    r"|(?<![\\$\w])\$(?P<inline>[^\s$](?:[^$\n]*[^\s$\\])?(?:\n[^$\n]+)?)\$(?!\w)",
    re.DOTALL | re.MULTILINE,
)


def mathml(formula: str, display: bool = False) -> str:
    """A formula in LaTeX as a `<math>` element.

    Raises:
      ValueError: it uses a command that is not known.
    """
    drawn: str = convert(formula, display="block" if display else "inline")
    if "\\" in drawn:
        raise ValueError(f"A command in ${formula}$ is not known: {drawn}")
    return drawn


def formulas(text: str) -> list[tuple[str, bool]]:
    """The formulas of a page, and whether each has a line of its own."""
    found = FORMULA.finditer(text)
    pairs = ((m["display"] or m["inline"], bool(m["display"])) for m in found)
    return [(formula, display) for formula, display in pairs if formula]


LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s:]+)\)")


def within(text: str, folder: str) -> str:
    """A page whose links to files outside of the documentation are their text.

    They lead to programs, which the repository's host shows and the site does not have.
    """

    def plain(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[2].partition("#")[0]))
        return link[1] if path.startswith("..") else link[0]

    return LINK.sub(plain, text)


_pages: dict[str, list[str]] = {}


def on_page_markdown(markdown: str, page, **kwargs) -> str:
    """Takes the formulas out, so that Markdown does not read them."""
    kept = _pages[page.file.src_uri] = []

    def take(match: re.Match[str]) -> str:
        formula = match["display"] or match["inline"]
        if not formula:
            return match[0]
        kept.append(mathml(formula, bool(match["display"])))
        return f"⟦{len(kept) - 1}⟧"

    folder = posixpath.dirname(page.file.src_uri)
    return within(FORMULA.sub(take, markdown), folder)


def on_page_content(content: str, page, **kwargs) -> str:
    """Puts them back."""
    kept = _pages.pop(page.file.src_uri)
    return re.sub(r"⟦(\d+)⟧", lambda match: kept[int(match[1])], content)
