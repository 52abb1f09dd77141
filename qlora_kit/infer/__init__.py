"""Uses a loaded model: measures its loss on rows, and generates text. Never trains it."""
