"""Streams: the same rows as when all are read, places to go on from, files that change, workers."""

from __future__ import annotations

import gzip
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from data_fixtures import make_tokenizer
from pyarrow import parquet
from stream_fixtures import (
    job_of,
    open_stream,
    records_of,
    streamed_rows,
    tokenizer_with_template,
    write_records,
)
from support import run_python

from qlora_kit.config import TokenOptions
from qlora_kit.data import stream, streamed_samples
from qlora_kit.data.samples import load_samples
from qlora_kit.data.shapes import Shape
from qlora_kit.data.stream import (
    Drawn,
    StreamedRows,
    StreamPlace,
    drawn,
    drawn_from_all,
    longest_row,
)
from qlora_kit.data.stream_count import count_read, reading_counts, taken_out
from qlora_kit.data.stream_worker import Beside, Here, Job, Tokenizes
from qlora_kit.data.text_rows import TextRows
from qlora_kit.data.tokens import Tokenized, tokenize
from qlora_kit.errors import ConfigError, DataError, HubError, WorkerLost

Row = dict[str, Any]


def _taken(rows: StreamedRows, size: int = 4, start: StreamPlace | None = None) -> list[list[Row]]:
    """Return the rows of each step of a pass."""
    return [[dict(row) for row in rows] for _ in rows.windows(0, start or StreamPlace(), size)]


def _flat(windows: list[list[Row]]) -> list[tuple[Any, ...]]:
    return [(row["row"], row["input_ids"], row["labels"]) for window in windows for row in window]


def _tokenized(data: Path | str, **options: Any) -> Tokenized:
    tokenizer = tokenizer_with_template()
    return tokenize(load_samples(data), tokenizer, TokenOptions(**options), cache=False)


def _all_at_hand(data: Path | str, **options: Any) -> list[tuple[Any, ...]]:
    made = _tokenized(data, **options)
    return [(row["row"], row["input_ids"], row["labels"]) for row in made.rows]


# ---------------------------------------------------------------- the same rows


def _as_jsonl(folder: Path, records: list[dict[str, str]]) -> Path:
    return write_records(folder / "a.jsonl", records)


def _as_gzip(folder: Path, records: list[dict[str, str]]) -> Path:
    plain = write_records(folder / "a.jsonl", records)
    packed = folder / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    return packed


def _as_parquet(folder: Path, records: list[dict[str, str]]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(records), folder / "a.parquet", row_group_size=7)
    return folder / "a.parquet"


def _as_shards(folder: Path, records: list[dict[str, str]]) -> Path:
    for shard in range(3):
        write_records(
            folder / f"train-0000{shard}-of-00003.jsonl", records[shard * 20 : shard * 20 + 20]
        )
    return folder


def _as_csv(folder: Path, records: list[dict[str, str]]) -> Path:
    lines = ["question,answer", *(f"{each['question']},{each['answer']}" for each in records)]
    (folder / "a.csv").write_text("\n".join(lines) + "\n")
    return folder / "a.csv"


def _as_aligned(folder: Path, records: list[dict[str, str]]) -> str:
    for field in ("question", "answer"):
        (folder / field).write_text("".join(f"{record[field]}\n" for record in records))
    return f"{folder / 'question'}+{folder / 'answer'}"


@pytest.mark.parametrize(
    "form", [_as_jsonl, _as_gzip, _as_parquet, _as_shards, _as_csv, _as_aligned]
)
def test_a_stream_has_the_rows_of_the_data(tmp_path: Path, form: Any) -> None:
    data = form(tmp_path, records_of(60))
    expected = _all_at_hand(data)
    in_order = _flat(_taken(streamed_rows(open_stream(data))))
    assert in_order == expected
    shuffled = _flat(_taken(streamed_rows(open_stream(data), buffer=16)))
    assert shuffled != expected
    assert sorted(shuffled) == sorted(expected)


