"""What libraries raise on a model's files, as one line."""

from __future__ import annotations

from contextlib import AbstractContextManager

from qlora_kit.errors import ModelError, raised_as, said
from qlora_kit.model.memory import is_out_of_memory


def model_errors(where: object, expected: str) -> AbstractContextManager[None]:
    """Turn whatever is raised inside the block into one line about a model's file.

    transformers and tokenizers raise from many trees, and a damaged or hostile file reaches
    any line of theirs: for the user it is the file that is at fault, in each case. Running out
    of memory is not, and passes.

    Args:
        where: what stands before the reason: a file, or the name of an architecture.
        expected: what a good file would hold.

    Raises:
        ModelError: in place of the error.
    """

    def line(error: BaseException) -> str | None:
        return f"{where}: {said(error)}; expected {expected}" if _is_of_the_file(error) else None

    return raised_as(ModelError, line, of=BaseException)


def _is_of_the_file(error: BaseException) -> bool:
    # Where its Rust code fails, tokenizers raises what is no Exception, so by name.
    if type(error).__name__ == "PanicException":
        return True
    return isinstance(error, Exception) and not is_out_of_memory(error)
