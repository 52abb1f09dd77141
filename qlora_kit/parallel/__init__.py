"""The processes of a run: sums over all of them, decisions they share, and which of them writes."""
