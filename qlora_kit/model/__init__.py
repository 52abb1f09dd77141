"""Names and architectures, tokenizer, weights: a base loaded quantised and frozen."""
