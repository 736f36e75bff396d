"""The targets on CPU and GPU, and one command that checks a GPU machine."""
