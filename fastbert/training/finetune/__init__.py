"""Fine-tuning: a checkpoint and labelled examples in, a model for a task and a report out."""
