"""One forward and backward pass: hidden states, chunked loss, recomputation. No loop, no files."""
