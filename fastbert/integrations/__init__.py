"""Integrations that run other libraries' models on fastbert."""
