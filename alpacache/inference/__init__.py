"""Paths from cached prefixes: the expert's flow steps, on a GPU as one CUDA graph."""
