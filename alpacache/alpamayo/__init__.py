"""The Alpamayo model family: everything that imports model classes of transformers."""
