"""Use a model: measure its loss on rows, generate text."""
