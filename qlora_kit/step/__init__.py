"""Settles how a step is computed: what lowers its memory, and which fused kernels serve.

Changes a loaded model in place. Has no loop, and touches no files.
"""
