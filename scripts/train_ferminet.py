"""Trains FermiNet's own networks with its own optimizer, with this library's, and with Adam.

Networks, energies, Metropolis steps and gradients are those of a checkout of FermiNet (Pfau et al.
2020; its Psiformer: von Glehn et al. 2023), and its optimizer is kfac-jax with the settings and the
hand-written tags of its train.py. Ours takes those tags for the identity: the log-amplitude is
registered, and given FermiNet's gradient. All start from the same parameters and walkers, without
pretraining. Prints, and writes as JSON, how far energies end above the reference.

examples:
  python scripts/train_ferminet.py --checkout ../ferminet --kfac-jax ../kfac-jax
  python scripts/train_ferminet.py --checkout ../ferminet --kfac-jax ../kfac-jax \\
      --system lithium_hydride --network psiformer --seeds 3
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from tqdm import tqdm

import curvature
from benchmarks.kfac_jax import add_checkout
from benchmarks.trainer import Trainer
from curvature import text
from digits import options, report

PyTree = Any
BURN_IN, MEASURED, WIDTH = 30, 200, 0.3  # calls of ten Metropolis steps, and how wide these are


class System(NamedTuple):
    """Atoms in Bohr, electrons of either spin, and the energy that is to be reached, in Hartree."""

    atoms: tuple[tuple[str, tuple[float, float, float]], ...]
    electrons: tuple[int, int]
    energy: float


SYSTEMS = {
    "helium": System((("He", (0, 0, 0)),), (1, 1), -2.903724),
    "lithium": System((("Li", (0, 0, 0)),), (2, 1), -7.478060),
    "lithium_hydride": System((("Li", (0, 0, 0)), ("H", (3.015, 0, 0))), (2, 2), -8.070548),
}
SIZES: dict[str, dict[str, Any]] = {
    "ferminet": {"hidden_dims": ((64, 16), (64, 16), (64, 16))},
    "psiformer": {
        "num_layers": 2,
        "num_heads": 4,
        "heads_dim": 16,
        "mlp_hidden_dims": (64,),
        "use_layer_norm": True,
        "tf32": False,
    },
}
ROWS = ("kfac_jax", "ours", "adam_1e-3", "adam_3e-3")


class Problem(NamedTuple):
    """What FermiNet's checkout makes of a system.

    `log_psi(params, walkers)` is of all walkers; `energy(params, key, walkers)` is the mean of the
    local energies, with the gradient that is trained with, and `walk(params, walkers, key, width)`
    gives walkers and how many moves were accepted.
    """

    params: PyTree
    walkers: Any
    log_psi: Callable[[PyTree, Any], Array]
    energy: Callable[[PyTree, Array, Any], tuple[Array, Any]]
    walk: Callable[[PyTree, Any, Array, float], tuple[Any, Array]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The command line."""

    checkout: Path | None = None  # of FermiNet; without it nothing is run
    kfac_jax: Path | None = None  # checkout, which FermiNet needs
    system: Literal[*SYSTEMS] = "helium"  # of atoms
    network: Literal[*SIZES] = "ferminet"  # its kind
    row: tuple[Literal[*ROWS], ...] = ROWS  # optimizers
    iterations: options.PositiveInt = 600  # of training
    walkers: options.PositiveInt = 256  # in a batch
    seeds: options.PositiveInt = 3  # of parameters and walks
    out: Path | None = None  # JSON


def trouble(checkout: Path | None, kfac_jax: Path | None) -> str | None:
    """Makes both importable; says why where they are not."""
    if checkout is None or kfac_jax is None:
        return "FermiNet's checkout and kfac-jax's are needed: --checkout PATH --kfac-jax PATH"
    return add_checkout(kfac_jax) or add_checkout(checkout, "ferminet")


