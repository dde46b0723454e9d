"""What a GPU does with Spectune: correctness, step time, decompositions, many adapters at once, a whole job."""
