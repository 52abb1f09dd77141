"""Turns the errors that libraries raise about a model's files into one line."""

from __future__ import annotations

from contextlib import AbstractContextManager

from qlora_kit.errors import ModelError, raised_as, said


def model_errors(where: object, expected: str) -> AbstractContextManager[None]:
    """Turn any error inside the block into one line about a model's file.

    transformers and tokenizers raise errors of many classes, and a damaged or hostile file can
    reach any line of their code. To the user, the fault is the file's in each case. An error of
    memory that ran out is not the file's fault, and passes.

    Args:
        where: the beginning of the line: a file, or the name of an architecture.
        expected: the content of a good file, in words.

    Raises:
        ModelError: in place of the error.
    """

    def line(error: BaseException) -> str | None:
        return f"{where}: {said(error)}; expected {expected}" if _is_of_the_file(error) else None

    return raised_as(ModelError, line, of=BaseException)


def _is_of_the_file(error: BaseException) -> bool:
    # Where its Rust code fails, tokenizers raises a class that is no Exception; it is told by name.
    if type(error).__name__ == "PanicException":
        return True
    from qlora_kit.model.memory import is_out_of_memory

    return isinstance(error, Exception) and not is_out_of_memory(error)
