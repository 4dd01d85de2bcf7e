"""The large example: sizes, frameworks, meshes and processes by flags alone."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from transformer import command, config, mathematics, place, text

pytestmark = pytest.mark.usefixtures("standard_promotion")

SMALL = [
    "--model",
    "transformer",
    "--layers",
    "2",
    "--width",
    "16",
    "--heads",
    "4",
    "--context",
    "8",
]
SHORT = ["--steps", "4", "--record-every", "2", "--batch-size", "8", "--quiet"]


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [row[name] for row in rows(folder) for name in ("loss", "held_out")]


def trained(folder, *arguments):
    status = train.main([*SMALL, *SHORT, "--out", str(folder), *arguments])
    return status, json.loads((folder / "metrics.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("framework", "optimizer"), [("linen", "adamw"), ("nnx", "eigen_adam"), ("linen", "soap")]
)
def test_every_optimizer_trains_in_every_framework(tmp_path, framework, optimizer):
    status, found = trained(tmp_path, "--framework", framework, "--optimizer", optimizer)
    assert status == 0
    assert found["coverage"] == 1
    assert found["curve"] == rows(tmp_path)
    assert [row["step"] for row in found["curve"]] == [2, 4]
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("framework", command.MODELS)
@pytest.mark.parametrize("dtype", config.DTYPES)
def test_the_network_is_causal_and_shares_its_embedding(framework, dtype):
    net = config.Config(layers=2, width=16, context=8, dtype=dtype)
    init, apply = command.build(framework, net)
    params = init(jax.random.key(0))
    tokens = jnp.arange(16, dtype=jnp.int32).reshape(2, 8)
    logits = apply(params, tokens)
    assert logits.shape == (2, 8, 256)
    assert logits.dtype == jnp.float32
    other = apply(params, tokens.at[:, 5].set(200))
    np.testing.assert_array_equal(logits[:, :5], other[:, :5])
    assert not np.allclose(logits[:, 5:], other[:, 5:])
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    attention = 2 * 16 * 16 + 2 * 16 * 8
    assert size == 256 * 16 + 16 + 2 * (2 * 16 + attention + 3 * 16 * net.hidden)


def test_rotary_positions_make_products_depend_on_distances_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 6))
    turned = [mathematics.rotary(jnp.broadcast_to(x, (1, 9, 1, 6)))[0, :, 0] for x in (q, k)]
    products = turned[0] @ turned[1].T
    for distance in range(-3, 4):
        found = jnp.diagonal(products, distance)
        np.testing.assert_allclose(found, found[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(products[0, 0], jnp.sum(q * k), rtol=1e-5)


def test_every_window_is_seen_once_an_epoch():
    seen = np.concatenate([text.rows(40, 8, 0, step) for step in range(1, 6)])
    np.testing.assert_array_equal(np.sort(seen), np.arange(40))
    assert not np.array_equal(text.rows(40, 8, 0, 1), text.rows(40, 8, 0, 6))


def test_parameters_are_divided_along_both_axes():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(1, 2, 2), place.AXES)
    init, _ = command.build("linen", config.Config(width=16))
    specs = jax.tree.map(
        lambda x: tuple(x.spec),
        place.of_parameters(mesh, jax.eval_shape(init, jax.random.key(0))),
        is_leaf=lambda x: hasattr(x, "spec"),
    )
    assert specs["blocks"]["query"]["kernel"] == (None, "fsdp", "model")
    assert specs["blocks"]["down"]["kernel"] == (None, "model", "fsdp")
    assert specs["tokens"]["embedding"] == ("model", "fsdp")
    assert specs["blocks"]["norm_gated"]["scale"] == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "3"], "even width"),
        (["--kv-heads", "3"], "cannot share"),
        (["--mesh", "data=3"], "number of devices"),
        (["--mesh", "pipeline=2"], "not one of"),
        (["--batch-size", "100000"], "held out"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        train.main([*SMALL, "--quiet", "--out", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err


def started(folder, *arguments, devices=1):
    """A process of its own, with so many devices."""
    script = Path(train.__file__)
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    settings = {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    return subprocess.Popen(
        [sys.executable, script, *SMALL, *SHORT, "--out", folder, *arguments],
        env=os.environ | settings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(*processes, status=0):
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == status, errors


def several(folder, *arguments, status=0):
    """Two processes, one device each."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    joined = ("--coordinator", address, "--processes", "2")
    both = [started(folder, *joined, "--process", str(i), *arguments) for i in range(2)]
    finished(*both, status=status)


@pytest.mark.slow
def test_a_mesh_and_processes_train_as_one_device(tmp_path):
    """Also where two processes stop at a checkpoint, and one goes on from there."""
    one, mesh, two, resumed = (tmp_path / name for name in ("one", "mesh", "two", "resumed"))
    finished(started(one))
    apart = ("--gather", "updates")
    finished(started(mesh, "--mesh", "data=2,fsdp=2,model=2", *apart, devices=8))
    several(two)
    checkpoints = ("--checkpoint-every", "2")
    several(resumed, *checkpoints, *apart, "--stop-after", "2", status=1)
    finished(started(resumed, *checkpoints, *apart, "--resume"))
    expected = losses(one)
    assert len(expected) == 4
    for folder in (mesh, two, resumed):
        np.testing.assert_allclose(losses(folder), expected, rtol=1e-4)
