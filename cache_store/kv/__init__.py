"""Codecs of keys and values: the format's, with their reference in numpy."""
