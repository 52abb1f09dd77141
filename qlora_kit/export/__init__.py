"""Turn a trained adapter into files that other tools serve."""
