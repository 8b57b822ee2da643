"""Paths from cached features: flow steps of the expert, as predictions and as one CUDA graph."""
