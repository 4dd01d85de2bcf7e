"""Laplace approximation: how sure a trained classifier should be.

Around its mode w*, the posterior of the weights is about N(w*, S) with S = (n G + lam I)^-1: n is
the number of training images, G the curvature of their mean loss (here K-FAC's, as in Ritter et al.
2018), lam the precision of the prior N(0, I / lam), chosen by the evidence (MacKay 1992; Immer et
al. 2021), in turns with training:

    log p(D | lam) ~ log p(D | w*) - lam/2 |w*|^2 + p/2 log lam - 1/2 logdet(n G + lam I).

Logits z, linearised in w, have the covariance C = J S J', and the probabilities are
softmax(z / sqrt(1 + pi/8 diag C)), the probit approximation (MacKay 1992). "Last layer" does this
for the last layer's weights alone (Daxberger et al. 2021), by a registry that excludes the others.
Both are compared with the mode alone (MAP) on test images turned by more and more degrees.

Look at the two panels to the right: NLL is the negative log-likelihood, ECE the expected
calibration error, the distance between confidence and accuracy. On upright images the mode is best,
and Laplace not sure enough. On images unlike those it has seen, the mode stays sure of itself: from
20 degrees, both errors are smaller for the last layer, and smallest for the full approximation.
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
from scipy import ndimage  # type: ignore[import-untyped]
from tqdm import tqdm

import curvature

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from digits import data

Params = dict[str, dict[str, Array]]
SIZES = {"hidden": (data.FEATURES, 50), "last": (50, data.CLASSES)}
LAMBDAS, ANGLES = np.logspace(-1.5, 1.5, 37).tolist(), (0, 10, 20, 30, 40)


def net(params: Params, x: Array) -> Array:
    """The logits of one image or a batch."""
    hidden = jnp.tanh(jnp.dot(x, params["hidden"]["w"]) + params["hidden"]["b"])
    return jnp.dot(hidden, params["last"]["w"]) + params["last"]["b"]


def loss_fn(params: Params, x: Array, y: Array) -> Array:
    """The mean loss."""
    return curvature.losses.softmax_cross_entropy_with_integer_labels(net(params, x), y).mean()


def train(registry: Any, params: Params, images: data.Batch, lam: float, steps: int) -> Params:
    """Goes on to the mode for one prior."""
    tx = curvature.kfac(registry, curvature.QuadraticModel(), damping=1e-3, l2=lam / images.size)

    @jax.jit
    def step(params: Params, state: Any, key: Array) -> tuple[Params, Any]:
        grads = jax.grad(loss_fn)(params, *images)
        updates, state = tx.update(grads, state, params, loss_args=tuple(images), key=key)
        return jax.tree.map(jnp.add, params, updates), state

    state = tx.init(params)
    for i in tqdm(range(steps), f"training, lam = {lam:.2f}", mininterval=1):
        params, state = step(params, state, jax.random.key(i))
    return params


def evidence(op: Any, weights: Any, fit: float, n: int) -> list[float]:
    """log p(D | lam) for every lam; `op` is the curvature of `weights`, `fit` log p(D | w*)."""
    leaves = jax.tree.leaves(weights)
    size, square = sum(w.size for w in leaves), sum(float((w**2).sum()) for w in leaves)
    logdet = jax.jit(lambda damping: size * np.log(n) + op.logdet(damping))
    return [fit + (size * np.log(a) - a * square - float(logdet(a / n))) / 2 for a in LAMBDAS]


def variances(op: Any, params: Params, x: Array, lam: float, n: int) -> Array:
    """diag C of every image: S = H H / n with H = (G + lam/n I)^-1/2."""

    def one(x: Array) -> Array:
        halves = jax.vmap(lambda row: op.power(row, -0.5, lam / n))(jax.jacrev(net)(params, x))
        squares = [(h**2).reshape(len(h), -1).sum(1) for h in jax.tree.leaves(halves)]
        return jnp.stack(squares).sum(0) / n

    return jax.jit(lambda x: jax.lax.map(one, x, batch_size=99))(x)


def scores(logits: Array, y: Array) -> dict[str, float]:
    """NLL, and ECE in ten bins."""
    p, labels = np.asarray(jax.nn.softmax(logits)), np.asarray(y)
    gaps, bins = (p.argmax(1) == labels) - p.max(1), (9.999 * p.max(1)).astype(int)
    nll = -np.log(p[np.arange(len(p)), labels]).mean()
    return {"NLL": float(nll), "ECE": float(abs(np.bincount(bins, gaps)).sum() / len(p))}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, chooses the priors, predicts; writes results.json and laplace.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/examples/laplace"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    images, test = data.load(args.seed)
    params, ops, curves, lam, n = {}, {}, {}, {"full": 1.0}, images.size
    for name, shape in SIZES.items():
        w = shape[0] ** -0.5 * np.random.default_rng(args.seed).normal(size=shape)
        params[name] = {"w": jnp.asarray(w, jnp.float32), "b": jnp.zeros(shape[1:], jnp.float32)}
    print(registry := curvature.register(loss_fn, params, *images))
    parts = {"last layer": registry.override("hidden/*", exclude=True), "full": registry}
    exact = curvature.Fisher(samples=None)
    measures = {name: jax.jit(curvature.Estimator(part, exact)) for name, part in parts.items()}
    for _ in range(1 if args.quick else 4):
        params = train(registry, params, images, lam["full"], 30 if args.quick else 60)
        for name, measure in measures.items():
            ops[name] = measure(params, *images)
            weights = params if name == "full" else params["last"]
            curves[name] = evidence(ops[name], weights, -n * float(loss_fn(params, *images)), n)
            lam[name] = LAMBDAS[int(np.argmax(curves[name]))]
    turned = [ndimage.rotate(test.x.reshape(-1, 8, 8), a, (1, 2), False, order=1) for a in ANGLES]
    x = jnp.asarray(turned).reshape(-1, data.FEATURES)
    results: dict[str, Any] = {"angles": ANGLES, "lambda": lam}
    print("NLL / ECE at" + "".join(f"{angle:9} deg" for angle in ANGLES))
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    left, *others = figure.subplots(1, 3)
    for name, style in {"MAP": "k:o", "last layer": "C1--o", "full": "C0-o"}.items():
        logits = net(params, x)
        if name in ops:
            logits /= jnp.sqrt(1 + np.pi / 8 * variances(ops[name], params, x, lam[name], n))
            left.semilogx(LAMBDAS, curves[name], style, markevery=[LAMBDAS.index(lam[name])])
        results[name] = [scores(z, test.y) for z in logits.reshape(len(ANGLES), -1, data.CLASSES)]
        print(f"{name:12}" + "".join(f"{r['NLL']:7.3f} /{r['ECE']:4.2f}" for r in results[name]))
        for ax, what in zip(others, ("NLL", "ECE"), strict=True):
            ax.plot(ANGLES, [row[what] for row in results[name]], style, label=name)
            ax.set(title=what, xlabel="degrees that test images are turned by", xticks=ANGLES)
    left.set(title="log evidence", xlabel="precision of the prior, lam")
    others[0].legend(frameon=False)
    figure.savefig(args.out / "laplace.png", dpi=150)
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    main()
