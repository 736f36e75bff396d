"""Distillation: a teacher with a head, and a smaller student that learns to do as it does."""
