"""The frozen VLM's KV cache as a value: packed, encoded, and attended to."""
