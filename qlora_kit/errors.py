"""Every error that the kit raises on purpose, and the exit code that a shell sees.

    QloraKitError              1   internal: something the kit should have handled
    ├── InputError             2   the user's input cannot be used
    │   ├── ConfigError            a flag or configuration key
    │   ├── DataError              a record, a data file, a template
    │   ├── ModelError             a model name, architecture or checkpoint
    │   ├── AdapterError           an adapter folder
    │   └── OutputError            an output folder that must not be touched
    ├── EnvironmentFault       3   the machine around the kit
    │   ├── HubError               hub out of reach, access not granted
    │   ├── StorageError           disk full, permission, damaged file, folder in use
    │   ├── WorkerLost             a process that works for a run is gone
    │   └── OutOfMemory            of the device or the host, at the smallest possible batch
    │       └── TornStep               while weights were updated: they must not be saved
    ├── NumericsError          4   losses or gradients that are not finite numbers
    │   └── LearningError          an adapter that does not learn
    └── VerificationError      5   a result that failed its own check

A message has three parts: what was found, what was expected, what to do. Each fault is one line.
It never contains sample text, nor a token: `redact` takes tokens out. `raised_as` turns errors of
libraries into these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qlora_kit.redact import one_line

EXIT_INTERRUPTED = 130
"""exit code of a Ctrl-C that `signals` does not handle; a handled signal exits with 128 + number"""

_MOST_CHARACTERS = 200


class QloraKitError(Exception):
    """Base of all errors the kit raises on purpose.

    Args:
        faults: one line each; several where independent faults were collected before raising.
    """

    exit_code = 1

    def __init__(self, *faults: str) -> None:
        self.faults: Sequence[str] = tuple(one_line(fault) for fault in faults)
        super().__init__("\n".join(self.faults))


class InputError(QloraKitError):
    """The user's input cannot be used."""

    exit_code = 2


class ConfigError(InputError):
    """A flag or configuration key is unknown, or its value is not usable."""


class DataError(InputError):
    """A data file or record is not usable."""


class ModelError(InputError):
    """A model is unknown, not a causal language model, or its checkpoint does not fit it."""


class AdapterError(InputError):
    """An adapter folder is missing, incomplete, or made for another base."""


class OutputError(InputError):
    """An output folder holds something that would be overwritten."""


class EnvironmentFault(QloraKitError):  # noqa: N818 - EnvironmentError is a builtin
    """The machine around the kit: hub, disk, memory, permission."""

    exit_code = 3


class HubError(EnvironmentFault):
    """The model or data hub is out of reach, or does not grant access."""


class StorageError(EnvironmentFault):
    """A file could not be written, or is not as it was written."""


class WorkerLost(EnvironmentFault):
    """A process that works for this one has ended before its work did."""


class OutOfMemory(EnvironmentFault):
    """The device or the host has no memory left, and the batch cannot be halved any further."""


class TornStep(OutOfMemory):
    """Memory ran out while the weights were updated: some are already those of the next step."""


class NumericsError(QloraKitError):
    """Losses or gradients are not finite numbers."""

    exit_code = 4


class LearningError(NumericsError):
    """A part of the adapter gets no gradient, or does not move."""


class VerificationError(QloraKitError):
    """A result failed its own check."""

    exit_code = 5


# ---------------------------------------------------------------- errors of others


@contextlib.contextmanager
def raised_as(
    kind: type[QloraKitError],
    line: str | Callable[[Any], str | None],
    of: type[BaseException] | tuple[type[BaseException], ...] = Exception,
) -> Iterator[None]:
    """Turn an error that is raised inside the block into an error of the kit.

    Args:
        kind: the class of the new error.
        line: the line of the new error, or a function that makes it from the old one; if the
            function returns None, the old error passes.
        of: the classes of errors to turn. The kit's own errors pass, unless they are named here.

    Raises:
        QloraKitError: an error of `kind`, in place of the old one.
    """
    try:
        yield
    except of as error:
        if isinstance(error, QloraKitError) and of in (Exception, BaseException):
            raise
        fault = line(error) if callable(line) else line
        if fault is None:
            raise
        raise kind(fault) from error


def reason(error: OSError) -> str:
    """Return the system's words for an error, in lower case: "no space left on device"."""
    return (error.strerror or str(error)).lower()


def first_line(error: BaseException, most: int = _MOST_CHARACTERS) -> str:
    """Return the first line of an error's message, at most `most` characters; else its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]


def said(error: BaseException) -> str:
    """Return the whole message of an error in one line; its class where the message is too bare."""
    # A KeyError quotes its message.
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    text = " ".join(str(message).split()).rstrip(".")
    if len(text) > _MOST_CHARACTERS:
        text = f"{text[:_MOST_CHARACTERS]} …"
    # A message of a single word, such as a KeyError's, says nothing without the class.
    return text if " " in text else f"{type(error).__name__}: {text}".rstrip(": ")
