"""Every error the kit raises on purpose, with the exit code a shell sees.

    QloraKitError              1   internal: something the kit should have handled
    ├── InputError             2   what the user gave cannot be used
    │   ├── ConfigError            a flag or configuration key
    │   ├── DataError              a record, a data file, a template
    │   ├── ModelError             a model name, architecture or checkpoint
    │   ├── AdapterError           an adapter folder
    │   └── OutputError            an output folder that must not be touched
    ├── EnvironmentFault       3   the machine around the kit
    │   ├── HubError               hub out of reach, access not granted
    │   └── StorageError           disk full, permission, damaged file
    ├── NumericsError          4   a loss or gradient that is not a finite number
    └── VerificationError      5   a result that failed its own check

A message has three parts: what was found, what was expected, what to do. It is one line a
fault, and never contains sample text or a token.
"""

from __future__ import annotations

from collections.abc import Sequence

EXIT_INTERRUPTED = 130


class QloraKitError(Exception):
    """Base of all errors the kit raises on purpose.

    Args:
        faults: one line each; several when independent faults were collected before raising.
    """

    exit_code = 1

    def __init__(self, *faults: str) -> None:
        super().__init__("\n".join(faults))
        self.faults: Sequence[str] = faults


class InputError(QloraKitError):
    """What the user gave cannot be used."""

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
    """A file could not be written or read back as it was written."""


class NumericsError(QloraKitError):
    """A loss or gradient is not a finite number."""

    exit_code = 4


class VerificationError(QloraKitError):
    """A result failed its own check."""

    exit_code = 5
