"""Lowers the memory of a step: recomputation, offloaded checkpoints, MLPs in tiles.

Changes a loaded model in place. Has no loop, and touches no files.
"""
