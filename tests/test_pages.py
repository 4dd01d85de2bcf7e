"""The code in the pages of docs/ runs as it is written."""

import pathlib
import re

import jax
import numpy as np
import pytest

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGES = ["physics.md", "examples.md"]
BLOCKS = [
    pytest.param(page, i, id=f"{page}-{i}")
    for page in PAGES
    for i in range(len(re.findall(r"```python\n", (DOCS / page).read_text())))
]


@pytest.mark.parametrize(("page", "number"), BLOCKS)
def test_block_runs(page, number):
    """By itself; what it ends with are finite updates that are not zero."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        scope = {"__name__": page}
        exec(compile(blocks[number], str(DOCS / page), "exec"), scope)
    leaves = jax.tree.leaves(scope["updates"])
    assert all(np.isfinite(x).all() for x in leaves) and any(np.any(x != 0) for x in leaves)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", (DOCS / page).read_text()):
        assert (DOCS / target).exists(), target
