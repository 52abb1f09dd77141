"""The mathematics of one step: weights that multiply, frozen and LoRA layers, MLP, head, loss."""

import logging

# Set before bitsandbytes is first imported: without the optional `kernels` package it logs a failed
# import at every start.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
