"""A decoder-only transformer on bytes of text, from 0.1 M to over 100 M parameters by flags.

| file | subject |
|---|---|
| `config.py` | the network's sizes |
| `mathematics.py` | rotary positions, causal attention |
| `linen_model.py`, `nnx_model.py` | the network in Flax linen and Flax NNX |
| `text.py` | windows of the running Python's own sources |
| `place.py` | meshes, processes, and how arrays are divided over them |
| `recipes.py` | optimizers with their schedules |
| `run.py` | the training loop |
| `command.py` | the command line |
"""
