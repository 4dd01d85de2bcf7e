"""Parts of `compare.py`: where a model and its data come from, and what is written."""
