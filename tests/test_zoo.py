"""Every model of the zoo: its parameters have the expected kinds, and one step of K-FAC is finite.

The step is the one that users take: value and gradient, statistics of the sampled Fisher, update,
all in one jitted call. Where examples can be told apart, the diagonal of the empirical Fisher is
compared with squared gradients of single examples as well.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo.haiku
import zoo.linen
import zoo.nnx
import zoo.plain
from zoo import MODELS, check_finite, check_kinds, defaults

import curvature


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    with defaults():
        registry, params, args = MODELS[name].register()
        problem = None
        try:
            check_kinds(registry, params, MODELS[name].expected)
        except AssertionError as error:  # the step is tried as well: two different failures
            problem = error
        step(registry, params, args)
    if problem is not None:
        raise problem


def step(registry, params, args):
    """One step of K-FAC from the start, which must be finite."""
    tx = curvature.kfac(registry, learning_rate=0.1, damping=1e-2, kind=curvature.Fisher(1))

    def run(params, args, key):
        loss_and_grads = jax.value_and_grad(registry.loss_fn, has_aux=registry.has_aux)
        value, grads = loss_and_grads(params, *args)
        updates, state = tx.update(grads, tx.init(params), params, loss_args=args, key=key)
        return value, grads, updates, state

    value, grads, updates, state = zoo.jit(run)(params, args, jax.random.key(1))
    check_finite({"loss": value[0] if registry.has_aux else value})
    check_finite({"gradient": grads})
    assert int(state.stats.skipped) == 0
    assert int(state.stats.failed_refreshes) == 0
    check_finite({"statistics": state.curvature.statistics})
    check_finite({"update": updates})
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(updates)]
    assert shapes == [(x.shape, x.dtype) for x in jax.tree.leaves(params)]
    moved = [bool(np.any(np.asarray(u, np.float32))) for u in jax.tree.leaves(updates)]
    had_gradient = [bool(np.any(np.asarray(g, np.float32))) for g in jax.tree.leaves(grads)]
    assert moved == had_gradient


# Examples that depend on each other, weights of the loss that differ, or state of the size of a
# batch: no gradient of a single example can be taken from outside.
COUPLED = {
    "haiku/batch_norm_cnn",
    "haiku/lstm_static_two_deep",  # time first
    "linen/actor_critic",
    "linen/bert",
    "linen/clip",
    "linen/dilated_segmentation",
    "linen/dropout_and_two_losses",
    "linen/mixture_of_experts",
    "linen/resnet",
    "linen/resnet_fine_tuned",
    "linen/sequence_to_sequence",
    "linen/siamese",
    "linen/variational_autoencoder",
    "nnx/batch_norm_cnn",
    "nnx/low_rank_adapters",
    "plain/flow_with_mixture",
    "plain/graph_attention",
    "plain/message_passing",
    "plain/actor_of_trajectories",  # time first, then examples
    "plain/data_parallel",
    "plain/micro_batches",
    "plain/padded_tagger",
    "plain/spectral_norm",
}
# What normalises these weights is held constant: the blocks are the exact ones given the norms
# (tests/test_respell.py), and no gradient from outside is that.
NORMALISED = {"linen/weight_norm", "linen/weight_standardisation"}
SUMMED = {"nnx/convolutional_autoencoder", "plain/ensemble"}  # over the units of an example
HALF_PRECISION = {"haiku/mixed_precision", "linen/tied_language_model_bfloat16"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name not in COUPLED | NORMALISED])
def test_diagonal_equals_gradients_of_single_examples(name):
    with defaults():
        registry, params, args = MODELS[name].register()
        (tag,) = registry.losses
        diagonal = registry.override("*", block="diagonal")
        estimator = curvature.Estimator(diagonal, curvature.EmpiricalFisher())

        def run(params, args, key):
            return estimator(params, *args, key=key).diagonal()

        found = zoo.jit(run)(params, args, jax.random.key(1))
        gradient = zoo.jit(jax.grad(registry.loss_fn))
        leaves, tree = jax.tree.flatten(args)
        gradients = []
        for n in range(zoo.BATCH):
            one = [x[n : n + 1] if x.ndim else x for x in leaves]
            gradients.append(gradient(params, *jax.tree.unflatten(tree, one)))
        expected = jax.tree.map(lambda *g: sum(jnp.square(x) for x in g), *gradients)

    # With a weight w of each unit of the loss (a position, a pixel), and v in the loss of a single
    # example, the curvature is w / v^2 times that square: U / N in a mean over N examples of U
    # units, 1 / N where the units of an example are summed.
    units = math.prod(tag.z.shape[: len(tag.z.shape) - tag.loss.event_ndim]) * math.prod(tag.lead)
    ratio = (1 if name in SUMMED else units // zoo.BATCH) / zoo.BATCH
    limit, floor = (0.05, 1e-6) if name in HALF_PRECISION else (1e-3, 1e-9)
    known = {p for x in registry.layers if x.kind != "generic" for p in x.parameters}
    for (path, want), got in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True
    ):
        key = jax.tree_util.keystr(path)
        if key in known:
            atol = limit * ratio * float(np.abs(want).max()) + floor
            np.testing.assert_allclose(got, want * ratio, rtol=0, atol=atol, err_msg=key)
