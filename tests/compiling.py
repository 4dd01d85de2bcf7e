"""Settings that shorten compilation, of which the time of tests consists; import it before jax."""

import functools
import os

import jaxlib.version

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads and XLA's wait for each other

# Half of the time was spent on setting up MLIR for each kernel of a few numbers, which XLA's older
# emitters do not; newer releases have no older ones.
if jaxlib.version.__version_info__[:2] <= (0, 10):
    _quickly = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_quickly}"

from jax._src.interpreters import mlir

# Thousands of small programs are lowered. A context for each was a quarter of the rest; one does.
mlir.make_ir_context = functools.cache(mlir.make_ir_context)
