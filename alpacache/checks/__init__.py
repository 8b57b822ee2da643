"""Checks before anything is spent: of a source of drives (`check`), of this machine (`doctor`)."""
