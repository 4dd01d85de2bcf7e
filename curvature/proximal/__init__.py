"""Proximal optimisation of a composite loss, and the steps that approximate it.

The setting: a function f of the weights w (a network on a fixed batch), a loss of its outputs
z = f(w), and a dissimilarity rho(z, z0) of outputs, zero where they agree. The proximal point

    argmin_w  loss(f(w)) + lam rho(f(w), f(w0))

lowers the loss without changing the outputs more than lam allows. Its approximations, each a
function of this package, with g the gradient and H the Hessian of loss(f(w)) at w0, and
G = J' G_z J the pullback through J = df/dw of the metric G_z, the Hessian of rho at z = z0:

    proximal_point          the loss as it is,  rho as it is
    damped_newton_step      second order,       second order     -(H + lam G)^-1 g
    natural_gradient_step   first order,        second order     -(1/lam) G^-1 g
    mirror_descent_step     first order in z,   rho as it is     in output space
    implicit_gradient_step  the loss as it is,  rho = 1/2 |w - w0|^2 of the weights
    trust_region_step       second order,       a bound v' G v <= radius^2 instead of a penalty

Steps are displacements v, to be added: `optax.apply_updates(w, v)`. Data belongs in f's and loss's
closures. `rho` is a function rho(z, z0) -> scalar, or a metric: an object whose `mvp(z, v)` gives
G_z v. A metric that can be called, as a Bregman divergence can, is called, and its values summed;
what is only a metric stands for the divergence 1/2 (z - z0)' G_z0 (z - z0).

All functions are pure and can be jitted with w and lam as arguments. Their convergence comes back
as data. Outputs and weights may be any pytrees of floating-point arrays of one dtype.

`newton.py` has the solvers. Sources: Grosse, Neural Net Training Dynamics, chapter 3
(metrics); Parikh and Boyd 2014, Proximal Algorithms; Amari 1998; Beck and Teboulle 2003 (mirror
descent); Nocedal and Wright 2006 (solvers).
"""

from curvature.proximal.mirror import mirror_descent, mirror_descent_step
from curvature.proximal.newton import Convergence
from curvature.proximal.point import implicit_gradient_step, proximal_point
from curvature.proximal.steps import (
    TrustRegion,
    damped_newton_step,
    natural_gradient_step,
    scale_by_natural_gradient,
    trust_region_step,
)

__all__ = [
    "Convergence",
    "TrustRegion",
    "damped_newton_step",
    "implicit_gradient_step",
    "mirror_descent",
    "mirror_descent_step",
    "natural_gradient_step",
    "proximal_point",
    "scale_by_natural_gradient",
    "trust_region_step",
]
