"""Fine-tuning: trains a model for a task from a checkpoint and labelled examples, and writes a report."""
