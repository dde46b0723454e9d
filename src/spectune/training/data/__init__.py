"""Records, the examples that they become, and the packed rows of a batch."""
