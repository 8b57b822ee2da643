"""Stage one: the frozen VLM runs once per sample, and what it leaves behind goes to a store."""