def problem(system: System, network: str, walkers: int, seed: int) -> Problem:
    """FermiNet's functions for a system, and where its training begins."""
    from ferminet import envelopes, hamiltonian, loss, mcmc, networks, psiformer, train
    from ferminet.utils.system import Atom

    molecule = [Atom(symbol, place) for symbol, place in system.atoms]
    charges = jnp.array([float(atom.charge) for atom in molecule])
    make = {"ferminet": networks, "psiformer": psiformer}[network].make_fermi_net
    net = make(
        system.electrons,
        charges,
        determinants=4,
        envelope=envelopes.make_isotropic_envelope(),
        feature_layer=networks.make_ferminet_features(len(molecule), system.electrons),
        jastrow="default",
        **SIZES[network],
    )

    def one(*args: Any) -> Array:
        return net.apply(*args)[1]

    batched = jax.vmap(one, (None, 0, 0, 0, 0))
    keys = jax.random.split(jax.random.key(seed))
    np.random.seed(seed)  # for which atom an electron starts at
    start, spins = train.init_electrons(keys[0], molecule, system.electrons, walkers, 1.0)
    atoms = jnp.array([atom.coords for atom in molecule])
    energies = hamiltonian.local_energy(net.apply, charges, system.electrons)
    return Problem(
        params=net.init(keys[1]),
        walkers=networks.FermiNetData(
            positions=start,
            spins=spins,
            atoms=jnp.tile(atoms, (walkers, 1, 1)),
            charges=jnp.tile(charges, (walkers, 1)),
        ),
        log_psi=lambda params, x: batched(params, x.positions, x.spins, x.atoms, x.charges),
        energy=loss.make_loss(one, energies, clip_local_energy=5.0, clip_from_median=False),
        walk=jax.jit(mcmc.make_mcmc_step(batched, walkers)),
    )


def rate(t: Array) -> Array:
    """FermiNet's learning rate."""
    return 0.05 / (1 + t / 10_000)


def theirs(at: Problem) -> Trainer:
    """kfac-jax, with the settings of FermiNet's train.py and base_config.py."""
    import kfac_jax
    from ferminet import curvature_tags_and_blocks

    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(at.energy, has_aux=True),
        l2_reg=0.0,
        norm_constraint=1e-3,
        value_func_has_aux=True,
        value_func_has_rng=True,
        learning_rate_schedule=rate,
        momentum_schedule=lambda t: 0.0,
        damping_schedule=lambda t: 1e-3,
        curvature_ema=0.95,
        inverse_update_period=1,
        min_damping=1e-4,
        num_burnin_steps=0,
        estimation_mode="fisher_exact",
        auto_register_kwargs={"graph_patterns": curvature_tags_and_blocks.GRAPH_PATTERNS},
    )

    def step(params: PyTree, state: PyTree, x: Any, key: Array) -> tuple[PyTree, PyTree]:
        params, state, _ = optimizer.step(params, state, key, batch=x)
        return params, state

    return Trainer(lambda params, x, key: optimizer.init(params, key, x), step)


def ours(at: Problem) -> Trainer:
    """The same algorithm: our curvature is twice theirs, so are damping and gradient."""

    def log_amplitude(params: PyTree, x: Any) -> Array:
        return curvature.losses.log_amplitude(at.log_psi(params, x)).mean()

    registry = curvature.register(log_amplitude, at.params, at.walkers, objective=False)
    print(f"ours: {registry.coverage:.0%} of the parameters have structured curvature")
    tx = curvature.kfac(
        registry,
        rate,
        momentum=0.0,
        damping=2e-3,
        kind=curvature.EmpiricalFisher(),
        decay=0.95,
        statistics_every=1,
        refresh_every=1,
        kl_clip=1e-3,
    )
    return _optax(at, tx)


