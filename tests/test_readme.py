"""The README's examples run as they are written."""

import pathlib
import re
import textwrap

import jax
import numpy as np
import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
TITLES = [re.search(r"^import (.*)$", e, re.M)[1][:30] + f" {i}" for i, e in enumerate(EXAMPLES)]


@pytest.mark.parametrize("example", EXAMPLES, ids=TITLES)
def test_example_runs(example, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # for those that write
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        scope = {"__name__": "readme"}
        exec(compile(textwrap.dedent(example), str(README), "exec"), scope)
    losses = [scope[name] for name in ("loss", "value") if isinstance(scope.get(name), jax.Array)]
    if "tx" in scope:
        assert len(losses) == 1 and np.isfinite(losses[0])
        assert float(losses[0]) < np.log(3)  # better than guessing: it was trained
    else:
        assert "w1" in capsys.readouterr().out


def test_there_is_an_example_for_every_framework():
    text = "\n".join(EXAMPLES)
    for needed in ("curvature_flax.linen", "curvature_flax.nnx", "curvature_haiku", "optax"):
        assert needed in text
