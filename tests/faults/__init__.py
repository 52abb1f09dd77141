"""What the kit promises under faults, shown with figures: `python -m tests.faults`."""
