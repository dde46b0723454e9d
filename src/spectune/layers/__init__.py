"""The adapted layer, its cores and their products."""
