"""Streams that are mixed: shares, epochs, places to go on from, and sources opened together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from stream_fixtures import job_of, open_stream, records_of, write_records

from qlora_kit.config import TrainConfig
from qlora_kit.data.mixed_stream import MixedPlace, MixedStream, SourcePlace
from qlora_kit.data.mixing import Mixture
from qlora_kit.data.stream import StreamedRows, StreamPlace
from qlora_kit.data.stream_worker import Beside, Here, OfSource
from qlora_kit.data.streamed_sources import StreamedSources
from qlora_kit.errors import ConfigError, DataError
from qlora_kit.train.checkpoint import Progress

Row = dict[str, Any]
Steps = list[list[tuple[int, int]]]
"""of each step, the source and the number of each of its rows"""


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three sources of 60, 25 and 10 rows."""
    return [
        write_records(tmp_path / f"{name}.jsonl", records_of(count, first=first))
        for name, count, first in (("a", 60, 0), ("b", 25, 100), ("c", 10, 200))
    ]


def mixed(
    files: Sequence[Path],
    weights: Sequence[float],
    *,
    in_pass: int | None = None,
    buffer: int | None = 8,
    workers: int = 0,
    **options: Any,
) -> MixedStream:
    """Return a mixed stream; with workers, the caller closes it."""
    streams = [open_stream(file) for file in files]
    jobs = [job_of(stream, **options) for stream in streams]
    makes = Beside(jobs[0], workers, jobs[1:]) if workers else Here(*jobs)
    parts = [
        StreamedRows(stream, OfSource(makes, n), seed=f"1 {n}", buffer=buffer, longest=[])
        for n, stream in enumerate(streams)
    ]
    names = [file.name for file in files]
    return MixedStream(parts, weights, names, longest=[], in_pass=in_pass)


def steps_of(
    rows: MixedStream, count: int, size: int, start: MixedPlace | None = None
) -> tuple[Steps, list[MixedPlace]]:
    """Return the first steps, epoch after epoch, and the place after each."""
    steps: Steps = []
    places = [start or rows.start(None)]
    while len(steps) < count:
        last = places[-1]
        for place in rows.windows(0, last.next_pass() if last.is_last else last, size):
            steps.append([(rows.source_of(n), row["row"]) for n, row in enumerate(rows)])
            places.append(place)
            if len(steps) == count:
                break
    return steps, places[1:]


def epochs_of(rows: MixedStream, count: int) -> list[tuple[list[tuple[int, int]], MixedPlace]]:
    """Return the rows of the first epochs, and the place after each."""
    found, start = [], rows.start(None)
    for epoch in range(count):
        taken: list[tuple[int, int]] = []
        places = []
        for place in rows.windows(epoch, start, 8):
            taken += [(rows.source_of(n), row["row"]) for n, row in enumerate(rows)]
            places.append(place)
        assert [place.is_last for place in places] == [False] * (len(places) - 1) + [True]
        found.append((taken, places[-1]))
        start = places[-1].next_pass()
    return found


# ---------------------------------------------------------------- shares and epochs


@pytest.mark.parametrize("weights", [(3.0, 1.0, 1.0), (1.0, 9.0, 0.3), (0.5, 0.25, 0.25)])
def test_the_rows_of_a_run_have_the_shares_to_a_row(
    files: list[Path], weights: Sequence[float]
) -> None:
    """Of every stretch from the beginning, however often a source begins again."""
    steps, _ = steps_of(mixed(files, weights), 60, 8)
    seen: Counter[int] = Counter()
    for number, (source, _) in enumerate((row for step in steps for row in step), 1):
        seen[source] += 1
        for each, weight in enumerate(weights):
            assert abs(seen[each] - number * weight / sum(weights)) <= 1
    for each, weight in enumerate(weights):
        assert abs(seen[each] / seen.total() - weight / sum(weights)) < 0.01


def test_the_sources_take_turns_as_those_of_rows_at_hand(files: list[Path]) -> None:
    mixture = Mixture((60, 25, 10), (4.0, 2.0, 1.0))
    (steps, _), ends = steps_of(mixed(files, mixture.weights), 8, 8), (60, 85)
    at_hand = [sum(row >= end for end in ends) for row in mixture.order(0, 0)]
    assert [source for step in steps for source, _ in step][: mixture.rows] == at_hand[:64]


def test_no_row_of_a_source_comes_again_before_all_have_come(files: list[Path]) -> None:
    steps, _ = steps_of(mixed(files, (1.0, 1.0, 1.0)), 24, 10)
    for source, size in enumerate((60, 25, 10)):
        numbers = [row for step in steps for each, row in step if each == source]
        passes = [numbers[at : at + size] for at in range(0, len(numbers), size)]
        assert all(len({*each}) == len(each) for each in passes)
        assert len(passes) == 1 + (80 - 1) // size
        assert passes[0] != passes[-1][:size], "each pass has an order of its own"


