"""Metrics on a network's output, and their pullbacks to its parameters.

A metric gives a positive semi-definite matrix G_z at every output z: how far apart z and z + dz
are, |dz|^2 = dz' G_z dz. Pulled back through z = f(w) it measures steps of the parameters by what
they do to the output,

    G_w = J' G_z J,   J = df/dw  (`pullback_mvp`),

which is the second-order expansion of a divergence between functions: rho(f(w + v), f(w)) =
1/2 v' G_w v + O(|v|^3). With the Fisher information of the output's family G_w is the Fisher
information of the parameters (Amari 1998); with the Hessian of a convex loss it is the generalised
Gauss-Newton matrix (Schraudolph 2002); where the loss is the negative log-likelihood of an
exponential family in its natural parameters these two are one (Martens 2020, section 9).

| metric                           | G_z                                              |
|----------------------------------|--------------------------------------------------|
| `Euclidean(scale)`               | scale times the identity                         |
| `FisherMetric(family)`           | the Fisher information of an output family       |
| `HessianMetric(family, targets)` | the Hessian of its loss at the targets           |
| `Bregman(phi)`                   | the Hessian of phi                               |
| `Divergence(rho)`                | the Hessian of rho(z, z') in z at z = z'         |

All functions are pure and take any pytree of parameters `w`; nothing of the size of G_w or G_z is
made, but by `pullback_metric`. Outputs have their unit axes (the batch) in front, and metrics are
block-diagonal over them.
"""

from curvature.metrics.divergences import Bregman, Divergence, kl
from curvature.metrics.metric import Euclidean, FisherMetric, HessianMetric, Metric
from curvature.metrics.products import (
    gauss_newton_mvp,
    hessian_mvp,
    pullback,
    pullback_metric,
    pullback_mvp,
    pushforward,
)

__all__ = [
    "Bregman",
    "Divergence",
    "Euclidean",
    "FisherMetric",
    "HessianMetric",
    "Metric",
    "gauss_newton_mvp",
    "hessian_mvp",
    "kl",
    "pullback",
    "pullback_metric",
    "pullback_mvp",
    "pushforward",
]
