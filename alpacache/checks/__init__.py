"""What can be wrong before anything is spent: with a source of drives (`check`), with this machine (`doctor`)."""
