"""Cached samples: their fields, which model they belong to, their order, and their way to the device."""
