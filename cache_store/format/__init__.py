"""The format of a store, version 1 (docs/reference/cache-format.md): what its files hold and how they are checked."""
