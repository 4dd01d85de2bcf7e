"""What a step costs, for AdamW and with curvature, on the device that is there.

Two networks: `gpt`, a decoder-only transformer (by default 12 layers of width 768 with a vocabulary
of 50,304, bfloat16, 8 x 1,024 tokens of noise), and `autoencoder`, 784-1000-500-250-30 and back
with batches of 512. Every row trains for a few steps that are not counted, then for --steps. Prints
milliseconds and their ratios to AdamW's, and writes them as JSON.

examples:
  python scripts/cost.py --out docs/benchmarks/cost_h100.json        six minutes on an accelerator
  python scripts/cost.py --network gpt --batch-size 32
  python scripts/cost.py --layers 2 --width 64 --heads 4 --vocabulary 256 --context 32 --steps 5
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

import curvature
from curvature import text
from digits import options, report
from transformer import linen_model
from transformer.config import DTYPES, Config

PyTree = Any
NETWORKS = ("gpt", "autoencoder")
RATE = 1e-4  # what is learnt is not looked at
NEVER = 10**6
SELDOM = {"statistics_every": 10, "statistics_batch": 0.25}
ROWS: dict[str, Callable[[curvature.Registry], optax.GradientTransformation]] = {
    "adamw": lambda r: optax.adamw(RATE),
    "kfac, no statistics": lambda r: curvature.kfac(
        r, RATE, statistics_every=NEVER, refresh_every=NEVER, spread=False, warmup_steps=0
    ),
    "kfac, a quarter every 10, inverses in 100": lambda r: curvature.kfac(
        r, RATE, refresh_every=100, warmup_steps=1, **SELDOM
    ),
    "kfac": lambda r: curvature.kfac(r, RATE, warmup_steps=1),
    "kfac, every step, inverses in 5": lambda r: curvature.kfac(
        r, RATE, statistics_every=1, refresh_every=5, warmup_steps=1
    ),
    "eigen_adam": lambda r: curvature.eigen_adam(r, RATE, warmup_steps=1),
    "eigen_adam, a quarter every 10, bases in 50": lambda r: curvature.eigen_adam(
        r, RATE, refresh_every=50, warmup_steps=1, **SELDOM
    ),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The command line."""

    network: tuple[Literal[*NETWORKS], ...] = NETWORKS  # see above
    row: tuple[Literal[*ROWS], ...] = tuple(ROWS)  # to time
    layers: options.PositiveInt = 12  # of gpt
    width: options.PositiveInt = 768  # of gpt
    heads: options.PositiveInt = 12  # of gpt
    context: options.PositiveInt = 1024  # positions of a window
    vocabulary: options.PositiveInt = 50_304  # of gpt
    batch_size: options.PositiveInt = 8  # windows
    steps: options.PositiveInt = 40  # that are timed
    dtype: Literal[*DTYPES] = "bfloat16"  # of gpt
    out: Path | None = None  # JSON


def gpt(args: Settings) -> tuple[Callable[..., Any], PyTree, PyTree]:
    """Loss, parameters and a batch of the transformer."""
    sizes = {name: getattr(args, name) for name in ("layers", "width", "heads", "context")}
    config = Config(**sizes, kv_heads=args.heads, dtype=args.dtype, vocabulary=args.vocabulary)
    init, apply = linen_model.build(config)
    shape = (args.batch_size, args.context)
    x, y = jax.random.randint(jax.random.key(1), (2, *shape), 0, args.vocabulary)

    def loss(params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
        each = curvature.losses.softmax_cross_entropy_with_integer_labels(apply(params, x), y)
        return each.mean()

    return loss, init(jax.random.key(0)), (x, y)


def autoencoder(args: Settings) -> tuple[Callable[..., Any], PyTree, PyTree]:
    """Loss, parameters and a batch of the autoencoder."""
    half = [784, 1000, 500, 250, 30]
    widths = list(itertools.pairwise([*half, *half[-2::-1]]))
    keys = jax.random.split(jax.random.key(0), len(widths))
    params = [
        {"w": jax.random.normal(key, pair) / pair[0] ** 0.5, "b": jnp.zeros(pair[1])}
        for key, pair in zip(keys, widths, strict=True)
    ]

    def loss(params: PyTree, x: jax.Array) -> jax.Array:
        h = x
        for layer in params[:-1]:
            h = jnp.tanh(h @ layer["w"] + layer["b"])
        z = h @ params[-1]["w"] + params[-1]["b"]
        return curvature.losses.sigmoid_binary_cross_entropy(z, x).sum(-1).mean()

    return loss, params, (jax.random.uniform(jax.random.key(1), (512, 784)),)


def measured(
    tx: optax.GradientTransformation,
    loss: Callable[..., Any],
    params: PyTree,
    args: PyTree,
    steps: int,
) -> dict[str, Any]:
    """Milliseconds of the steps of one optimizer, seconds to compile, bytes at the peak."""
    tx = optax.with_extra_args_support(tx)

    def step(params: PyTree, state: PyTree, key: jax.Array) -> tuple[PyTree, PyTree]:
        grads = jax.grad(loss)(params, *args)
        updates, state = tx.update(grads, state, params, loss_args=args, key=key)
        return optax.apply_updates(params, updates), state

    state, params = tx.init(params), jax.tree.map(jnp.copy, params)
    began = time.perf_counter()
    run = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, jax.random.key(0)).compile()
    compiled = time.perf_counter() - began
    times = []
    for i in range(steps + 5):
        key = jax.block_until_ready(jax.random.key(i))
        began = time.perf_counter()
        params, state = jax.block_until_ready(run(params, state, key))
        times.append(1e3 * (time.perf_counter() - began))
    times = times[5:]
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "mean_ms": statistics.fmean(times),
        "median_ms": statistics.median(times),
        "slowest_ms": max(times),
        "compile_seconds": compiled,
        "temporary_bytes": run.memory_analysis().temp_size_in_bytes,
        "peak_bytes_so_far": memory.get("peak_bytes_in_use"),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """All rows, with ratios to AdamW's where it is among them."""
    base = rows.get("adamw")
    cells = []
    for name, row in rows.items():
        times = [f"{row[k]:.2f}" for k in ("mean_ms", "median_ms", "slowest_ms", "compile_seconds")]
        ratios = ["", ""]
        if base:
            ratios = [f"{row[k] / base[k]:.2f}" for k in ("mean_ms", "compile_seconds")]
        cells.append([name, *times, *ratios])
    header = ["", "mean ms", "median", "slowest", "compile s", "/ adamw", "compile / adamw"]
    return text.table(header, cells, str.rjust)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program."""
    args = options.read(Settings, argv, __doc__)
    content: dict[str, Any] = {"program": "cost", "environment": report.environment()}
    content["settings"] = {k: v for k, v in vars(args).items() if k != "out"}
    for network in args.network:
        loss, params, batch = (gpt if network == "gpt" else autoencoder)(args)
        registry = curvature.register(loss, params, *batch)
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        print(report.heading(f"{network}, {size:,} parameters, {registry.coverage:.0%} covered"))
        rows = {}
        for name in args.row:
            rows[name] = measured(ROWS[name](registry), loss, params, batch, args.steps)
            print(f"{name}: {rows[name]['mean_ms']:.2f} ms", file=sys.stderr, flush=True)
        print(table(rows), flush=True)
        content[network] = {"parameters": size, "rows": rows}
        if args.out:  # after every network: a run that is cut short keeps what it has
            report.write_json(args.out, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
