"""Influence functions: which training images decide how well a test image is classified?

Let w* minimise the mean loss of n training images plus l2/2 |w|^2, and G be the curvature of the
mean there. Without training image i, the loss of a test image would change by about

    grad l_test' (G + l2 I)^-1 grad l_i / n

(Koh and Liang 2017). A single solve for the test image gives this for all i: the rest is a
directional derivative of the training losses. G is once the Hessian, solved with by conjugate
gradients (preconditioned by K-FAC), and once K-FAC's (Grosse et al. 2023), which is solved with
directly. "No curvature" has I in the place of G + l2 I: an inner product of two gradients.

The predictions are checked: images that K-FAC says matter most, and some at random, are left out
one at a time, and the small net is trained again, to convergence, from w*. For hard test images,
the Hessian's predictions correlate with the truth to more than 0.95, K-FAC's to more than 0.8, and
those without curvature less than K-FAC's.

Look at the scatter: the Hessian's points are near a line, K-FAC's around it. The line is less steep
than the diagonal: to leave out an image that matters is no small change. In the rows beside it,
most of the images that help show the class of the test image to the left.
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
from jax import Array
from matplotlib.figure import Figure
from tqdm import tqdm

import curvature
from curvature import operators

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from digits import data

Params = dict[str, dict[str, Array]]
L2, SIZES = 0.01, {"hidden": (data.FEATURES, 16), "last": (16, data.CLASSES)}
FISHER = curvature.Fisher(samples=None)  # exact: the same as Gauss-Newton for this loss


def losses(params: Params, x: Array, y: Array) -> Array:
    """The loss of every image."""
    hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"][None])
    logits = hidden @ params["last"]["w"] + params["last"]["b"][None]
    return curvature.losses.softmax_cross_entropy_with_integer_labels(logits, y)


def loss_fn(params: Params, x: Array, y: Array, weights: Array) -> Array:
    """Their weighted sum: the mean for weights 1/n, and zero leaves an image out."""
    return (weights * losses(params, x, y)).sum()


def trainer(registry: Any, x: Array, y: Array) -> Any:
    """Full-batch K-FAC, as a function of the parameters, the images' weights and the steps."""
    rule = curvature.QuadraticModel()
    tx = curvature.kfac(registry, rule, damping=1e-4, l2=L2, kind=FISHER)

    def train(params: Params, weights: Array, steps: int) -> Params:
        def step(_: int, both: tuple[Params, Any]) -> tuple[Params, Any]:
            grads = jax.grad(loss_fn)(both[0], x, y, weights)
            updates, state = tx.update(grads, both[1], both[0], loss_args=(x, y, weights))
            return jax.tree.map(jnp.add, both[0], updates), state

        return jax.lax.fori_loop(0, steps, step, (params, tx.init(params)))[0]

    return jax.jit(train)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, predicts, leaves out; writes results.json and influence.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/examples/influence"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer images and steps")
    args = parser.parse_args(argv)
    n, steps, some, tests = (200, 40, 6, 1) if args.quick else (500, 100, 10, 3)
    (x, y), (test_x, test_y) = data.load(args.seed, n)
    x, test_x, rng = x.astype(float), test_x.astype(float), np.random.default_rng(args.seed)
    params = {}
    for name, shape in SIZES.items():
        w = jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]))
        params[name] = {"w": w, "b": jnp.zeros(shape[1])}
    weights = jnp.full(n, 1 / n)
    print(registry := curvature.register(loss_fn, params, x, y, weights))
    train = trainer(registry, x, y)
    for _ in tqdm(range(6), f"training, {steps} steps each"):
        params = train(params, weights, steps)
    hard = np.argsort(-jax.jit(losses)(params, test_x, test_y))[: 2 * tests : 2]
    hard_x, hard_y = test_x[hard], test_y[hard]
    block = jax.jit(curvature.Estimator(registry, FISHER))(params, x, y, weights)
    hessian = operators.hessian(loss_fn, params, [(x, y, weights)])
    options: dict[str, Any] = {"preconditioner": block.damped_inverse(L2), "tolerance": 1e-4}
    solvers: dict[str, Any] = {
        "no curvature": lambda v: v,
        "K-FAC": jax.jit(lambda v: block.solve(v, L2)),
        "Hessian": lambda v: operators.solve(hessian, v, L2, **options).value,
    }
    rows = jax.jit(jax.jacrev(losses))(params, hard_x, hard_y)
    gradients = [jax.tree.map(lambda row, j=j: row[j], rows) for j in range(len(hard))]
    slopes = jax.jit(lambda v: jax.jvp(lambda p: losses(p, x, y), (params,), (v,))[1])
    predicted = {
        name: np.array([slopes(solve(v)) / n for v in tqdm(gradients, f"predicting, {name}")])
        for name, solve in solvers.items()
    }
    most = np.argsort(-abs(predicted["K-FAC"]))[:, :some]
    images = np.unique(np.append(most, rng.choice(n, some, replace=False)))
    before, actual = losses(params, hard_x, hard_y), []
    for i in tqdm(images, "leaving out"):
        without = train(params, weights.at[i].set(0.0), steps)
        actual.append(losses(without, hard_x, hard_y) - before)
    truth, results = np.array(actual).T, {}
    for name, found in predicted.items():
        pairs = zip(found[:, images], truth, strict=True)
        results[name] = [float(np.corrcoef(*pair)[0, 1]) for pair in pairs]
        print(f"{name:13} correlation{'':3}" + "".join(f"{value:8.3f}" for value in results[name]))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    figure = Figure((12, 4.5), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(1, 1.7))
    axes = halves[0].subplots()
    for name, style in (("K-FAC", "C1s"), ("Hessian", "C0o")):
        axes.plot(truth.ravel(), predicted[name][:, images].ravel(), style, ms=4, label=name)
    axes.axline((0, 0), slope=1, color="k", lw=0.5)
    axes.set(xlabel="change of the test loss without one image", ylabel="predicted")
    axes.legend(frameon=False)
    for j, row in enumerate(halves[1].subplots(len(hard), 7, squeeze=False)):
        order, scores = np.argsort(-predicted["Hessian"][j]), predicted["Hessian"][j]
        picks = np.concatenate([order[:3], order[-3:]])
        titles = [f"test: {hard_y[j]}", *(f"{y[i]}: {scores[i]:+.2f}" for i in picks)]
        for ax, title, pixels in zip(row, titles, [hard_x[j], *x[picks]], strict=True):
            ax.imshow(pixels.reshape(8, 8), cmap="gray_r")
            ax.set_title(title, fontsize=9)
            ax.axis("off")
    halves[1].suptitle("test image | three that help most | three that harm most: class, influence")
    figure.savefig(args.out / "influence.png", dpi=150)
    return results


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)  # differences of losses are small
    main()
