"""No default, and no setting that the documentation advises, loses a newcomer's net.

Four nets that nothing was tuned for, at learning rates of two decades, from three seeds.
"""

import functools
import math

import optax
import pytest
from newcomers import NEWCOMERS, runner

import curvature

RATES, SEEDS, STEPS = (0.01, 0.1, 0.3), (0, 1, 2), 150
KFAC = curvature.kfac
MODEL, LM = curvature.QuadraticModel(), curvature.LevenbergMarquardt(1.0)
ADAM = optax.scale_by_adam


def advised(make, **options):
    """The optimizer of a registry at a learning rate."""
    return lambda registry, rate: make(registry, learning_rate=rate, **options)


SETTINGS = {
    "kfac": advised(KFAC),
    "ekfac": advised(curvature.ekfac),
    "foof": advised(curvature.foof),
    "damping=1e-2": advised(KFAC, momentum=0.9, damping=1e-2),
    "damping=1e-3": advised(KFAC, damping=1e-3),
    "LevenbergMarquardt": advised(KFAC, damping=LM),
    "Eigh": advised(KFAC, refresh=curvature.Eigh()),
    "QR": advised(KFAC, refresh=curvature.QR()),
    "NewtonSchulz": advised(KFAC, refresh=curvature.NewtonSchulz()),
    "graft": advised(KFAC, graft=ADAM()),
    "fallback": advised(KFAC, fallback=ADAM()),
    "weight decay": advised(KFAC, weight_decay=1e-2, l2=1e-4),
    "empirical Fisher": advised(KFAC, kind=curvature.EmpiricalFisher()),
    "eigen_adam": lambda registry, rate: curvature.eigen_adam(registry, rate / 3),
    "chain": lambda registry, rate: optax.chain(
        curvature.scale_by_curvature(registry, damping=1e-2, kl_clip=0.1), optax.sgd(rate, 0.9)
    ),
}
BY_MODEL = {
    "QuadraticModel": {},
    "QuadraticModel and LevenbergMarquardt": {"damping": LM},
}
# What differs little from `kfac` is tried on the two nets that are compiled quickly.
ALIKE = {"foof", "Eigh", "QR", "NewtonSchulz", "fallback", "weight decay", "empirical Fisher"}
LARGE = {"linen CNN", "NNX transformer"}
CASES = [
    (net, setting)
    for net in NEWCOMERS
    for setting in (*SETTINGS, *BY_MODEL)
    if not (net in LARGE and setting in ALIKE)
]
QUICK = [("plain regression", "kfac")]
# On the two that are compiled slowly, the rest is exhaustive.
OFTEN = {"kfac", "eigen_adam", "QuadraticModel and LevenbergMarquardt"}


def marks(net, setting):
    rest = [pytest.mark.exhaustive] if net in LARGE and setting not in OFTEN else []
    return [] if (net, setting) in QUICK else [pytest.mark.slow, *rest]


pytestmark = pytest.mark.usefixtures("library_defaults")


@functools.cache
def problem(net):
    newcomer = NEWCOMERS[net]()
    return newcomer, newcomer.register()


@pytest.mark.parametrize(
    ("net", "setting"),
    [pytest.param(*c, marks=marks(*c)) for c in CASES],
)
def test_no_run_ends_above_its_start(net, setting, request):
    if net == "linen CNN":
        request.getfixturevalue("optimised")
    newcomer, registry = problem(net)
    if setting in BY_MODEL:
        make, rates = lambda _: KFAC(registry, MODEL, **BY_MODEL[setting]), (None,)
    else:
        make, rates = functools.partial(SETTINGS[setting], registry), RATES
    run = runner(newcomer, make, STEPS)
    for rate in rates:
        for seed in SEEDS:
            before, after, _ = run(0.0 if rate is None else rate, seed)
            assert math.isfinite(after) and after < before, (rate, seed, before, after)
