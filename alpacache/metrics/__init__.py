"""How far paths are from the truth, what is lost by driving straight, and how sure one can be of it."""
