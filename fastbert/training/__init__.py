"""Training: pre-training data, objectives and loops over the models."""
