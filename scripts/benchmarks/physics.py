"""The problems of physics: those of `examples/pinn.py` and `examples/vmc.py`, as benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import curvature
from benchmarks.networks import Network
from benchmarks.problems import Problem
from digits.data import Batch
from examples import pinn, vmc

PyTree = Any
GROUPS = 80  # of five points inside and one on the boundary
WALKERS = 1000
SWEEPS = 20  # of ten Metropolis steps, over which an energy is averaged


@dataclass(frozen=True)
class Poisson(Problem):
    """Poisson's equation in the unit square; what counts is the error of the solution."""

    double = True
    measured = "relative error of the solution in L2"

    def outputs(self, params: PyTree, batch: Batch) -> tuple[Array, Array]:
        """What should be zero, inside (groups, 5) and on the boundary (groups,)."""
        at = jax.vmap(lambda x: pinn.POISSON.residual(lambda y: pinn.net(params, y), x))
        edge = jax.vmap(lambda x: pinn.net(params, x))(batch.y) - pinn.POISSON.solution(batch.y)
        return at(batch.x.reshape(-1, 2)).reshape(batch.x.shape[:2]), edge

    def loss_fn(self, params: PyTree, batch: Batch) -> Array:
        """See `Problem`."""
        squared = curvature.losses.squared_error
        inside, edge = self.outputs(params, batch)
        return squared(inside).mean() + squared(edge).mean()

    def evaluate(self, params: PyTree, data: Batch) -> dict[str, Array]:
        """See `Problem`."""
        grid = jnp.stack(jnp.meshgrid(*[jnp.linspace(0, 1, 40)] * 2), -1).reshape(-1, 2)
        exact = pinn.POISSON.solution(grid)
        error = jax.vmap(lambda x: pinn.net(params, x))(grid) - exact
        return {
            "loss": jnp.linalg.norm(error) / jnp.linalg.norm(exact),
            "objective": self.loss_fn(params, data),
        }


@dataclass(frozen=True)
class Helium(Problem):
    """The energy of the helium atom; samples walk with the wave function that is trained."""

    chosen_rate = True
    measured = "energy above the exact one, Hartree"
    points = 15

    def loss_fn(self, params: PyTree, batch: Batch) -> Array:
        """See `Problem`; its gradient is the energy's, its value is nothing."""
        return vmc.loss_fn(params, batch.x, batch.y)

    def batches(self, seed: int) -> Callable[[PyTree], Batch]:
        """Ten Metropolis steps on, and what the local energies there have more than the mean."""
        walkers, key, drawn = self.data.x, jax.random.key(seed), 0

        @jax.jit
        def advance(params: PyTree, x: Array, key: Array) -> Batch:
            x = vmc.walk(params, x, key)
            energies = vmc.local_energy(params, x)
            median = jnp.median(energies)
            width = 5 * jnp.abs(energies - median).mean()
            cut = jnp.clip(energies, median - width, median + width)
            return Batch(x, cut - cut.mean())

        def draw(params: PyTree) -> Batch:
            nonlocal walkers, drawn
            batch = advance(params, walkers, jax.random.fold_in(key, drawn))
            walkers, drawn = batch.x, drawn + 1
            return batch

        return draw

    def evaluate(self, params: PyTree, data: Batch) -> dict[str, Array]:
        """Averages local energies of walkers that had a fifth of all steps to forget theirs."""

        def sweep(x: Array, key: Array) -> tuple[Array, Array]:
            x = vmc.walk(params, x, key)
            return x, vmc.local_energy(params, x).mean()

        keys = jax.random.split(jax.random.key(0), SWEEPS + SWEEPS // 4)
        _, energies = jax.lax.scan(sweep, data.x, keys)
        return {"loss": energies[SWEEPS // 4 :].mean() - vmc.EXACT}


def poisson() -> Problem:
    """400 points inside and 80 on the boundary, all of them in every batch."""
    rng = np.random.default_rng(0)
    edge = pinn.POISSON.boundary(rng.random((GROUPS, 2)))
    return Poisson(
        name="poisson",
        description="physics-informed net 2-32-32-32-1, tanh, on Poisson's equation",
        network=Network(pinn.init, jax.vmap(pinn.net, (None, 0))),
        family="squared",
        data=Batch(rng.random((GROUPS, 5, 2)), edge),
        batch_size=GROUPS,
        steps=1000,
        first_order_steps=5000,
    )


def helium() -> Problem:
    """Variational Monte Carlo with walkers that start where the untrained function has them."""
    key = jax.random.key(0)
    x = jax.random.normal(key, (WALKERS, 2, 3), jnp.float32)
    x = jax.jit(vmc.walk, static_argnums=3)(vmc.init(key), x, key, 300)
    return Helium(
        name="helium",
        description="helium's wave function: cusps, and a net 3-32-32-1 of the distances",
        network=Network(vmc.init, vmc.log_psi),
        family="amplitude",
        data=Batch(x, jnp.zeros(WALKERS, jnp.float32)),
        batch_size=WALKERS,
        steps=300,
        first_order_steps=1000,
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {"poisson": poisson, "helium": helium}
