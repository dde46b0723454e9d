"""The trainer, the order of its examples, and checkpoints of the adapter alone."""
