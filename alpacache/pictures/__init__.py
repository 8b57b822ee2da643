"""Drawing: paths from above and in the front camera's picture."""
