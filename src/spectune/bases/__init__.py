"""Base models: loaded by name, read from a config, generating and classifying."""
