"""The physics examples run, and what they say is so."""

import jax
import numpy as np
import pytest

import curvature
from examples import pinn, vmc


def png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_helium(tmp_path, standard_promotion, optimised):
    """Natural gradient is near the exact energy, and before Adam is at its lowest rate."""
    arguments = ["--out", str(tmp_path), "--steps", "240", "--walkers", "400"]
    results = vmc.main(arguments)
    ours = results.pop("K-FAC 0.03")
    assert png(tmp_path / "energy.png") and (tmp_path / "results.json").exists()
    assert abs(ours["end"]) < 0.01
    assert abs(ours["early"]) < 0.5 * results["Adam 0.001"]["early"]


def test_the_local_energy(standard_promotion):
    """Against finite differences of psi, in float64."""
    x = jax.random.normal(jax.random.key(0), (5, 2, 3))
    params = jax.tree.map(lambda w: w.astype(x.dtype) + 0.1, vmc.init(jax.random.key(0)))
    step, psi = 1e-4, lambda x: np.exp(vmc.log_psi(params, x))
    total = 0.0
    for i in range(6):
        e = step * np.eye(6)[i].reshape(2, 3)
        total = total + (psi(x + e) - 2 * psi(x) + psi(x - e)) / step**2
    r = np.sqrt((x**2).sum(-1))
    r12 = np.sqrt(((x[:, 0] - x[:, 1]) ** 2).sum(-1))
    expected = -0.5 * total / psi(x) - (2 / r).sum(-1) + 1 / r12
    np.testing.assert_allclose(vmc.local_energy(params, x), expected, rtol=1e-5)


@pytest.mark.slow
def test_equations(tmp_path, standard_promotion):
    """The solutions solve them, and K-FAC comes nearer than Adam in as many steps, on both."""
    for equation in (pinn.POISSON, pinn.HEAT):
        points = jax.random.uniform(jax.random.key(1), (20, 2))
        rest = jax.vmap(lambda x, e=equation: e.residual(e.solution, x))(points)
        np.testing.assert_allclose(rest, 0, atol=1e-10)
    results = pinn.main(["--out", str(tmp_path), "--seconds", "4"])
    assert png(tmp_path / "error.png") and (tmp_path / "results.json").exists()
    for runs in results.values():
        steps, _, ours = runs.pop("K-FAC")[-1]
        others = [error for run in runs.values() for done, _, error in run if done == steps]
        assert ours < 0.5 * min(others)


def test_all_of_a_physics_informed_net_is_structured():
    """Both batches are found, and every layer has its bias."""
    params = pinn.init(jax.random.key(0))

    def loss_fn(params, inside, edge):
        net = lambda x: pinn.net(params, x)  # noqa: E731
        rest = jax.vmap(lambda x: pinn.POISSON.residual(net, x))(inside)
        off = jax.vmap(net)(edge)
        squared = curvature.losses.squared_error
        return squared(rest).mean() + squared(off).mean()

    points = (jax.random.uniform(jax.random.key(1), (n, 2)) for n in (12, 7))
    registry = curvature.register(loss_fn, params, *points)
    assert registry.coverage == 1
    assert sorted(loss.examples for loss in registry.losses) == [7, 12]
    assert [layer.bias for layer in registry.layers][:3] == [True] * 3
