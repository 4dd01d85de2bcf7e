"""README and the pages of docs/ run as they are written, and what they train learns.

The pages that `docs/lecture/run.py` runs have a test of their own, tests/test_lecture.py.
"""

import ast
import importlib.util
import math
import pathlib
import re

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LOSSES = ("loss", "value")
"""What a page calls the loss of its latest step."""
CHANCE = math.log(3)
"""The loss of guessing, on the three classes of the first pages."""
FIRST = {"README.md", *(f"docs/start/{name}.md" for name in ("jax", "linen", "nnx", "haiku"))}

SLOW = {"docs/physics.md", "docs/training.md"}
"""Those that compile many optimizers."""


def lecture():
    spec = importlib.util.spec_from_file_location("lecture_run", ROOT / "docs/lecture/run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return set(module.pages())


def pages():
    found = {ROOT / "README.md", *(ROOT / "docs").rglob("*.md")} - lecture()
    return sorted(page for page in found if BLOCK.search(page.read_text(encoding="utf-8")))


class Recorder(ast.NodeTransformer):
    """Notes every value that a loss gets outside of functions."""

    def visit_FunctionDef(self, node):
        return node

    def visit_Assign(self, node):
        names = [x.id for target in node.targets for x in ast.walk(target) if _is_loss(x)]
        notes = [ast.parse(f"_note_({name!r}, {name})").body[0] for name in names]
        return [node, *(ast.copy_location(note, node) for note in notes)]


def _is_loss(node):
    return isinstance(node, ast.Name) and node.id in LOSSES and isinstance(node.ctx, ast.Store)


def run(page):
    """Runs a page as one program, on its own line numbers.

    Returns:
      The scope at the end, and of every block the values of the losses, by name.
    """
    text = page.read_text(encoding="utf-8")
    history, scope = [], {"__name__": page.stem}
    for block in BLOCK.finditer(text):
        values = {name: [] for name in LOSSES}

        def note(name, value, values=values):
            if isinstance(value, jax.Array | float):
                values[name].append(float(value))

        before = scope.get("updates")
        code = "\n" * text.count("\n", 0, block.start(1)) + block[1]
        tree = ast.fix_missing_locations(Recorder().visit(ast.parse(code)))
        scope["_note_"] = note
        exec(compile(tree, str(page), "exec"), scope)
        history.append({name: found for name, found in values.items() if found})
        if scope.get("updates") is not before:
            leaves = jax.tree.leaves(scope["updates"])
            assert all(np.isfinite(x).all() for x in leaves) and any(np.any(x != 0) for x in leaves)
    return scope, history


def check(history):
    """Every block that takes steps ends below the loss of its first; how many there are."""
    trained = 0
    for block in history:
        for name, values in block.items():
            assert np.isfinite(values).all(), (name, values)
            if len(values) > 1:
                trained += 1
                assert values[-1] < values[0], (name, values)
    return trained


def tables(text):
    """The coverage tables in a text, as words; lines of code are left out, they move."""
    found = re.findall(r"^parameter .*?in structured blocks\.$", text, re.DOTALL | re.MULTILINE)
    return [re.sub(r" at \S+:\d+", "", re.sub(r"\s+", " ", table)) for table in found]


@pytest.fixture(autouse=True)
def reader(monkeypatch, tmp_path):
    """A folder for pages that write, and JAX's own settings, which readers have."""
    monkeypatch.chdir(tmp_path)
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


def cases():
    names = [(page, page.relative_to(ROOT).as_posix()) for page in pages()]
    slow = pytest.mark.slow
    return [pytest.param(page, id=n, marks=[slow] if n in SLOW else []) for page, n in names]


@pytest.mark.parametrize("page", cases())
def test_page_runs_and_what_it_trains_learns(page, capsys):
    _, history = run(page)
    trained, printed = check(history), capsys.readouterr().out
    assert set(tables(page.read_text(encoding="utf-8"))) <= set(tables(printed))
    if page.relative_to(ROOT).as_posix() in FIRST:
        *_, last = (values[-1] for block in history for values in block.values())
        assert trained and last < CHANCE  # better than guessing
        assert tables(printed)


@pytest.mark.parametrize("devices", [1, 4])
def test_the_step_on_a_mesh_compiles_once(devices, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    scope, _ = run(ROOT / "docs/recipes/meshes.md")
    assert scope["mesh"].size == devices
    assert scope["step"]._cache_size() == scope["mapped_step"]._cache_size() == 1


def test_there_is_a_first_page_for_every_framework():
    found = {page.relative_to(ROOT).as_posix() for page in pages()}
    assert found >= FIRST
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in FIRST)
    for needed in ("curvature_flax.linen", "curvature_flax.nnx", "curvature_haiku", "optax"):
        assert needed in text


CONTROL = """# Title

```python
import jax.numpy as jnp
loss = jnp.asarray(1.0)
```

```python
for i in range(3):
    loss = loss {sign} 0.1
```
"""


def test_a_control_a_page_whose_loss_rises_or_is_not_finite_fails(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(CONTROL.format(sign="-"))
    assert check(run(page)[1]) == 1
    for sign, values in (("+", "1.1"), ("* jnp.nan +", "nan")):
        page.write_text(CONTROL.format(sign=sign))
        with pytest.raises(AssertionError, match=values):
            check(run(page)[1])


def test_a_control_updates_of_zero_fail_and_errors_point_into_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        '# Title\n\n```python\nimport jax.numpy as jnp\nupdates = {"w": jnp.zeros(2)}\n```\n'
    )
    with pytest.raises(AssertionError):
        run(page)
    page.write_text("# Title\n\n```python\nx = 1\n```\n\nText\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as raised:
        run(page)
    assert raised.traceback[-1].lineno + 1 == 10
