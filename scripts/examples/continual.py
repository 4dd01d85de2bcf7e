"""Continual learning: remembering earlier tasks by the curvature of their losses.

A net learns to read digits whose pixels are permuted, one permutation after another, without seeing
images of earlier tasks again. Trained as usual, it forgets them. Elastic weight consolidation
(Kirkpatrick et al. 2017) adds to the mean loss of a task, for each of the earlier ones, the penalty

    strength / 2 * (w - w_k)' F_k (w - w_k),

with w_k the weights that task k was left with, and F_k the Fisher matrix of its mean loss there.
That is the loss's second-order model, for strength 1. F_k is once the diagonal, as there, and once
K-FAC's (Ritter et al. 2018). For both, several strengths are tried, and the best is taken by images
that are held out of training, before the test images are looked at.

Look at the left panel: accuracy on the first task falls as more are learned, fastest without a
penalty, least with K-FAC's. In the middle is the mean over the tasks so far; to the right, over all
tasks at the end, for every strength. If it is too large, nothing new is learned, and no strength of
the diagonal remembers and learns as well as the best of K-FAC.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from matplotlib.figure import Figure
from tqdm import tqdm

import curvature

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from digits import data

Params = dict[str, dict[str, Array]]
Past = list[tuple[Params, curvature.BlockDiagonal]]  # w_k and F_k
SIZES = {"hidden": (data.FEATURES, 50), "last": (50, data.CLASSES)}


def net(params: Params, x: Array) -> Array:
    """Logits of a batch."""
    hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"][None])
    return hidden @ params["last"]["w"] + params["last"]["b"][None]


def loss_fn(params: Params, x: Array, y: Array) -> Array:
    """The mean loss."""
    return curvature.losses.softmax_cross_entropy_with_integer_labels(net(params, x), y).mean()


def penalty(params: Params, past: Past) -> Array:
    """1/2 sum_k (w - w_k)' F_k (w - w_k)."""
    total = jnp.zeros((), jnp.float32)
    for centre, fisher in past:
        change = jax.tree.map(jnp.subtract, params, centre)
        total += optax.tree.vdot(change, fisher @ change) / 2
    return total


@jax.jit(static_argnames="steps")
def train(params: Params, past: Past, x: Array, y: Array, strength: Array, steps: int) -> Params:
    """Adam on the loss and the penalty, full batch."""
    tx = optax.adam(3e-3)

    def objective(params: Params) -> Array:
        return loss_fn(params, x, y) + strength * penalty(params, past)

    def step(carry: tuple[Params, Any], _: None) -> tuple[tuple[Params, Any], None]:
        params, state = carry
        updates, state = tx.update(jax.grad(objective)(params), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), None, steps)[0][0]


@jax.jit
def accuracy(params: Params, x: Array, y: Array) -> Array:
    """The share of images that are read correctly."""
    return (net(params, x).argmax(-1) == y).mean()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Learns the tasks in every way; writes results.json and continual.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/examples/continual"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer tasks, steps and strengths")
    args = parser.parse_args(argv)
    tasks, steps = (2, 100) if args.quick else (5, 300)
    strengths = [10.0] if args.quick else [1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]
    rng = np.random.default_rng(args.seed)
    orders = [rng.permutation(data.FEATURES) for _ in range(tasks)]
    both, test = data.load(args.seed)
    parts = {"held out": data.Batch(both.x[1200:], both.y[1200:]), "test": test}
    images = data.Batch(both.x[:1200], both.y[:1200])
    start = {}
    for name, shape in SIZES.items():
        w = jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)
        start[name] = {"w": w, "b": jnp.zeros(shape[1], jnp.float32)}
    print(registry := curvature.register(loss_fn, start, *images))
    kinds = {"no penalty": None, "diagonal": registry.with_blocks("diagonal"), "K-FAC": registry}
    results: dict[str, Any] = {}
    for name, kind in kinds.items():
        if kind:
            fisher = jax.jit(curvature.Estimator(kind, curvature.Fisher(samples=None)))
        tried = []
        for strength in tqdm(strengths if kind else [0.0], name):
            params, past = start, Past()
            run: dict[str, Any] = {"strength": strength, "held out": [], "test": []}
            for order in orders:
                x = images.x[:, order]
                params = train(params, past, x, images.y, jnp.float32(strength), steps)
                past = [*past, (params, fisher(params, x, images.y))] if kind else []
                for part, (x, y) in parts.items():
                    run[part].append([float(accuracy(params, x[:, o], y)) for o in orders])
            tried.append(run)
        best = max(tried, key=lambda run: np.mean(run["held out"][-1]))
        results[name] = {"best": best, "tried": tried}
        line = "".join(f"{value:6.3f}" for value in best["test"][-1])
        print(f"{name:11} strength {best['strength']:5g}, accuracy on each task at the end: {line}")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    figure = Figure((12, 3.8), layout="constrained")
    axes, counts = figure.subplots(1, 3, sharey=True), range(1, tasks + 1)
    for (name, found), style in zip(results.items(), ("k:o", "C1--s", "C0-o"), strict=True):
        rows, ends = found["best"]["test"], [np.mean(run["test"][-1]) for run in found["tried"]]
        axes[0].plot(counts, [row[0] for row in rows], style, label=name)
        axes[1].plot(counts, [np.mean(row[:k]) for k, row in zip(counts, rows, strict=True)], style)
        axes[2].semilogx(strengths, ends * (len(strengths) // len(ends)), style)
    axes[0].set(title="accuracy on the first task", xlabel="tasks learned", xticks=counts)
    axes[1].set(title="mean over the tasks so far", xlabel="tasks learned", xticks=counts)
    axes[2].set(title="mean over all tasks at the end", xlabel="strength of the penalty")
    axes[0].legend(frameon=False)
    figure.savefig(args.out / "continual.png", dpi=150)
    return results


if __name__ == "__main__":
    main()
