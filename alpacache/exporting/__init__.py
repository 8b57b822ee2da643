"""The way back: a checkpoint that the public Alpamayo code loads."""
