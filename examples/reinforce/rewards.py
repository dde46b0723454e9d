"""The reward of the example: one for the right word and nothing else, zero otherwise."""


def exact(completions, completion):
    """`completion` is the data's column, the right word; `completions` is what the model said."""
    return [float(said == right.strip()) for said, right in zip(completions, completion, strict=True)]
