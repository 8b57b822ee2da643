"""Data sources: folders, PhysicalAI-AV, prepared datasets, generated drives. `source` says what one promises."""