@pytest.mark.parametrize("long_samples", ["split", "drop", "truncate"])
def test_rows_are_fitted_and_counted_as_ever(tmp_path: Path, long_samples: Any) -> None:
    texts = [{"text": "the girl " * (1 + n % 9)} for n in range(40)]
    data = write_records(tmp_path / "a.jsonl", texts)
    options = {"max_length": 16, "long_samples": long_samples}
    rows = streamed_rows(open_stream(data), **options)
    places = list(rows.windows(0, StreamPlace(), 5))
    expected = _tokenized(data, **options)
    assert _flat(_taken(rows, 5)) == _all_at_hand(data, **options)
    counted = rows.count()
    assert counted.pop("rows") == len(expected.rows)
    for counts in (places[-1].counts, counted):
        assert Counter(counts) == Counter(
            {name: value for name, value in vars(expected.counts).items() if isinstance(value, int)}
        )
    assert [place.is_last for place in places] == [False] * (len(places) - 1) + [True]


def test_a_data_set_of_the_hub_is_read_as_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` itself streams a local folder; only the id is looked up elsewhere."""
    import datasets

    real = datasets.load_dataset_builder
    folder = tmp_path / "set"
    folder.mkdir()
    write_records(folder / "train.jsonl", records_of(30))
    write_records(folder / "validation.jsonl", records_of(3, first=90))
    asked: list[Any] = []

    def builder(*wanted: Any) -> Any:
        asked.append(wanted)
        return real(str(folder), cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    found = open_stream("owner/name:main")
    assert found.is_of_hub
    rows = _flat(_taken(streamed_rows(found, buffer=8)))
    assert sorted(rows) == sorted(_all_at_hand(folder))
    assert asked[0] == ("owner/name", "main")
    assert not list((tmp_path / "cache").rglob("*.arrow")), "nothing was fetched and stored"
    assert found.content_hash == open_stream("owner/name:main").content_hash
    write_records(folder / "train.jsonl", records_of(31))
    with pytest.raises(DataError, match="owner/name:main: the hub has another version than when"):
        list(found.samples())


def test_a_hub_out_of_reach_is_one_line() -> None:
    with pytest.raises(HubError, match="owner/name: no such file, and not loadable from the hub"):
        open_stream("owner/name")


# ---------------------------------------------------------------- counting by reading


def _chat(number: int, *answers: str, **more: Any) -> dict[str, Any]:
    asks = ({"role": "user", "content": f"Q{number}"},) * len(answers)
    turns = ({"role": "assistant", "content": answer} for answer in answers)
    return {"messages": [turn for pair in zip(asks, turns, strict=True) for turn in pair], **more}


# As templates of reasoning models do, it shows the reasoning of the last answer alone.
_FORGETS = (
    "{% for m in messages %}<{{ m.role }}>{% if loop.last %}{{ m.content }}{% else %}"
    "{{ m.content.split('</think>')[-1] }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("train_on", ["completion", "last-turn", "all"])
def test_reading_tells_how_many_rows_there_are(tmp_path: Path, train_on: Any) -> None:
    """Whatever is not learnt, and a chat that becomes several rows, is counted as by tokenising."""
    chats = [_chat(n, "a", "b") for n in range(5)]
    chats += [_chat(9, "one", loss_weight=0), _chat(10, "c")]
    if train_on != "all":
        marked = _chat(11, "a", "b")
        marked["messages"][3]["weight"] = 0
        chats += [marked, _chat(12, "<think>r</think>a", "<think>s</think>b")]
    data = write_records(tmp_path / "a.jsonl", chats)
    tokenizer = make_tokenizer(chat_template=_FORGETS)
    options = TokenOptions(train_on=train_on, chat_template=None)
    samples = open_stream(data)
    job = Job(TextRows, tokenizer, options, replace(samples.head().first(1), stream=None))
    expected = tokenize(load_samples(data), tokenizer, options, cache=False)
    found = count_read(samples, job)
    assert found["rows"] == len(expected.rows)
    for name in ("rows_read", "rows_dropped", "rows_by_turn"):
        assert found[name] == getattr(expected.counts, name), name
    assert (found["rows_by_turn"] > 0) == (train_on == "completion")


def test_only_the_treatment_of_long_samples_hides_the_number_of_rows() -> None:
    def counts(how: Any, shape: Shape) -> bool:
        return reading_counts(TokenOptions(long_samples=how), shape)

    assert [counts("auto", shape) for shape in (Shape.CHAT, Shape.PAIR, Shape.CLASSIFY)] == [
        True
    ] * 3
    assert not any(counts("auto", shape) for shape in (Shape.TEXT, Shape.TAG))
    asked = ("truncate", "error", "split", "drop")
    assert [counts(how, Shape.TEXT) for how in asked] == [True, True, False, False]


# ---------------------------------------------------------------- order


def test_each_sample_is_drawn_once_from_a_buffer() -> None:
    def numbers(epoch: int = 0, seed: int = 1, buffer: int = 50) -> list[int]:
        return [each.number for each in drawn([None] * 500, seed, epoch, buffer)]  # type: ignore[list-item]

    assert numbers(buffer=1) == list(range(500))
    assert sorted(numbers()) == list(range(500))
    assert numbers() == numbers()
    assert len({tuple(order) for order in (numbers(), numbers(epoch=1), numbers(seed=2))}) == 3
    assert all(number < place + 50 for place, number in enumerate(numbers()))
    assert sorted(numbers(buffer=5000)) == list(range(500))


def test_what_is_held_out_is_learnt_in_no_pass(tmp_path: Path) -> None:
    data = write_records(tmp_path / "a.jsonl", records_of(60))
    held = frozenset({0, 7, 30, 31, 59})
    options: dict[str, Any] = {"buffer": 9, "without": held}
    rows = streamed_rows(open_stream(data), **options)
    for epoch in range(3):
        places, windows = [], []
        for place in rows.windows(epoch, StreamPlace(), 4):
            places.append(place)
            windows.append([dict(row) for row in rows])
        numbers = [row["row"] for window in windows for row in window]
        assert sorted(numbers) == [number for number in range(60) if number not in held]
        again = streamed_rows(open_stream(data), **options)
        assert list(again.windows(epoch, places[6], 4)) == places[7:]
    taken = taken_out(open_stream(data), held, open_stream(data).head())
    assert [sample.place for sample in taken.items] == [f"{data}:{n + 1}" for n in sorted(held)]


def test_long_samples_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MOST_HELD_BYTES", 10_000)
    taken = 0

    def texts() -> Iterator[Any]:
        nonlocal taken
        for number in range(100):
            taken += 1
            yield f"{number} " + "x" * 1000

    order = drawn(texts(), 1, 0, 50)
    first: Drawn = next(order)
    assert taken == 10, "ten texts of 1,000 characters, and not fifty, are held"
    assert sorted([first.number, *(each.number for each in order)]) == list(range(100))


# ---------------------------------------------------------------- going on


def test_every_place_goes_on_with_the_same_rows(tmp_path: Path) -> None:
    texts = [{"text": "the girl " * (n % 9) + f"{n}"} for n in range(60)]
    data = write_records(tmp_path / "a.jsonl", texts)
    options: dict[str, Any] = {"max_length": 12, "long_samples": "split", "buffer": 20}
    rows = streamed_rows(open_stream(data), **options)
    places, windows = [], []
    for place in rows.windows(0, StreamPlace(), 3):
        places.append(place)
        windows.append([dict(row) for row in rows])
    assert len(places) > 20
    assert any(place.rows > 1 for place in places), "some steps end within a sample"
    for number, place in enumerate(places[:-1], 1):
        again = streamed_rows(open_stream(data), **options)
        assert _taken(again, 3, place) == windows[number:]
    resumed = list(streamed_rows(open_stream(data), **options).windows(0, places[4], 3))
    assert resumed == places[5:]


def test_a_pass_takes_up_the_counts_of_the_last() -> None:
    place = StreamPlace(7, 2, True, {"rows_read": 8})
    assert place.next_pass() == StreamPlace(counts={"rows_read": 8})


def test_a_pass_without_a_row_is_an_error(tmp_path: Path) -> None:
    data = write_records(tmp_path / "a.jsonl", [{"text": "the girl " * 20}] * 3)
    samples = open_stream(data)
    job = job_of(samples, max_length=4, long_samples="drop")
    rows = StreamedRows(samples, Here(job), seed=1, buffer=1, longest=[])
    with pytest.raises(DataError) as caught:
        _taken(rows)
    assert str(caught.value) == (
        f"{data}: no token row is left of 3 samples; expected some to learn from; raise "
        "--max-length, or choose another --long-samples or --train-on"
    )


def test_samples_in_memory_come_in_the_order_of_a_buffer_that_has_room_for_all() -> None:
    items: list[Any] = [f"sample {n}" for n in range(50)]
    without = frozenset({3, 49})
    streamed = [*drawn(items, 7, 2, None, without)]
    assert [*drawn_from_all(items, 7, 2, without)] == streamed
    assert [*drawn_from_all(items, 7, 3, without)] != streamed
    assert len(streamed) == 48


# ---------------------------------------------------------------- what is looked at first


def test_the_head_is_the_first_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_records(tmp_path / "a.jsonl", records_of(30))
    whole = open_stream(data).head()
    assert (len(whole.items), whole.source) == (30, str(data))
    assert whole.notices == (f"{data}: 30 qa records (question, answer)",)
    monkeypatch.setattr(streamed_samples, "HEAD_RECORDS", 10)
    head = open_stream(data).head()
    assert (len(head.items), head.source) == (10, f"{data}, the first 10 records")
    assert head.notices == (f"{data}, the first 10 records: 10 qa records (question, answer)",)
    monkeypatch.setattr(streamed_samples, "HEAD_CHARACTERS", 100)
    assert len(open_stream(data).head().items) < 10


def test_the_longest_row_is_made_of_a_real_one(tmp_path: Path) -> None:
    data = write_records(tmp_path / "a.jsonl", records_of(5))
    made = _tokenized(data)
    row = longest_row(made, 77, has_sources=False)
    assert len(row["input_ids"]) == len(row["labels"]) == 77
    assert row["labels"] == row["input_ids"]
    row = longest_row(made, 77, has_sources=True)
    assert [label != -100 for label in row["labels"]] == [False] * 77 + [True] * 77


# ---------------------------------------------------------------- faults


def test_a_fault_deep_in_a_file_names_its_line(tmp_path: Path) -> None:
    records: list[Any] = records_of(3000)
    records[2500] = {"question": "only"}
    data = write_records(tmp_path / "a.jsonl", records)
    opened = open_stream(data)
    assert len(opened.head().items) == 1000
    with pytest.raises(DataError) as caught:
        list(opened.samples())
    (line,) = caught.value.faults
    assert line.startswith(f'{data}:2501: no "answer"; expected it as in the qa record {data}:1')
    skipping = open_stream(data, skip_bad_lines=True)
    assert len(list(skipping.samples())) == 2999
    assert (skipping.skipped, skipping.first_skipped) == (1, line)
    assert skipping.content_hash == opened.content_hash, "up to the fault both read the same"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", "", "a.jsonl: no records; expected at least one"),
        ("a.jsonl", "\n\n", "a.jsonl: no records; expected at least one"),
        ("a.json", "[]", "--stream-data: {}: a .json file is one list, which is read whole"),
        ("a.txt", "a", "--stream-data: {}: a .txt file is one text, which is read whole"),
        ("a.parquet.gz", "", "--stream-data: {}: a packed parquet file is unpacked whole"),
        ("a.xyz", "a", 'a.xyz: suffix ".xyz"; expected one of .jsonl'),
        ("a.jsonl.gz", "{}", "a.jsonl.gz: not gzip data"),
    ],
)
def test_what_cannot_be_streamed_is_one_line(
    tmp_path: Path, name: str, content: str, expected: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises((ConfigError, DataError)) as caught:
        open_stream(path).head()
    (line,) = caught.value.faults
    assert expected.format(path) in line


@pytest.mark.parametrize("name", ["nowhere.jsonl", "folder"])
def test_a_source_that_is_not_there_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"no such file|expected a train file in it"):
        open_stream(tmp_path / name)


# ---------------------------------------------------------------- files that change


@pytest.mark.parametrize("change", ["appended", "cut", "cut in a record", "rewritten", "removed"])
def test_a_file_that_changes_while_it_is_read_is_one_line(tmp_path: Path, change: str) -> None:
    data = write_records(tmp_path / "a.jsonl", records_of(5000))
    size = data.stat().st_size
    opened = open_stream(data)
    reading = opened.samples()
    assert len(list(islice(reading, 10))) == 10
    if change == "appended":
        with data.open("a") as more:
            more.write(json.dumps(records_of(1)[0]) + "\n")
    elif change == "removed":
        data.unlink()
    elif change == "rewritten":
        time = data.stat().st_mtime_ns
        data.write_bytes(data.read_bytes().replace(b"A4999", b"B4999"))
        os.utime(data, ns=(time + 10**9, time + 10**9))
    else:
        os.truncate(data, size // 2 - size // 2 % 4096 if change == "cut" else size // 2)
    with pytest.raises(DataError) as caught:
        list(reading)
    (line,) = caught.value.faults
    found = {
        "rewritten": f"{data}: written to while it is read",
        "removed": f"{data}: no such file or directory",
    }
    assert line.startswith(found.get(change, f"{data}: {size:,} bytes when it was opened, and "))
    assert "--resume" in line or change == "removed"


def test_a_stream_is_known_by_its_bytes_and_how_they_are_read(tmp_path: Path) -> None:
    data = write_records(tmp_path / "a.jsonl", records_of(50))
    known = open_stream(data).content_hash
    (tmp_path / "elsewhere").mkdir()
    moved = write_records(tmp_path / "elsewhere" / "b.jsonl", records_of(50))
    assert open_stream(moved).content_hash == known
    assert (
        open_stream(data, columns={"question": "answer", "answer": "question"}).content_hash
        != known
    )
    write_records(data, [*records_of(49), {"question": "Q", "answer": "A"}])
    assert open_stream(data).content_hash != known


def test_a_shard_that_is_added_is_one_line(tmp_path: Path) -> None:
    data = _as_shards(tmp_path, records_of(60))
    opened = open_stream(data)
    for shard in range(4):
        write_records(tmp_path / f"train-0000{shard}-of-00004.jsonl", records_of(5))
        (tmp_path / f"train-0000{shard}-of-00003.jsonl").unlink(missing_ok=True)
    with pytest.raises(DataError, match="4 files, and 3 when the run began, or others; expected"):
        list(opened.samples())


# ---------------------------------------------------------------- other processes


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StreamedRows, Path]]:
    """Rows that two other processes tokenise, and their file."""
    data = write_records(tmp_path_factory.mktemp("stream") / "a.jsonl", records_of(400))
    samples = open_stream(data)
    beside = Beside(job_of(samples), 2)
    with closing(StreamedRows(samples, beside, seed=1, buffer=64, longest=[])) as rows:
        yield rows, data


def test_other_processes_make_the_same_rows(worked: tuple[StreamedRows, Path]) -> None:
    rows, data = worked
    assert _taken(rows, 16) == _taken(streamed_rows(open_stream(data), buffer=64), 16)


def test_faults_of_other_processes_arrive_in_the_order_of_the_rows(tmp_path: Path) -> None:
    records = records_of(200)
    for number in (90, 150):
        records[number]["answer"] = "the " * 300
    samples = open_stream(write_records(tmp_path / "a.jsonl", records))
    job = job_of(samples, max_length=100, long_samples="error")
    with closing(StreamedRows(samples, Beside(job, 1), seed=1, buffer=1, longest=[])) as rows:
        windows = rows.windows(0, StreamPlace(), 4)
        # The last step of the chunks before waits for the row after it, to know whether it ends.
        assert len(list(islice(windows, 64 // 4 - 1))) == 15
        with pytest.raises(DataError, match=r"a\.jsonl:91: \d+ tokens; expected at most 100"):
            next(windows)


def test_a_process_that_is_killed_is_one_line(tmp_path: Path) -> None:
    samples = open_stream(write_records(tmp_path / "a.jsonl", records_of(2000)))
    beside = Beside(job_of(samples), 1)
    with closing(StreamedRows(samples, beside, seed=1, buffer=1, longest=[])) as rows:
        windows = rows.windows(0, StreamPlace(), 4)
        next(windows)
        (pid,) = beside.pids
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerLost) as caught:
            list(windows)
    assert str(caught.value) == (
        "--data-workers: a process that tokenises ended (SIGKILL); expected it to go on as long as "
        "the run; free memory, or pass --data-workers 0"
    )


def test_an_error_that_nobody_foresaw_brings_its_traceback(tmp_path: Path) -> None:
    samples = open_stream(write_records(tmp_path / "a.jsonl", records_of(5)))
    beside: Tokenizes = Beside(job_of(samples), 1)
    with closing(beside), pytest.raises(RuntimeError, match="Traceback"):
        beside.ask([b"no pickle"])()


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    """However it ends: here by SIGKILL, with a chunk under way."""
    data = write_records(tmp_path / "a.jsonl", records_of(500))
    pid = int(
        run_python(
            """
            import os, signal, subprocess, sys
            child = subprocess.run(
                [sys.executable, "-c", '''
            import os, signal, sys
            sys.path.insert(0, sys.argv[2])
            import data.test_stream as own
            samples = own.open_stream(sys.argv[1])
            beside = own.Beside(own.job_of(samples), 1)
            rows = own.StreamedRows(samples, beside, seed=1, buffer=1, longest=[])
            next(rows.windows(0, own.StreamPlace(), 4))
            print(beside.pids[0], flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
            ''', sys.argv[1], sys.argv[2]], stdout=subprocess.PIPE, text=True)
            assert child.returncode == -signal.SIGKILL
            print(child.stdout)
            """.replace("\n            ", "\n"),
            data,
            Path(__file__).parent.parent,
        )
    )
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        signal.sigtimedwait([], 0.1)
    pytest.fail("it is still there ten seconds later")


def test_what_tokenises_imports_no_torch() -> None:
    code = """
import sys
import qlora_kit.data.stream_worker, qlora_kit.data.labelled_rows, qlora_kit.data.source_rows
print(sorted({"torch", "datasets", "pandas"} & set(sys.modules)))
"""
    assert run_python(code) == "[]\n"


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_reading_takes_the_same_memory_however_long_the_file(tmp_path: Path, form: str) -> None:
    data = tmp_path / f"a.{form}"
    records = (
        {"question": f"{number} " + "one two " * 200, "answer": "x" * 200}
        for number in range(20_000)
    )
    if form == "jsonl":
        with data.open("w") as lines:
            lines.writelines(json.dumps(record) + "\n" for record in records)
    else:
        table = pyarrow.Table.from_pylist([*records])
        # All rows are in one group, as most writers have it, and none are packed.
        parquet.write_table(table, data, compression="none", use_dictionary=False)
    grown = run_python(
        """
from qlora_kit.config import RecordOptions
from qlora_kit.data.stream import drawn
from qlora_kit.data.streamed_samples import SampleStream
import pyarrow.parquet  # not part of what a file takes
samples = SampleStream(sys.argv[1], RecordOptions())
with Peak() as peak:
    count = sum(1 for _ in drawn(samples.samples(), 1, 0, 1000))
print(count, peak.grown)
""",
        data,
    ).split()
    assert int(grown[0]) == 20_000
    assert data.stat().st_size > 35e6
    # 1,000 samples of 1.9 KB, and what is read at a time; of parquet 1,024 records and their pages.
    assert int(grown[1]) < (16e6 if form == "jsonl" else 27e6)
