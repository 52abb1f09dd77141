"""LoRA: the layer, where it is attached, and the files it is kept in."""
