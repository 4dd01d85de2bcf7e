"""What a release holds, and what it says of itself."""

import ast
import datetime
import email
import functools
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import textwrap
import tomllib
import zipfile

import pytest
import yaml

import curvature

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
CACHES = {"__pycache__", ".hypothesis", ".ipynb_checkpoints", ".DS_Store"}


def run(*arguments, cwd, **environment):
    """Runs this Python, without the folder it runs in on its path."""
    done = subprocess.run(
        [sys.executable, "-P", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def files(folder, root=ROOT):
    """All files below a folder, but for caches, as the archives name them."""
    found = (path.relative_to(root) for path in (root / folder).rglob("*") if path.is_file())
    return {path.as_posix() for path in found if not CACHES.intersection(path.parts)}


# What is built ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the wheel and the sdist, built without a network."""
    folder = tmp_path_factory.mktemp("dist")
    run("-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_the_import_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    information = f"curvature-{curvature.__version__}.dist-info"
    packages = {name for name in names if not name.startswith(information)}
    adapters = [files(name, ROOT / "adapters") for name in ("curvature_flax", "curvature_haiku")]
    assert packages == files("curvature").union(*adapters)
    for package in ("curvature", "curvature_flax", "curvature_haiku"):
        assert f"{package}/py.typed" in packages
    assert {"curvature/report/report.css", "curvature/report/report.js"} <= packages
    assert names - packages == {
        f"{information}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")
    }


@pytest.mark.slow
def test_the_wheel_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_bytes(archive.read(path))
    assert metadata["Name"] == "curvature"
    assert metadata["Version"] == curvature.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == PROJECT["project"]["requires-python"]
    assert set(metadata.get_all("Provides-Extra")) == set(EXTRAS)
    assert metadata.get_payload().startswith("# ")  # the README


@pytest.mark.slow
def test_the_sdist_holds_what_the_tests_read(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in (".ci", "adapters", "curvature", "docs", "scripts", "tests"):
        assert not files(folder) - names
    for name in (
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "LICENSE",
        "README.md",
        "mkdocs.yml",
        "pyproject.toml",
        "requirements.lock",
    ):
        assert name in names


STEP = """
    import pathlib, jax, jax.numpy as jnp, curvature

    def loss_fn(params, x, y):
        return curvature.losses.l2_loss(jnp.tanh(x @ params["w"]) @ params["v"], y).mean()

    params = {"w": jnp.ones((3, 2)), "v": jnp.ones((2, 1))}
    x, y = jnp.arange(12.0).reshape(4, 3), jnp.ones((4, 1))
    tx = curvature.kfac(curvature.register(loss_fn, params, x, y), 0.1)
    grads = jax.grad(loss_fn)(params, x, y)
    updates, _ = tx.update(
        grads, tx.init(params), params, loss_args=(x, y), key=jax.random.key(0)
    )
    assert all(jnp.isfinite(u).all() and jnp.any(u != 0) for u in jax.tree.leaves(updates))
    print(pathlib.Path(curvature.__file__).parents[1])
    """


@pytest.mark.slow
def test_what_the_wheel_installs_takes_a_step(wheel, tmp_path):
    options = ["--quiet", "--no-index", "--no-deps", "--disable-pip-version-check"]
    run("-m", "pip", "install", *options, "--target", tmp_path, wheel, cwd=tmp_path)
    out = run("-c", textwrap.dedent(STEP), cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert pathlib.Path(out.strip()) == tmp_path  # and not the checkout


# What it says of itself ---------------------------------------------------------------------------


def latest():
    """Version and date of the changelog's first heading after "Unreleased"."""
    headings = re.findall(r"^## \[(.+?)\](?: - (.*))?$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == ("Unreleased", "")
    return headings[1]


def test_the_version_is_the_same_everywhere():
    """`pyproject.toml` takes it from `curvature/__init__.py`."""
    assert "version" not in PROJECT["project"]
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "curvature/__init__.py"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    version, date = latest()
    assert curvature.__version__ == version == str(citation["version"])
    assert date == citation["date-released"] == str(datetime.date.fromisoformat(date))


def test_the_citation_says_who_what_and_under_which_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = PROJECT["project"]
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["message"] and citation["title"]
    assert citation["authors"] == project["authors"]
    assert citation["license"] == project["license"]
    assert citation["keywords"] == project["keywords"]


# Extras -------------------------------------------------------------------------------------------

IMPORTED_AS = {
    "dm-haiku": "haiku",
    "orbax-checkpoint": "orbax",
    "pytest-xdist": "xdist",
    "scikit-learn": "sklearn",
}
AREAS = {
    "checkpoint": ["scripts", "tests"],
    "flax": ["adapters/curvature_flax"],
    "haiku": ["adapters/curvature_haiku"],
    "operators": ["curvature/operators"],
    "report": ["curvature/report", "curvature/comparison"],
    "examples": ["scripts"],
    "docs": [],
    "test": ["tests"],
}
COMMANDS = {  # what is run, and not imported: where the command stands
    "hatchling": ("scripts/environment.sh", "--no-build-isolation"),
    "latex2mathml": ("docs/site_hooks.py", "from latex2mathml"),
    "mkdocs": ("mkdocs.yml", "mkdocs build"),
    "mkdocs-material": ("mkdocs.yml", "name: material"),
    "mkdocstrings-python": ("mkdocs.yml", "default_handler: python"),
    "mypy": ("scripts/test", "-m mypy"),
    "pytest-xdist": ("scripts/test", "--dist worksteal"),
    "ruff": ("scripts/test", "-m ruff"),
}


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement)[0]


@functools.cache
def roots(path):
    """The top-level packages that a file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found


def imported(*folders):
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return set().union(*map(roots, paths))


def used(requirement, folders):
    name = name_of(requirement)
    if name in COMMANDS:
        path, command = COMMANDS[name]
        return command in (ROOT / path).read_text()
    return IMPORTED_AS.get(name, name) in imported(*folders)


def test_every_extra_has_its_area():
    assert set(AREAS) == set(EXTRAS)


@pytest.mark.parametrize("extra", AREAS)
def test_an_extra_names_only_what_is_used_there(extra):
    names = [name for name in EXTRAS[extra] if name_of(name) != "curvature"]
    assert not [name for name in names if not used(name, AREAS[extra])]


def test_every_dependency_is_used():
    names = {name_of(requirement) for requirement in PROJECT["project"]["dependencies"]}
    assert names - imported("curvature") == {"jaxlib"}  # jax's other half, of the same version


def test_a_control_what_is_not_imported_is_found():
    assert not used("torch>=2", ["curvature", "scripts"])


WITHOUT = [  # package, the extra that brings it, code that meets its absence
    ("flax", "flax", "import curvature_flax.linen"),
    ("flax", "flax", "import curvature_flax.nnx"),
    ("haiku", "haiku", "import curvature_haiku"),
    ("lineax", "operators", "import curvature.operators"),
    ("matfree", "operators", "import curvature.operators"),
    ("matplotlib", "report", "from curvature.report import plots; plots.plot(None)"),
    ("matplotlib", "report", "from curvature.report.history_plot import plot; plot([], 'kind')"),
    (
        "tqdm",
        "report",
        "import importlib; importlib.import_module('curvature.comparison.compare')._bar(True)",
    ),
]


def test_every_optional_import_is_met_below():
    ours = {"curvature", "curvature_flax", "curvature_haiku"}
    always = {*ours, "jax", "numpy", "optax", *sys.stdlib_module_names}
    assert imported("curvature", "adapters") - always == {package for package, _, _ in WITHOUT}


@pytest.mark.parametrize(("package", "extra", "code"), WITHOUT)
def test_without_its_extra_an_error_names_it(package, extra, code):
    program = f"""
    import sys
    sys.modules[{package!r}] = None
    try:
        {code}
    except ImportError as error:
        print(error)
    """
    paths = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
    out = run("-c", textwrap.dedent(program), cwd=ROOT, PYTHONPATH=paths)
    assert package in out and f"curvature[{extra}]" in out


# What `import curvature` costs --------------------------------------------------------------------

COST = """
    import sys, time
    start = time.process_time()
    import jax, optax
    half, before = time.process_time(), set(sys.modules)
    import curvature
    end = time.process_time()
    ours = ("curvature", "jax.ad_checkpoint")  # the latter is a public name and one small file
    new = {name for name in set(sys.modules) - before if not name.startswith(ours)}
    print((end - start) / (half - start))
    print(*sorted(name for name in new if name.partition(".")[0] not in sys.stdlib_module_names))
    """


def test_importing_it_imports_nothing_beyond_jax_and_optax(record_property):
    """A time is no gate: it is noted. With all files compiled 1.22 on Python 3.11, 1.13 on 3.13."""
    out = run("-c", textwrap.dedent(COST), cwd=ROOT, PYTHONPATH=str(ROOT)).splitlines()
    record_property("time beside that of `import jax, optax`", out[0])
    assert out[1] == ""
