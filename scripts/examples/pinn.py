"""Physics-informed nets: natural gradient beside Adam, on Poisson's and on the heat equation.

A net u(x) is trained so that an equation holds at random points inside a domain, and its values on
the boundary: two batches in one loss. The layers are met again in the derivatives that the equation
has; K-FAC takes all of these uses into account (Dangel, Mueller and Zeinhofer 2024 do so for
Laplacians). The quadratic model chooses the steps, and how well it predicts the loss the damping
(Martens and Grosse 2015). Look at the error of the solution against steps, and against seconds:
Adam takes more steps in a second. In float64: float32's rounding is larger than what is left.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import Array
from tqdm import tqdm

import curvature

Params = list[dict[str, Array]]


class Equation(NamedTuple):
    """A problem in the unit square: its solution, what is zero inside, and where u is given."""

    solution: Callable[[Array], Array]
    residual: Callable[[Callable[[Array], Array], Array], Array]
    boundary: Callable[[np.ndarray], np.ndarray]


def waves(x: Array) -> Array:
    return jnp.sin(jnp.pi * x[..., 0]) * jnp.sin(jnp.pi * x[..., 1])


def decay(x: Array) -> Array:
    return jnp.exp(-(jnp.pi**2) / 4 * x[..., 1]) * jnp.sin(jnp.pi * x[..., 0])


def all_edges(x: np.ndarray) -> np.ndarray:
    x[np.arange(len(x)), np.arange(len(x)) % 2] = np.arange(len(x)) // 2 % 2
    return x


def start_and_ends(x: np.ndarray) -> np.ndarray:
    """The first moment, and both ends of the rod at all times."""
    kind = np.arange(len(x)) % 3
    x[np.arange(len(x)), (kind == 0).astype(int)] = kind == 2
    return x


POISSON = Equation(
    waves, lambda u, x: jnp.trace(jax.hessian(u)(x)) + 2 * jnp.pi**2 * waves(x), all_edges
)
HEAT = Equation(decay, lambda u, x: jax.grad(u)(x)[1] - jax.hessian(u)(x)[0, 0] / 4, start_and_ends)


def init(key: Array, sizes: Sequence[int] = (2, 32, 32, 32, 1)) -> Params:
    shapes = zip(jax.random.split(key, len(sizes)), sizes, sizes[1:], strict=False)
    return [{"w": jax.random.normal(k, (n, m)) / n**0.5, "b": jnp.zeros(m)} for k, n, m in shapes]


def net(params: Params, x: Array) -> Array:
    """u at one point."""
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return (x @ params[-1]["w"] + params[-1]["b"])[0]


def train(equation: Equation, tx: Any, args: argparse.Namespace, name: str) -> list[Any]:
    """Steps, seconds and the relative error in L2, every ten steps."""

    def loss_fn(params: Params, inside: Array, edge: Array) -> Array:
        rest = jax.vmap(lambda x: equation.residual(lambda x: net(params, x), x))(inside)
        off = jax.vmap(lambda x: net(params, x))(edge) - equation.solution(edge)
        squared = curvature.losses.squared_error
        return squared(rest).mean() + squared(off).mean()

    rng, key = np.random.default_rng(args.seed), jax.random.key(args.seed)
    params, edge = init(key), equation.boundary(rng.random((80, 2)))
    points = (jnp.asarray(rng.random((400, 2))), jnp.asarray(edge))
    if tx is None:
        registry = curvature.register(loss_fn, params, *points)
        damping = curvature.LevenbergMarquardt()
        tx = curvature.kfac(registry, curvature.QuadraticModel(), damping=damping)
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params: Params, state: Any, key: Array) -> tuple[Params, Any]:
        grads = jax.grad(loss_fn)(params, *points)
        updates, state = tx.update(grads, state, params, loss_args=points, key=key)
        return optax.apply_updates(params, updates), state

    grid = jnp.stack(jnp.meshgrid(*[jnp.linspace(0, 1, 40)] * 2), -1).reshape(-1, 2)
    exact, norm = equation.solution(grid), jnp.linalg.norm
    error = jax.jit(lambda p: norm(jax.vmap(lambda x: net(p, x))(grid) - exact) / norm(exact))
    state, spent, done, found = tx.init(params), 0.0, 0, []
    jax.block_until_ready(step(params, state, key))  # compiles
    with tqdm(total=args.seconds, desc=name, unit="s", mininterval=1) as bar:
        while spent < args.seconds:
            begin, done = time.perf_counter(), done + 10
            for i in range(done - 10, done):
                params, state = step(params, state, jax.random.fold_in(key, i))
            jax.block_until_ready(params)
            spent += time.perf_counter() - begin
            bar.update(min(spent, args.seconds) - bar.n)
            found.append((done, spent, float(error(params))))
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains on both equations with K-FAC and with Adam at two rates, for as many seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/examples/pinn"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10.0, help="of steps, for each run")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_enable_x64", True)
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained", sharey=True)
    results: dict[str, Any] = {"Poisson": {}, "heat": {}}
    for row, (title, equation) in zip(
        axes, {"Poisson": POISSON, "heat": HEAT}.items(), strict=True
    ):
        adam = {f"Adam {rate}": optax.adam(rate) for rate in (0.003, 0.01)}
        for name, tx in {"K-FAC": None, **adam}.items():
            found = results[title][name] = train(equation, tx, args, f"{title}, {name}")
            for i, measure in enumerate(("steps", "seconds")):
                row[i].plot([x[i] for x in found], [x[2] for x in found], label=name)
                row[i].set(xscale="log", yscale="log", xlabel=measure)
            print(f"{title:8} {name:11} error {found[-1][2]:.1e} after {found[-1][0]} steps")
        row[0].set_ylabel(f"{title}: relative error in L2")
    axes[0, 1].legend(frameon=False)
    figure.savefig(args.out / "error.png", dpi=150)
    plt.close(figure)
    (args.out / "results.json").write_text(json.dumps(results))
    return results


if __name__ == "__main__":
    main()
