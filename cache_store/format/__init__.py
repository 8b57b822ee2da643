"""Content of a store's files, and how it is checked: docs/reference/cache-format.md as code."""
