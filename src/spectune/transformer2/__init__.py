"""Transformer-squared: adapters of a library that are chosen, mixed and learned for a prompt (arXiv 2501.06252)."""
