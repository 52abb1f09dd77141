"""GGUF: merged models and LoRA adapters as llama.cpp and Ollama read them.

`families` is the table of architectures; `vocabulary` describes a tokenizer, `encoding` the types
of numbers. `model_file` and `adapter_file` write, and read again what they wrote; `modelfile` is
for Ollama.
"""
