"""Refresh: from averaged statistics to what preconditions, by which method and when."""

from curvature.optimizer.refresh.inverses import Inverses, Now, Refreshed
from curvature.optimizer.refresh.methods import QR, Cholesky, Eigh, Method, NewtonSchulz

__all__ = [
    "QR",
    "Cholesky",
    "Eigh",
    "Inverses",
    "Method",
    "NewtonSchulz",
    "Now",
    "Refreshed",
]
