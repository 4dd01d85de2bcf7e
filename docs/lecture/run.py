"""Runs the pages of the lecture, and leaves their pictures next to them.

    python docs/lecture/run.py [PAGE.md ...] [--out DIR]

The code blocks of a page are one program, with assertions for every number the text states.
`tests/test_lecture.py` runs them all.
"""

import argparse
import contextlib
import pathlib
import re

HERE = pathlib.Path(__file__).resolve().parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def pages():
    """All pages, in alphabetical order."""
    return sorted(page for page in HERE.glob("*.md") if page.name != "README.md")


def program(page):
    """The page's code, on the page's own line numbers, so that errors point into the page."""
    text = page.read_text(encoding="utf-8")
    lines = [""] * (text.count("\n") + 1)
    for block in BLOCK.finditer(text):
        first = text.count("\n", 0, block.start(1))
        code = block[1].splitlines()
        lines[first : first + len(code)] = code
    return compile("\n".join(lines), str(page), "exec")


def run(page, out):
    """Runs a page; its pictures go to the folder `out`. Returns the names it has defined."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scope = {"__name__": page.stem}
    with contextlib.chdir(out):
        exec(program(page), scope)
    plt.close("all")
    return scope


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", type=pathlib.Path, help="all of them by default")
    parser.add_argument("--out", type=pathlib.Path, default=HERE, help="folder of the pictures")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for page in options.pages or pages():
        run(page.resolve(), options.out)
        print(page.name)


if __name__ == "__main__":
    main()
