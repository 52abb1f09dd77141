"""Listens to events: the terminal, the log, the plot, the model card."""
