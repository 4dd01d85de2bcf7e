"""Shared parts of the two example programs, `train.py` and `demo.py`.

One plain-JAX training loop serves Flax linen, Flax NNX and Haiku alike, which is the point: the
library sees a loss function and a tree of parameters, never a framework.

    data.py        scikit-learn's handwritten digits, split and batched
    problems.py    the same three networks in each framework, behind one `Problem`
    optimizers.py  K-FAC, Adam and SGD behind one call
    loop.py        the training loop and its clock
    folder.py      what a run writes while it goes on; checkpoints and resuming
    search.py      the learning-rate search, the same for every optimizer
    fisher.py      true against empirical Fisher, layer by layer
    plots.py       training curves as PNG files
    report.py      tables for the terminal, metrics as JSON
"""
