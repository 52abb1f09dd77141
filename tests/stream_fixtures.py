"""Streams made on the spot: their files, and their token rows."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_fixtures import CHATML, make_tokenizer

from qlora_kit.config import RecordOptions, TokenOptions
from qlora_kit.data.stream import StreamedRows, longest_row
from qlora_kit.data.stream_worker import Beside, Here, Job
from qlora_kit.data.streamed_samples import SampleStream
from qlora_kit.data.text_rows import TextRows
from qlora_kit.data.tokens import tokenize


def records_of(count: int, first: int = 0) -> list[dict[str, str]]:
    """Return questions and answers of unequal length; no two are alike."""
    return [
        {"question": f"Q{n} " + "the " * (n % 11), "answer": f"A{n}" + " a" * (n * 7 % 5)}
        for n in range(first, first + count)
    ]


def write_records(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def open_stream(data: Path | str, task: str = "causal", **options: Any) -> SampleStream:
    return SampleStream(str(data), RecordOptions(**options), task)


def tokenizer_with_template() -> Any:
    return make_tokenizer(chat_template=CHATML)


def job_of(samples: SampleStream, **options: Any) -> Job:
    first = replace(samples.head().first(1), stream=None)
    return Job(TextRows, tokenizer_with_template(), TokenOptions(**options), first)


def streamed_rows(
    samples: SampleStream,
    *,
    workers: int = 0,
    seed: int = 1,
    buffer: int = 1,
    without: Collection[int] = frozenset(),
    **options: Any,
) -> StreamedRows:
    """Return the rows of a stream; with workers, the caller closes them."""
    job = job_of(samples, **options)
    head = tokenize(samples.head(), job.tokenizer, job.options, cache=False)
    longest = longest_row(head, job.options.max_length, has_sources=False)
    tokenizes = Beside(job, workers) if workers else Here(job)
    return StreamedRows(
        samples, tokenizes, seed=seed, buffer=buffer, longest=[longest] * 4, without=without
    )
