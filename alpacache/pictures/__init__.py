"""Drawings of paths: from above, and in the front camera's picture."""
