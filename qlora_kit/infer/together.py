"""Text from a base that several processes hold together: one of them asks, and all generate.

Takes the base and its tokenizer; the process that writes the samples of a run leads, and the others
follow until it has done its work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from qlora_kit.infer.generate import Sampling, generate
from qlora_kit.model.load import Base
from qlora_kit.parallel.one import Processes

Result = TypeVar("Result")


@dataclass(frozen=True)
class Together:
    """Generation that needs all processes.

    Attributes:
        base: the model, of which each process has a part.
        tokenizer: its tokenizer.
        processes: the processes; the writer leads.
    """

    base: Base
    tokenizer: Any
    processes: Processes

    def led(self, work: Callable[[], Result]) -> Result:
        """Do work in the writer that may call `continued`; the others `follow` meanwhile."""
        try:
            return work()
        finally:
            self._tell(None)

    def continued(
        self,
        base: Base,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        batch_size: int,
    ) -> Iterator[str]:
        """Continue prompts in all processes, see `generate`; the caller takes all of the texts."""
        self._tell((prompts, sampling, batch_size))
        with self.processes.computing():
            yield from generate(base, tokenizer, prompts, sampling, batch_size)

    def follow(self) -> None:
        """Generate whatever the writer asks for, until its work is done."""
        while (asked := self._tell(None)) is not None:
            with self.processes.computing():
                list(generate(self.base, self.tokenizer, *asked))

    def _tell(self, asked: Any) -> Any:
        return self.processes.from_writer(lambda: asked)