def _optax(at: Problem, tx: Any) -> Trainer:
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params: PyTree, state: PyTree, x: Any, key: Array) -> tuple[PyTree, PyTree]:
        grads, _ = jax.grad(at.energy, has_aux=True)(params, key, x)
        grads = jax.tree.map(lambda g: 2 * g, grads)  # FermiNet leaves the factor of two out
        updates, state = tx.update(grads, state, params, loss_args=(x,))
        return optax.apply_updates(params, updates), state

    return Trainer(lambda params, x, key: tx.init(params), step)


def trainer(row: str, at: Problem) -> Trainer:
    """One of ROWS."""
    if row == "kfac_jax":
        return theirs(at)
    return ours(at) if row == "ours" else _optax(at, optax.adam(float(row.removeprefix("adam_"))))


def run(row: str, at: Problem, iterations: int, seed: int) -> dict[str, Any]:
    """Trains, then walks on; energies in Hartree, seconds of steps without walks or compilation."""
    key = jax.random.key(seed)
    params, walkers = jax.tree.map(jnp.copy, (at.params, at.walkers))
    for i in range(BURN_IN):
        walkers, _ = at.walk(params, walkers, jax.random.fold_in(key, i), WIDTH)
    optimizer = trainer(row, at)
    state, times, curve = optimizer.init(params, walkers, key), [], []
    energy = jax.jit(at.energy)
    for i in tqdm(range(iterations), desc=row, mininterval=1):
        step_key = jax.random.fold_in(key, BURN_IN + i)
        walkers, _ = at.walk(params, walkers, step_key, WIDTH)
        curve.append(float(energy(params, step_key, walkers)[0]))
        start = time.perf_counter()
        params, state = jax.block_until_ready(optimizer.step(params, state, walkers, step_key))
        times.append(time.perf_counter() - start)
    means = []
    for i in range(BURN_IN + MEASURED):
        walkers, _ = at.walk(params, walkers, jax.random.fold_in(key, 10**6 + i), WIDTH)
        if i >= BURN_IN:
            means.append(float(energy(params, key, walkers)[0]))
    blocks = np.mean(np.reshape(means, (20, -1)), axis=1)  # neighbours are not independent
    return {
        "seed": seed,
        "energy": float(blocks.mean()),
        "error": float(blocks.std(ddof=1) / len(blocks) ** 0.5),
        "median_step_seconds": float(np.median(times)),
        "curve": curve,
    }


def table(runs: dict[str, list[dict[str, Any]]], reference: float) -> str:
    """Medians over seeds, in thousandths of a Hartree above the reference."""
    first = next(iter(runs.values()))
    rows = []
    for row, found in runs.items():
        above = [1e3 * (run["energy"] - reference) for run in found]
        worst = 1e3 * max(run["error"] for run in found)
        ratio = np.median(
            [
                a["median_step_seconds"] / b["median_step_seconds"]
                for a, b in zip(found, first, strict=True)
            ]
        )
        each = ", ".join(f"{x:.2f}" for x in above)
        rows.append([row, f"{np.median(above):.2f}", each, f"{worst:.2f}", f"{ratio:.2f}"])
    head = ("optimizer", "mHartree above", "of each seed", "error", f"step / {next(iter(runs))}'s")
    return text.table(head, rows, str.rjust)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program."""
    args = options.read(Settings, argv, __doc__)
    if why := trouble(args.checkout, args.kfac_jax):
        print(f"Skipped: {why}")
        return 0
    system, runs = SYSTEMS[args.system], {row: [] for row in args.row}
    for seed in range(args.seeds):
        at = problem(system, args.network, args.walkers, seed)
        for row in args.row:
            runs[row].append(run(row, at, args.iterations, seed))
            print(f"{row}, seed {seed}: {runs[row][-1]['energy']:.5f}", flush=True)
    print(table(runs, system.energy))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {k: v for k, v in vars(args).items() if k not in ("checkout", "kfac_jax", "out")}
        content = {"settings": settings, "reference": system.energy, "runs": runs}
        content["environment"] = report.environment()
        args.out.write_text(json.dumps(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
