"""Stage one: the frozen VLM runs once a sample, and what it leaves behind goes to a store."""
