"""The singular values of a checkpoint, measured layer by layer as a stream, and the report of them."""
