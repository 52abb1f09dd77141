"""What libraries raise on a model's files, as one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from qlora_kit.errors import ModelError, QloraKitError
from qlora_kit.model.memory import is_out_of_memory

_MOST_CHARACTERS = 200


@contextlib.contextmanager
def model_errors(where: object, expected: str) -> Iterator[None]:
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
    try:
        yield
    except BaseException as error:
        if not _is_of_the_file(error):
            raise
        raise ModelError(f"{where}: {reason(error)}; expected {expected}") from error


def _is_of_the_file(error: BaseException) -> bool:
    # Where its Rust code fails, tokenizers raises what is no Exception, so by name.
    if type(error).__name__ == "PanicException":
        return True
    ours = isinstance(error, QloraKitError) or is_out_of_memory(error)
    return isinstance(error, Exception) and not ours


def reason(error: BaseException) -> str:
    """Return what an error says in one line, at least its kind."""
    # A KeyError quotes its message.
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    text = " ".join(str(message).split()).rstrip(".")
    if len(text) > _MOST_CHARACTERS:
        text = f"{text[:_MOST_CHARACTERS]} …"
    # A message that is a bare name, as of a KeyError, says nothing without the kind.
    return text if " " in text else f"{type(error).__name__}: {text}".rstrip(": ")
