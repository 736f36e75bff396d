"""Distillation: a smaller student learns to imitate a teacher with a head."""
