"""Who else computes: sums over all processes, decisions that all take alike, and who writes."""
