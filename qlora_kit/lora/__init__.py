"""LoRA on a base: attaching its layers, and reading and writing the files of an adapter."""
