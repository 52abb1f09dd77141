"""The mathematics of one step: weights that multiply, frozen and LoRA layers, MLP, head, loss."""

import logging

# Before its first import: without the optional `kernels` package bitsandbytes logs a failed import
# at every start.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
