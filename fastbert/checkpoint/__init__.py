"""Reading and writing models on disk and from a hub: one module a kind of file."""
