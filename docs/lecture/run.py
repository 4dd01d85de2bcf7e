"""Runs the pages whose code is a program, and leaves their pictures next to them.

    python docs/lecture/run.py [PAGE.md ...] [--out DIR]

These are the pages of the lecture, `docs/empirical-fisher.md` and `docs/compare.md`. The code
blocks of a page are one program, with assertions for every number the text states.
`tests/test_lecture.py` runs them all.
"""

import argparse
import contextlib
import pathlib
import re
import shutil
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PICTURE = re.compile(r"!\[[^\]]+\]\(([^)]+)\)")


def pages():
    """The lecture's pages in alphabetical order, then the others; the last is a user's guide."""
    lecture = sorted(page for page in HERE.glob("*.md") if page.name != "README.md")
    return [*lecture, HERE.parent / "empirical-fisher.md", HERE.parent / "compare.md"]


def pictures(page):
    """The page's pictures, as it names them: paths from its own folder."""
    return set(PICTURE.findall(page.read_text(encoding="utf-8")))


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
    """Runs a page; its pictures go to the folder `out`, and nothing else that it writes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for name in map(pathlib.Path, pictures(page)):
            name.parent.mkdir(parents=True, exist_ok=True)
        exec(program(page), {"__name__": page.stem})
        for picture in pathlib.Path().rglob("*.png"):
            (out / picture).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, out / picture)
    plt.close("all")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", type=pathlib.Path, help="all of them by default")
    parser.add_argument("--out", type=pathlib.Path, help="folder of the pictures; the page's own")
    options = parser.parse_args()
    for page in options.pages or pages():
        out = (options.out or page.parent).resolve()
        out.mkdir(parents=True, exist_ok=True)
        run(page.resolve(), out)
        print(page.name)


if __name__ == "__main__":
    main()
