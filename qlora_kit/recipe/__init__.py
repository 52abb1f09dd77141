"""The order of the stages: the only package that knows it. It reads like the README.

Each function is one command: it takes the command's configuration and a listener, and returns a
plain dictionary for programs. torch is imported only after everything that can be checked
without it has been.
"""

from qlora_kit.recipe.chatting import chat
from qlora_kit.recipe.checking import check
from qlora_kit.recipe.exporting import export, quantize
from qlora_kit.recipe.generating import generate
from qlora_kit.recipe.listing import runs
from qlora_kit.recipe.measuring import evaluate
from qlora_kit.recipe.planning import plan
from qlora_kit.recipe.pushing import list_push
from qlora_kit.recipe.serving import serve
from qlora_kit.recipe.sweeping import sweep
from qlora_kit.recipe.training import train

__all__ = [
    "chat", "check", "evaluate", "export", "generate", "list_push", "plan", "quantize", "runs",
    "serve", "sweep",
    "train",
]  # fmt: skip
