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
    │   ├── StorageError           disk full, permission, damaged file, folder in use
    │   └── OutOfMemory            of the device or the host, at the smallest batch there is
    │       └── TornStep               while weights were updated: they are not to be saved
    ├── NumericsError          4   losses or gradients that are not finite numbers
    │   └── LearningError          an adapter that does not learn
    └── VerificationError      5   a result that failed its own check

A message has three parts: what was found, what was expected, what to do. It is one line a
fault, and never contains sample text or a token: `redact` sees to the latter.
"""

from __future__ import annotations

from collections.abc import Sequence

from qlora_kit.redact import one_line

EXIT_INTERRUPTED = 130
"""of a Ctrl-C that `signals` does not handle; a handled signal exits with 128 + its number"""


class QloraKitError(Exception):
    """Base of all errors the kit raises on purpose.

    Args:
        faults: one line each; several when independent faults were collected before raising.
    """

    exit_code = 1

    def __init__(self, *faults: str) -> None:
        self.faults: Sequence[str] = tuple(one_line(fault) for fault in faults)
        super().__init__("\n".join(self.faults))


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


class OutOfMemory(EnvironmentFault):
    """The device or the host has no memory left, and there is nothing to halve any more."""


class TornStep(OutOfMemory):
    """Memory ran out while the weights were updated: some are those of the next step."""


class NumericsError(QloraKitError):
    """Losses or gradients are not finite numbers."""

    exit_code = 4


class LearningError(NumericsError):
    """A part of the adapter gets no gradient, or does not move."""


class VerificationError(QloraKitError):
    """A result failed its own check."""

    exit_code = 5
