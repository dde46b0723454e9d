"""What makes someone else's model faster and leaves its answers: attention, norms, loss, products, recomputation."""
