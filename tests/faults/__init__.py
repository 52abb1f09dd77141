"""The kit's promises under faults, shown with figures by `python -m tests.faults`."""
