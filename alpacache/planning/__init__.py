"""Bytes, memory and time before they are spent."""
