"""Paths from cached prefixes: the expert's flow steps, on a GPU as one CUDA graph."""

BASE, TRAINED = "base", "trained"
"""Labels of the unmodified checkpoint and of what a run made of it, wherever both are compared."""
