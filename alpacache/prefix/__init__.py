"""What the frozen VLM leaves behind: its KV cache as a value, packed, encoded, and attended to."""
