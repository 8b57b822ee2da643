"""The cached samples as a data set: what a sample holds, whose it is, its place in an epoch, and the ring."""
