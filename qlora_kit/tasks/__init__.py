"""What a sample means: one file a task. Everything else asks a `Task` and knows none by name."""
