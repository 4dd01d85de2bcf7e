"""Settings that shorten compilation, of which the time of tests consists; import it before jax."""

import functools
import gc
import os
import pathlib

import jaxlib.version

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads and XLA's wait for each other

os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_cpu_parallel_codegen_split_count=1"]
)
# Half of the time was spent on setting up MLIR for each kernel of a few numbers, which XLA's older
# emitters do not; newer releases have no older ones.
if jaxlib.version.__version_info__[:2] <= (0, 10):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import jax
from jax._src import lru_cache
from jax._src.interpreters import mlir

# Thousands of small programs are lowered. A context for each was a quarter of the rest; one does.
mlir.make_ir_context = functools.cache(mlir.make_ir_context)

# What was compiled is kept for the next run, which then takes two thirds of the time; a first one
# takes 6 % more. `scripts/test` removes what is old: JAX's own limit on the folder's size looks
# through all of it for each program.
KEPT = pathlib.Path(__file__).parents[1] / ".cache/jax"


def _put(self: lru_cache.LRUCache, key: str, value: bytes) -> None:
    """Writes the whole at once: other processes read the same files."""
    part = self.path / f"{key}.{os.getpid()}"
    part.write_bytes(value)
    os.replace(part, self.path / f"{key}-cache")


lru_cache.LRUCache.put = _put
if "CI" not in os.environ and os.access(KEPT.parents[1], os.W_OK):
    jax.config.update("jax_compilation_cache_dir", str(KEPT))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Programs and traces are many objects that stay: to look through them for garbage was a fifteenth.
gc.set_threshold(20_000, 20, 100)
