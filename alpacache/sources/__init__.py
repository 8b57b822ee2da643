"""Where samples come from: a folder, PhysicalAI-AV, a prepared dataset, generated drives."""
