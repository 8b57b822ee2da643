"""What the files of a store hold, and how they are checked: docs/reference/cache-format.md as code."""
