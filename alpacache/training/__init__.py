"""Stage two: the expert learns from the store alone."""
