"""Shows a run to people: the terminal, the log, trackers, plots, model cards and pages."""
