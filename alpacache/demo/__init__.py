"""The demo: a tiny model of our own that takes the whole way from generated drives to a cured straight-line bias."""
