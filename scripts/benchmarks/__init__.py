"""The parts of `benchmark.py`.

networks.py        plain-JAX networks: dense, residual convolutions, transformer
problems.py        a network, its loss and its data, behind one `Problem`
optimizers.py      every optimizer with the settings that are tried for it
kfac_jax.py        the same for kfac-jax, from a checkout
protocol.py        tuning, runs and their clock
split.py           where the seconds of a step of ours go
results.py         JSON files, medians, the printed table
plots.py           loss against steps and seconds
side_by_side.py    time of a step beside kfac-jax and Adam
"""
