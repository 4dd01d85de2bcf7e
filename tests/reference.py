"""Brute force for Kronecker factors, written apart from the library.

A case's `reference(params, x, tap)` is its model with `tap(name, a, y)` called at every layer,
where `a` is the layer's input with its features last and `y` the output, features last. Taps record
the inputs and perturb the outputs, so that dense Jacobians of the network's output in every layer's
output can be taken. Nothing is shared with the library: no tokens, no custom rules, no tags.
"""

import jax
import jax.numpy as jnp
import numpy as np


def factors(reference, loss_of_z, params, x, biased, compiled=jax.jit):
    """{layer: (A, B)}: A = mean of a a' over rows, B = sum over rows r of J_r' H J_r.

    H is the Hessian of the total loss in the network's output, J_r the Jacobian of that output in
    row r of the layer's output.
    """
    z, inputs, shapes = recorded(reference, params, x, compiled)
    if not inputs:
        return {}

    def perturbed(taps):
        seen = {}

        def tap(name, a, y):
            i = seen[name] = seen.get(name, -1) + 1
            return y + taps[name][i]

        return reference(params, x, tap).reshape(-1)

    zeros = {name: [jnp.zeros(s) for s in shape] for name, shape in shapes.items()}
    jacobians = compiled(jax.jacrev(perturbed))(zeros)
    hessian = compiled(jax.hessian(lambda flat: loss_of_z(flat.reshape(z.shape))))(z.reshape(-1))
    out = {}
    for name, uses in inputs.items():
        a = np.concatenate([a.reshape(-1, a.shape[-1]) for a in uses])
        if name in biased:
            a = np.concatenate([a, np.ones((len(a), 1))], axis=1)
        j = [np.reshape(j, (z.size, -1, j.shape[-1])) for j in jacobians[name]]
        j = np.concatenate(j, axis=1)
        curved = np.tensordot(hessian, j, 1)
        out[name] = (a.T @ a / len(a), np.einsum("irp,irq->pq", j, curved, optimize=True))
    return out


def rows(reference, loss_of_z, params, x, biased, compiled=jax.jit):
    """{layer: (a, g)}: input rows and output cotangents of every example, by brute force.

    `a` is (examples, rows, d_in), every use and position of an example a row; `g` is
    (examples, outputs, rows, d_out), one cotangent for each entry c of an example's output z_n,
    scaled so that sum_c z_nc z_nc' is the Hessian of the loss, which must be diagonal.
    """
    z, inputs, shapes = recorded(reference, params, x, compiled)

    def perturbed(taps):
        seen = {}

        def tap(name, a, y):
            i = seen[name] = seen.get(name, -1) + 1
            return y + taps[name][i]

        return reference(params, x, tap).reshape(len(z), -1)

    zeros = {name: [jnp.zeros(s) for s in shape] for name, shape in shapes.items()}
    jacobians = compiled(jax.jacrev(perturbed))(zeros)
    curvature = compiled(jax.hessian(loss_of_z))(z).reshape(z.size, z.size)
    roots = np.sqrt(np.diagonal(curvature)).reshape(len(z), -1)
    out = {}
    for name, uses in inputs.items():
        a = np.concatenate([a.reshape(len(a), -1, a.shape[-1]) for a in uses], axis=1)
        if name in biased:
            a = np.concatenate([a, np.ones((*a.shape[:2], 1))], axis=2)
        each = range(len(z))
        own = [np.stack([np.asarray(j)[n, :, n] for n in each]) for j in jacobians[name]]
        own = [j.reshape(*j.shape[:2], -1, j.shape[-1]) for j in own]
        out[name] = (a, np.concatenate(own, axis=2) * roots[..., None, None])
    return out


def recorded(reference, params, x, compiled):
    """The output, and of every use of a layer its input and the shape of its output."""
    shapes = {}

    def run(params, x):
        inputs = {}

        def record(name, a, y):
            inputs.setdefault(name, []).append(a)
            shapes.setdefault(name, []).append(y.shape)
            return y

        return reference(params, x, record), inputs

    z, inputs = compiled(run)(params, x)
    return z, jax.tree.map(np.asarray, inputs), shapes
