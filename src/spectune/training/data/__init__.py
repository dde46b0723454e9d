"""Records, the examples that they become, and the packed rows of a batch."""

from spectune.training.data.encoding import Encoded, Encoder, Example, encode_one, encode_turns

__all__ = ["Encoded", "Encoder", "Example", "encode_one", "encode_turns"]
