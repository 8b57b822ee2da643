"""Samples, poses, the action space, and the strata by which results are told apart."""
