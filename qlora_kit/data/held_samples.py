"""Samples that are all read and checked, and whose tokens are made while training.

Takes `Samples`; stands where a stream stands, with the samples in memory instead of in files. So
their rows are drawn, tokenised, counted and resumed as those of a stream are. Never tokenises.
Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from qlora_kit.config import RecordOptions
from qlora_kit.data import streamed_samples
from qlora_kit.data.samples import Samples, content_of
from qlora_kit.data.shapes import Sample


@dataclass
class HeldSamples:
    """The samples of one source, all of them in memory, see `SampleStream`.

    Attributes:
        whole: the samples.
        options: how their records were understood.
        sources: number of the sources of the run, which share what is looked at before training.
        why: the reason that they are not tokenised before training, in words.
        skipped: none: records with a fault were left out, and told, when they were read.
    """

    whole: Samples
    options: RecordOptions
    sources: int = 1
    why: str = field(default="", init=False)
    skipped: int = field(default=0, init=False)
    first_skipped: str = field(default="", init=False)
    is_of_hub: bool = field(default=False, init=False)

    @property
    def data(self) -> str:
        """The source in words."""
        return self.whole.source

    name = data

    @property
    def text_bytes(self) -> int:
        """Bytes of text that may be learnt."""
        return self.whole.text_bytes

    @cached_property
    def content_hash(self) -> str:
        """The SHA-256 of all that may be learnt."""
        return self.whole.content_hash()

    def samples(self) -> Iterator[Sample]:
        """Yield all samples, in the order in which they were read."""
        yield from self.whole.items

    def head(self) -> Samples:
        """Return the first samples, as many as of a stream are looked at before training."""
        count = self._looked_at()
        are_all = count == len(self.whole.items)
        return replace(
            self.whole.first(count),
            source=self.data if are_all else f"{self.data}, the first {count:,} records",
            stream=self,
        )

    def _looked_at(self) -> int:
        """Return how many samples are looked at before training: one at least."""
        most = streamed_samples.HEAD_CHARACTERS // self.sources
        items, size = self.whole.items[: streamed_samples.HEAD_RECORDS], 0
        for count, sample in enumerate(items, 1):
            size += len(content_of(sample))
            if size > most:
                return count
        return len(items)
