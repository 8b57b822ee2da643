"""How keys and values become bytes: the codecs of the format and their reference in numpy."""
