"""The backend stands alone: no framework is imported, and unstable JAX in one file only."""

import ast
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parent.parent
BACKEND = sorted((ROOT / "curvature").rglob("*.py"))
ADAPTERS = sorted((ROOT / "adapters").rglob("*.py"))
FRAMEWORKS = ("flax", "haiku", "curvature_flax", "curvature_haiku")
OF_EXTRAS = ("lineax", "matfree", "equinox", "matplotlib")  # not imported by `import curvature`
UNSTABLE = re.compile(r"\bjax\s*\.\s*(_src|extend|interpreters)\b")
UNSTABLE_IMPORT = re.compile(r"^(jax\._src|jax\.extend|jax\.interpreters|jaxlib)(\.|$)")
THE_FILE = ROOT / "curvature" / "_jax.py"


def run(code):
    """Runs code in a fresh interpreter, from the root of the checkout."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


WITHOUT_FRAMEWORKS = f"""
    import sys
    for name in {FRAMEWORKS}:
        sys.modules[name] = None  # importing it raises ModuleNotFoundError
    """


def test_the_backend_works_where_no_framework_can_be_imported():
    """Import, registration and one step; whatever tried to import a framework would raise."""
    done = run(
        WITHOUT_FRAMEWORKS
        + """
    import jax, jax.numpy as jnp, curvature

    def loss_fn(params, x, y):
        z = jnp.tanh(x @ params["w"]) @ params["v"]
        return curvature.losses.l2_loss(z, y).mean()

    params = {"w": jnp.ones((3, 2)), "v": jnp.ones((2, 1))}
    x, y = jnp.arange(12.0).reshape(4, 3), jnp.ones((4, 1))
    registry = curvature.register(loss_fn, params, x, y)
    assert registry.coverage == 1.0
    tx = curvature.kfac(registry, 0.1)
    grads = jax.grad(loss_fn)(params, x, y)
    tx.update(grads, tx.init(params), params, loss_args=(x, y), key=jax.random.key(0))
    loaded = sorted(name for name, module in sys.modules.items() if module is not None)
    print("\\n".join(loaded))
    """
    )
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert "curvature.optimizer.kfac" in loaded
    assert not [name for name in loaded if name.partition(".")[0] in (*FRAMEWORKS, *OF_EXTRAS)]


def test_without_their_extra_the_operators_say_what_to_install():
    done = run("import sys; sys.modules['matfree'] = None; import curvature.operators")
    assert done.returncode != 0
    assert "curvature.operators needs matfree" in done.stderr
    assert "install the extra 'curvature[operators]'" in done.stderr


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_control_frameworks_cannot_be_imported_there(name):
    pytest.importorskip(name)
    done = run(WITHOUT_FRAMEWORKS + f"\n    import {name}\n")
    assert done.returncode != 0
    assert "ModuleNotFoundError" in done.stderr


def imports(source):
    """The full names of all modules a file imports, wherever the import stands."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def short(path):
    return str(path.relative_to(ROOT))


def test_there_are_files_to_look_at():
    assert THE_FILE in BACKEND
    assert len(BACKEND) > 10
    assert len(ADAPTERS) >= 3


@pytest.mark.parametrize("path", BACKEND, ids=short)
def test_the_backend_imports_no_framework(path):
    roots = {name.partition(".")[0] for name in imports(path.read_text())}
    assert not roots.intersection(FRAMEWORKS)


@pytest.mark.parametrize("path", [p for p in BACKEND + ADAPTERS if p != THE_FILE], ids=short)
def test_only_one_file_touches_what_jax_does_not_promise(path):
    source = path.read_text()
    assert not [name for name in imports(source) if UNSTABLE_IMPORT.match(name)]
    assert not UNSTABLE.search(source)


