"""From the name of a model to a loaded base with its tokenizer, and the adapter put on it.

The recipes share it, and users of the API start with it. It imports torch inside its functions
only, after everything that can be checked without torch.
"""
