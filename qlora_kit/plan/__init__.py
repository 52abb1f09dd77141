"""Predict the memory of a run by running its own code on fake tensors. Nobody below imports it."""