@pytest.mark.parametrize(
    "code",
    [
        "import jax.extend.core",
        "from jax.interpreters import ad",
        "from jax import extend",
        "from jax._src import core",
        "def f():\n    from jax._src.core import Primitive",
        "import jax\nx = jax._src.core",
        "import jax\nx = jax.interpreters.ad",
    ],
)
def test_a_control_the_search_finds_unstable_names(code):
    found = [name for name in imports(code) if UNSTABLE_IMPORT.match(name)]
    assert found or UNSTABLE.search(code)


def test_a_control_the_one_file_does_touch_them():
    source = THE_FILE.read_text()
    assert [name for name in imports(source) if UNSTABLE_IMPORT.match(name)]


SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))
LATE = "curvature.comparison.presentation"  # a result shows itself by what reads results


def module(path):
    """Its name in an import."""
    start = next(x for x in (ROOT / "adapters", ROOT / "scripts", ROOT) if path.is_relative_to(x))
    parts = path.relative_to(start).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


ORDER = {
    "": [
        "examples",
        "_jax",
        "trees",
        "text",
        "meshes",
        "precision",
        "losses",
        "metrics",
        "proximal",
        "linalg",
        "sides",
        "blocks",
        "trace",
        "block_diagonal",
        "statistics",
        "dataset",
        "operators",
        "optimizer",
        "comparison",
        "report",
    ],
    "trace": [
        "ranges",
        "tags",
        "views",
        "layouts",
        "program",
        "environment",
        "constants",
        "reasons",
        "liveness",
        "batch_axis",
        "mixing",
        "terms",
        "layers",
        "grouping",
        "overrides",
        "rules",
        "loops",
        "weights",
        "products",
        "respell",
        "interpreter",
        "table",
        "analysis",
        "registry",
        "outputs",
    ],
    "optimizer": [
        "adaptive",
        "quadratic",
        "arguments",
        "uncovered",
        "objective",
        "decay",
        "grafting",
        "moments",
        "refresh",
        "options",
        "averaging",
        "shampoo",
        "preconditioner",
        "scale_by_curvature",
        "eigenbasis",
        "descent",
        "kfac",
        "eigen_adam",
        "progress",
        "placement",
        "checkpoint",
    ],
}


@pytest.mark.parametrize("folder", ORDER)
def test_imports_run_downward_only(folder):
    """A lower layer knows nothing of a higher one; see the picture in docs/architecture.md."""
    depth, order = 1 + bool(folder), ORDER[folder]
    for path in BACKEND:
        parts = ["curvature", *path.relative_to(ROOT / "curvature").with_suffix("").parts]
        inside = parts[1:depth] == [folder][: depth - 1] and parts[depth] != "__init__"
        if not inside or module(path) == LATE:
            continue
        assert parts[depth] in order, f"{parts[depth]} is new: give it a place in this list"
        for name in imports(path.read_text()):
            found = name.split(".")
            if found[:depth] == parts[:depth] and len(found) > depth:
                later = order.index(found[depth]) > order.index(parts[depth])
                assert not later, f"{short(path)} imports {name}"


def modules_of(source, known):
    """The modules of ours that a file imports, wherever the import stands."""
    found = set()
    for name in imports(source):
        found |= {name if name in known else name.rpartition(".")[0]} & known
    return found


def circle(graph):
    """A chain of imports that comes back to where it starts; None if there is none."""
    done = set()

    def walk(name, chain):
        if name in chain:
            return [*chain[chain.index(name) :], name]
        if name in done:
            return None
        for other in sorted(graph[name]):
            if found := walk(other, [*chain, name]):
                return found
        done.add(name)
        return None

    return next((found for name in graph if (found := walk(name, []))), None)


def test_no_imports_run_in_a_circle():
    paths = {module(path): path for path in BACKEND + ADAPTERS + SCRIPTS}
    graph = {name: modules_of(path.read_text(), set(paths)) for name, path in paths.items()}
    assert any("report" in name for name in graph.pop(LATE))  # or it may be in the test as well
    graph[LATE] = set()
    assert circle(graph) is None


def test_a_control_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None
