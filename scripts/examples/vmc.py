"""Variational Monte Carlo of the helium atom: natural gradient beside Adam.

A wave function psi(x) of two electrons is log psi = -2 (r1 + r2) + r12 / (2 + 2 r12) + J, whose
first terms have the right cusps, and whose J is a small net of the three distances, summed over the
order of the electrons. Its energy is the mean, over samples of |psi|^2, of the local energy

    E_L = -1/2 sum_i (d_i^2 log psi + (d_i log psi)^2) - 2 / r1 - 2 / r2 + 1 / r12,

and its gradient is 2 E[(E_L - E) grad log psi]. `curvature.losses.log_amplitude` has this gradient,
and as its curvature 4 E[grad log psi grad log psi'], the metric of stochastic reconfiguration
(Sorella 1998), which K-FAC approximates as for FermiNet (Pfau et al. 2020). Look at how fast the
energies come to the exact one, -2.90372 Hartree.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import Array
from tqdm import tqdm

import curvature

EXACT = -2.903724
Params = list[dict[str, Array]]


def init(key: Array, sizes: Sequence[int] = (3, 32, 32, 1)) -> Params:
    """Weights of the net J, whose last layer starts at zero."""
    shapes = zip(jax.random.split(key, len(sizes)), sizes, sizes[1:], strict=False)
    weights = [jax.random.normal(k, (n, m), jnp.float32) / n**0.5 for k, n, m in shapes]
    weights[-1] *= 0
    return [{"w": w, "b": jnp.zeros(w.shape[1], jnp.float32)} for w in weights]


def log_psi(params: Params, x: Array) -> Array:
    """log psi of positions `(..., 2, 3)`, in Bohr."""
    r, apart = jnp.sqrt((x**2).sum(-1)), x[..., 0, :] - x[..., 1, :]
    r12 = jnp.sqrt((apart**2).sum(-1))
    h = jnp.stack([r, r[..., ::-1], jnp.stack([r12, r12], -1)], -1)  # each order of the two once
    h = h / (1 + h)
    for i, layer in enumerate(params):
        h = h @ layer["w"] + layer["b"].reshape((1,) * (h.ndim - 1) + (-1,))
        h = jnp.tanh(h) if i < len(params) - 1 else h
    return -2 * r.sum(-1) + r12 / (2 + 2 * r12) + h[..., 0].sum(-1)


def local_energy(params: Params, x: Array) -> Array:
    """E_L at positions `(walkers, 2, 3)`."""

    def one(x: Array) -> Array:
        slope = jax.grad(lambda flat: log_psi(params, flat.reshape(2, 3)))
        flat = x.ravel()
        along = jax.vmap(lambda e: jax.jvp(slope, (flat,), (e,))[1])(jnp.eye(6, dtype=x.dtype))
        kinetic = -0.5 * (jnp.trace(along) + (slope(flat) ** 2).sum())
        return kinetic - (2 * (x**2).sum(-1) ** -0.5).sum() + ((x[0] - x[1]) ** 2).sum() ** -0.5

    return jax.vmap(one)(x)


def walk(params: Params, x: Array, key: Array, steps: int = 10, width: float = 0.4) -> Array:
    """Metropolis steps of all walkers towards |psi|^2."""

    def move(i: Array, x: Array) -> Array:
        a, b = jax.random.split(jax.random.fold_in(key, i))
        new = x + width * jax.random.normal(a, x.shape, x.dtype)
        gain = 2 * (log_psi(params, new) - log_psi(params, x))
        taken = jnp.log(jax.random.uniform(b, gain.shape, x.dtype)) < gain
        return jnp.where(taken[:, None, None], new, x)

    return jax.lax.fori_loop(0, steps, move, x)


def loss_fn(params: Params, x: Array, deviations: Array) -> Array:
    """Its gradient is the energy's, its curvature the Fisher information of |psi|^2."""
    return curvature.losses.log_amplitude(log_psi(params, x), deviations).mean()


def train(name: str, tx: Any, params: Params, x: Array, key: Array, steps: int) -> Any:
    """The mean local energy of every step, and where parameters and walkers end."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params: Params, state: Any, x: Array, key: Array) -> tuple[Any, ...]:
        x = walk(params, x, key)
        energies = local_energy(params, x)
        median = jnp.median(energies)
        width = 5 * jnp.abs(energies - median).mean()  # rare walkers have huge energies
        cut = jnp.clip(energies, median - width, median + width)
        args = (x, cut - cut.mean())
        grads = jax.grad(loss_fn)(params, *args)
        updates, state = tx.update(grads, state, params, loss_args=args)
        return optax.apply_updates(params, updates), state, x, cut.mean()

    state, found, keys = tx.init(params), [], jax.random.split(key, steps)
    for k in tqdm(keys, desc=name, mininterval=1):
        params, state, x, energy = step(params, state, x, k)
        found.append(float(energy))
    return found, params, x


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains with each, and measures the energies they come to, in Hartree above the exact one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/examples/vmc"))
    for name, default in (("--seed", 0), ("--steps", 400), ("--walkers", 1000)):
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args(argv)
    key, params = jax.random.key(args.seed), init(jax.random.key(args.seed + 1))
    x = jax.random.normal(key, (args.walkers, 2, 3), jnp.float32)
    x = jax.jit(walk, static_argnums=3)(params, x, key, 300)
    registry = curvature.register(loss_fn, params, x, jnp.zeros(args.walkers, jnp.float32))
    print(registry)
    recipes = {"K-FAC 0.03": curvature.kfac(registry, 0.03, kind=curvature.EmpiricalFisher())}
    recipes |= {f"Adam {rate}": optax.adam(rate) for rate in (0.001, 0.003, 0.01)}
    measure = jax.jit(lambda p, x, k: (y := walk(p, x, k, 20), local_energy(p, y).mean()))
    curves, results = {}, {}
    for name, tx in recipes.items():
        curve, end, walkers = train(name, tx, params, x, key, args.steps)
        curves[name], means = curve, []
        for i in range(50):
            walkers, mean = measure(end, walkers, jax.random.fold_in(key, 10**6 + i))
            means.append(float(mean) - EXACT)
        early = float(np.mean(curve[len(curve) // 4 : len(curve) // 2])) - EXACT
        error, end = float(np.std(means)) / len(means) ** 0.5, float(np.mean(means))
        results[name] = {"early": early, "end": end, "error": error}
        print(f"{name:11} above exact: {early:.4f} early, {end:.4f} +- {error:.4f} at the end")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    figure, axes = plt.subplots(layout="constrained", num="vmc", clear=True)
    for name, curve in curves.items():
        axes.plot(np.convolve(curve, np.ones(20) / 20, "valid"), label=name, lw=1.2)
    axes.axhline(EXACT, color="black", lw=0.8, ls="--", label="exact")
    axes.set(xlabel="steps", ylabel="energy, Hartree", ylim=(EXACT - 0.01, EXACT + 0.09))
    axes.legend(title="helium, means of 20 steps", frameon=False)
    figure.savefig(args.out / "energy.png", dpi=150)
    return results


if __name__ == "__main__":
    main()
