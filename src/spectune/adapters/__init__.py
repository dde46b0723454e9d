"""Adapters away from their models: algebra, files and PEFT's format."""
