"""Private names of transformers that the kit uses (5.17 to 5.23), all of them in this file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import masking_utils


@contextlib.contextmanager
def masks_as_in_a_run() -> Iterator[None]:
    """Let models leave out in a simulation the attention masks that they leave out in a run.

    transformers builds them all for tracers, which fake tensors look like.
    """
    module: Any = masking_utils
    is_tracing = module.is_tracing
    module.is_tracing = lambda *_: False
    try:
        yield
    finally:
        module.is_tracing = is_tracing