def test_an_epoch_ends_when_the_first_source_has_been_seen_once(files: list[Path]) -> None:
    """Where nothing was counted; the others go on where they were."""
    found = epochs_of(mixed(files, (2.0, 2.0, 1.0)), 3)
    for number, (taken, place) in enumerate(found, 1):
        seen = Counter(source for source, _ in taken)
        assert seen[2] == 10
        assert abs(seen[0] - 20) <= 1
        assert place.sources[2].passes == number
    first = [row for taken, _ in found for source, row in taken if source == 0]
    assert len({*first}) == len(first) > 50, "an epoch goes on where the last one ended"


def test_a_counted_epoch_has_as_many_rows_as_were_counted(files: list[Path]) -> None:
    found = epochs_of(mixed(files, (60.0, 25.0, 10.0), in_pass=95), 2)
    for number, (taken, place) in enumerate(found, 1):
        assert (len(taken), len({*taken}), place.rows_of_epoch) == (95, 95, 95)
        assert all(each.passes == number for each in place.sources)
        assert place.counts["rows_read"] == 95 * number


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize("in_pass", [None, 37])
def test_every_place_goes_on_with_the_same_rows(files: list[Path], in_pass: int | None) -> None:
    def rows() -> MixedStream:
        return mixed(files, (3.0, 2.0, 1.0), in_pass=in_pass)

    steps, places = steps_of(rows(), 24, 6)
    assert max(each.passes for each in places[-1].sources) > 1
    assert any(place.is_last for place in places)
    for number in (1, 5, 6, 7, 13, 20):
        # As a checkpoint keeps it.
        kept = TypeAdapter(Progress).validate_python(asdict(Progress(place=places[number - 1])))
        assert kept.place == places[number - 1]
        again, then = steps_of(rows(), 24 - number, 6, kept.place)
        assert again == steps[number:]
        assert then == places[number:]


def test_a_place_of_one_stream_is_kept_as_such() -> None:
    place = StreamPlace(7, 2, True, {"rows_read": 8})
    kept = TypeAdapter(Progress).validate_python(asdict(Progress(place=place)))
    assert kept.place == place


def test_a_place_of_other_data_is_the_beginning(files: list[Path]) -> None:
    rows = mixed(files, (1.0, 1.0, 1.0))
    beginning = MixedPlace((SourcePlace(),) * 3)
    assert rows.start(StreamPlace(7)) == rows.start(MixedPlace((SourcePlace(2),))) == beginning
    assert rows.parts[0].start(beginning) == StreamPlace()


def test_other_processes_make_the_same_rows(files: list[Path]) -> None:
    expected, _ = steps_of(mixed(files, (3.0, 2.0, 1.0)), 12, 8)
    with closing(mixed(files, (3.0, 2.0, 1.0), workers=2)) as rows:
        assert steps_of(rows, 12, 8)[0] == expected


def test_all_samples_of_a_small_source_are_shuffled(files: list[Path]) -> None:
    steps, _ = steps_of(mixed(files[:2], (1.0, 1.0), buffer=None), 8, 5)
    numbers = [row for step in steps for source, row in step if source == 0]
    assert max(numbers[:10]) > 40, "the first rows come from the whole file"


# ---------------------------------------------------------------- what cannot be


def test_a_source_without_a_row_is_an_error(files: list[Path], tmp_path: Path) -> None:
    long = write_records(tmp_path / "long.jsonl", [{"text": "the girl " * 20}] * 3)
    rows = mixed([files[0], long], (1.0, 1.0), max_length=30, long_samples="drop")
    with pytest.raises(DataError, match=r"long\.jsonl: no token row is left of 3 samples"):
        steps_of(rows, 8, 4)


def test_sources_are_opened_together(files: list[Path], tmp_path: Path) -> None:
    names = [{"path": str(file)} for file in files]
    found = StreamedSources.of(TrainConfig(data=names))
    assert found.name == ", ".join(map(str, files))
    assert found.text_bytes == sum(file.stat().st_size for file in files)
    head = found.head()
    assert [len(part.items) for part in head.parts] == [60, 25, 10]
    assert head.stream is found
    before = found.content_hash
    assert StreamedSources.of(TrainConfig(data=names[::-1])).content_hash != before
    write_records(files[2], records_of(11))
    assert StreamedSources.of(TrainConfig(data=names)).content_hash != before
    with pytest.raises(DataError) as caught:
        StreamedSources.of(TrainConfig(data=[{"path": "x.jsonl"}, {"path": "y.jsonl"}]))
    assert len(caught.value.faults) == 2, "the faults of all sources"
    with pytest.raises(ConfigError, match="stands twice"):
        StreamedSources.of(TrainConfig(data=[names[0], names[0]]))
