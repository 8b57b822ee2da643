"""Storage of ragged per-sample arrays: transactional, checksummed, readable by any Zarr v3 reader. Knows no model."""
