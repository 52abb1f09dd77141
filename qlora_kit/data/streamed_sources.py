"""Several sources of training data, each of them a stream.

Takes the options of a run, or samples that are in memory; returns `StreamedSources`, of which
everything that looks at data before training sees one list of first samples. Never tokenises or
mixes. Imports neither torch nor
transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from qlora_kit.config import TrainConfig
from qlora_kit.data.fields import Faults
from qlora_kit.data.held_samples import HeldSamples
from qlora_kit.data.samples import Samples
from qlora_kit.data.sources import check_apart, joined, joined_names, record_options
from qlora_kit.data.streamed_samples import SampleStream
from qlora_kit.errors import DataError


@dataclass
class StreamedSources:
    """The samples of several sources, each read one after the other.

    Attributes:
        parts: the stream of each source.
        templates: the chat template of each source; None where it is the run's.
        why: the reason that the data are streamed, in words, where nobody asked for it.
        whole: the samples of all sources, joined, where they are in memory.
    """

    parts: Sequence[SampleStream | HeldSamples]
    templates: Sequence[str | None]
    why: str = field(default="", init=False)
    whole: Samples | None = None

    @classmethod
    def of(cls, config: TrainConfig) -> StreamedSources:
        """Open the sources of a run.

        Raises:
            ConfigError: a source stands twice, or is of a form that is read whole.
            DataError: there is nothing of a name; faults of all sources are collected.
            HubError: the hub is out of reach.
        """
        check_apart(config.sources)
        parts, faults = [], Faults()
        for number, source in enumerate(config.sources):
            try:
                parts.append(SampleStream(source.path, record_options(config, number), config.task))
            except DataError as error:
                faults.add(*error.faults)
        faults.raise_if_any()
        return cls(parts, [source.chat_template for source in config.sources])

    @classmethod
    def held(cls, whole: Samples, config: TrainConfig) -> StreamedSources:
        """Return sources whose samples are in memory.

        Args:
            whole: the samples of all sources, joined.
            config: the options of the run.
        """
        parts = [
            HeldSamples(part, record_options(config, number), len(whole.parts))
            for number, part in enumerate(whole.parts)
        ]
        return cls(parts, [part.chat_template for part in whole.parts], whole)

    @property
    def data(self) -> str:
        """The sources in words."""
        return joined_names([part.data for part in self.parts])

    name = data

    @property
    def is_of_hub(self) -> bool:
        """Whether one of them is a data set of the hub."""
        return any(part.is_of_hub for part in self.parts)

    @property
    def text_bytes(self) -> int:
        """Bytes of text of all files, roughly, see `SampleStream`."""
        return sum(part.text_bytes for part in self.parts)

    @property
    def content_hash(self) -> str:
        """The SHA-256 of all that decides the samples, see `SampleStream`."""
        hashes = [part.content_hash for part in self.parts]
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()

    @property
    def skipped(self) -> int:
        """Records of all sources that were left out for a fault, as far as they have been read."""
        return sum(part.skipped for part in self.parts)

    @property
    def first_skipped(self) -> str:
        """The fault of the first of them."""
        return next((part.first_skipped for part in self.parts if part.skipped), "")

    def head(self) -> Samples:
        """Return the first samples of each source, joined; they are read once.

        Raises:
            DataError: they are not usable, or the sources do not go together.
        """
        return self._head

    @cached_property
    def _head(self) -> Samples:
        heads, faults = [], Faults()
        for part, template in zip(self.parts, self.templates, strict=True):
            try:
                # A source has the same name here as where its held-out samples are measured.
                heads.append(replace(part.head(), source=part.data, chat_template=template))
            except DataError as error:
                faults.add(*error.faults)
        faults.raise_if_any()
        found = joined(heads)
        are_all = all(part.head().source == part.data for part in self.parts)
        source = self.data if are_all else f"{self.data}, the first records of each"
        return replace(found, source=source, stream=self)
