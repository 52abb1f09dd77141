"""The tasks, one file each. A task says what a sample means.

All other code asks a `Task` and knows no task by name.
"""

from qlora_kit.tasks.causal import CAUSAL
from qlora_kit.tasks.task import Task

__all__ = ["CAUSAL", "Task"]
