"""Reading and writing models on disk and from a hub: one module for each kind of file."""
