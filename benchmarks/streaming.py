r"""Stream a file that is larger than the memory allowed, beside a script that only tokenises it.

    python benchmarks/streaming.py [--rows 200000] [--megabytes 1000] [--form jsonl|parquet] \
        [--workers 1] [--buffer 10000] [--data alpaca.json] [--tokenizer DIR]

The file repeats the records of `--data` (alpaca), each a little different and filled up with words
to `--megabytes` in all. It is made in a temporary folder. The sides run in turn, each in a process
of its own, timed and measured after its imports:

- `stream` gives every row of a pass, as training takes them: it reads, checks, shuffles and
  tokenises, with `--workers` processes beside it. Growth is that of its anonymous memory; that of
  the workers, with all that they import, stands beside it;
- `stream_half` does the same with a file half as long: constant memory is the same growth;
- `bare` reads the file line by line, parses it, renders each record with transformers' chat
  template and encodes it with the same tokenizer. It checks, masks and shuffles nothing.

Tokens per second count from the first row on; the seconds until it comes stand apart.

    python benchmarks/streaming.py --first-step [--rows 40000] [--megabytes 40] [--model DIR]

starts `qlora-kit train` on such a file and tells the seconds until the log has the first optimiser
step; then it ends the run. Nothing is in the cache. The model is a tiny one, so that the seconds
are those of the data. The sides:

- `default`: streamed, if the file has 4 MB or more; else read first and tokenised beside the
  training, or below 1 MB tokenised first;
- `read_first`: `--no-stream-data`: all samples are read and checked, and tokenised beside it;
- `one_list`: the same records as one list in a .json file, which cannot be streamed;
- `tokenized_first`: `--no-stream-data --tokenize-first`: all tokens are made before.

    python benchmarks/streaming.py --mixed [--rows 80000] [--megabytes 400]

mixes two such files by the weights 3 and 1, which are also their sizes, and makes the micro-batches
of every step: packed; packed with files half as long; and of these not packed. The figures are
those above.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from measure import AnonymousPeak, print_table, run_side, save_results

_PROJECT = Path(__file__).parent.parent
_ASSETS = Path(os.environ.get("QLORA_KIT_ASSETS", _PROJECT.parent / "shared" / "assets"))
_MAX_LENGTH, _MAX_LENGTH_OF_STEP = 2048, 512
_ROWS_A_STEP = 16
_WEIGHTS = (3, 1)
_ROWS_A_GROUP = 50_000
_SECONDS_BETWEEN_LOOKS = 0.25
_WORDS = "time year people way day man thing woman life child world school state family student"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, help="200,000; 40,000 or 80,000, see above")
    parser.add_argument("--megabytes", type=float, help="of 10^6 bytes; 1,000; 40 or 400")
    parser.add_argument("--form", choices=("jsonl", "parquet"), default="jsonl")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--buffer", type=int, default=10_000)
    parser.add_argument("--data", type=Path, default=_ASSETS / "data" / "alpaca_en_demo.json")
    parser.add_argument(
        "--tokenizer", type=Path, default=_ASSETS / "tokenizers" / "deepseek-llm-7b"
    )
    parser.add_argument("--first-step", action="store_true", help="see above")
    parser.add_argument("--mixed", action="store_true", help="see above")
    parser.add_argument("--model", type=Path, default=_ASSETS / "models" / "stories260K")
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(_SIDES[arguments.side](json.loads(arguments.settings))))
        return
    of_step, is_mixed = arguments.first_step, arguments.mixed
    name, measure, rows, megabytes = "streaming", _all_sides, 200_000, 1000
    if of_step:
        name, measure, rows, megabytes = "streaming_first_step", _first_steps, 40_000, 40
    elif is_mixed:
        name, measure, rows, megabytes = "streaming_mixed", _mixed_sides, 80_000, 400
    arguments.rows = arguments.rows or rows
    arguments.megabytes = arguments.megabytes or megabytes
    found = measure(arguments)
    print_table(found, list(found[0]))
    if not arguments.no_save:
        names = ("rows", "megabytes", "form", "workers", "buffer")
        about = {name: getattr(arguments, name) for name in names} | {"data": arguments.data.name}
        if of_step:
            about |= {"model": arguments.model.name, "max_length": _MAX_LENGTH_OF_STEP}
        else:
            about |= {"tokenizer": arguments.tokenizer.name, "max_length": _MAX_LENGTH}
        if is_mixed:
            about |= {"weights": list(_WEIGHTS)}
        print(save_results(name, {"settings": about, "sides": found}))


def _first_steps(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / f"whole.{arguments.form}"
        _write(arguments, arguments.rows, file)
        one_list = Path(name) / "whole.json"
        one_list.write_text(json.dumps([*_read(file)], ensure_ascii=False))
        sides = []
        for side, data, flags in (
            ("default", file, ()),
            ("read_first", file, ("--no-stream-data",)),
            ("one_list", one_list, ()),
            ("tokenized_first", file, ("--no-stream-data", "--tokenize-first")),
        ):
            options = (
                "--data", str(data), "--model", str(arguments.model), "--device", "cpu",
                "--max-length", str(_MAX_LENGTH_OF_STEP), "--batch-size", "1",
                "--gradient-accumulation-steps", "1", "--no-rehearse", "--samples", "0", *flags,
            )  # fmt: skip
            seconds = _first_step_after(Path(name) / side, options)
            megabytes = round(data.stat().st_size / 1e6)
            sides.append({"side": side, "file_mb": megabytes, "rows": arguments.rows,
                          "first_step_s": round(seconds, 1)})  # fmt: skip
        return sides


def _first_step_after(folder: Path, options: Sequence[str]) -> float:
    """Train until the log has a step, and end the run; return the seconds that took.

    Raises:
        RuntimeError: the run ended before.
    """
    log = folder / "trainer_log.jsonl"
    command = [sys.executable, "-m", "qlora_kit", "train", "--output", str(folder), *options]
    cache = {"HF_DATASETS_CACHE": f"{folder}-cache", "PYTHONPATH": str(_PROJECT)}
    said = folder.with_suffix(".txt")
    started = time.perf_counter()
    with said.open("w") as out:
        run = subprocess.Popen(command, env={**os.environ, **cache}, stdout=out, stderr=out)
        while run.poll() is None and not (log.is_file() and log.stat().st_size):
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        seconds = time.perf_counter() - started
        run.terminate()
        run.wait()
    if not log.is_file():
        raise RuntimeError(f"{' '.join(command)}\n{said.read_text()[-3000:]}")
    return seconds


def _all_sides(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        whole, half = (Path(name) / f"{part}.{arguments.form}" for part in ("whole", "half"))
        _write(arguments, arguments.rows, whole)
        _write(arguments, arguments.rows // 2, half)
        sides = []
        for side, file in (("stream", whole), ("stream_half", half), ("bare", whole)):
            settings = {
                "file": str(file), "tokenizer": str(arguments.tokenizer),
                "workers": arguments.workers, "buffer": arguments.buffer, "cache": name,
            }  # fmt: skip
            sides.append({"side": side, **run_side(__file__, side, settings)})
        return sides


def _mixed_sides(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        whole = _weighted(arguments, arguments.rows, Path(name) / "whole")
        half = _weighted(arguments, arguments.rows // 2, Path(name) / "half")
        sides = []
        for side, files, packs in (
            ("mixed_packed", whole, True),
            ("mixed_packed_half", half, True),
            ("mixed_half", half, False),
        ):
            settings = {
                "files": [*map(str, files)], "tokenizer": str(arguments.tokenizer), "packs": packs,
                "workers": arguments.workers, "buffer": arguments.buffer,
            }  # fmt: skip
            sides.append({"side": side, **run_side(__file__, "mixed", settings)})
        return sides


def _weighted(arguments: argparse.Namespace, rows: int, folder: Path) -> list[Path]:
    """Write a file for each weight, with that share of the rows."""
    folder.mkdir()
    files = []
    for number, weight in enumerate(_WEIGHTS):
        files.append(folder / f"source{number}.{arguments.form}")
        _write(arguments, rows * weight // sum(_WEIGHTS), files[-1])
    return files


# ---------------------------------------------------------------- the file


def _write(arguments: argparse.Namespace, rows: int, file: Path) -> None:
    """Write records of the same mean size, whatever the number of rows."""
    each = arguments.megabytes * 1e6 / arguments.rows
    records = _records(json.loads(arguments.data.read_text()), rows, each)
    if arguments.form == "jsonl":
        with file.open("w") as stream:
            stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        return
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema([(name, pyarrow.string()) for name in ("instruction", "output")])
    with parquet.ParquetWriter(file, schema) as writer:
        for batch in _batches(records, _ROWS_A_GROUP):
            writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))


def _records(
    source: list[dict[str, str]], rows: int, bytes_each: float
) -> Iterator[dict[str, str]]:
    words = _WORDS.split()
    for number in range(rows):
        given = source[number % len(source)]
        # No two rows are alike, so that no side can gain from remembering one.
        record = {
            "instruction": f"Question {number}. {given['instruction']}",
            "output": f"{given['output']} ({number})",
        }
        missing = int(bytes_each - len(json.dumps(record)))
        if missing > 0:
            start = number % len(words)
            record["output"] += (
                " " + " ".join((words[start:] + words) * (missing // 80 + 1))[:missing]
            )
        yield record


def _batches(records: Iterator[dict[str, str]], size: int) -> Iterator[list[dict[str, str]]]:
    batch = []
    for record in records:
        batch.append(record)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


# ---------------------------------------------------------------- the sides


def _stream(settings: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from qlora_kit.config import RecordOptions, TokenOptions
    from qlora_kit.data.chat_template import choose_template
    from qlora_kit.data.stream import StreamedRows, StreamPlace
    from qlora_kit.data.stream_worker import Beside, Here, Job
    from qlora_kit.data.streamed_samples import SampleStream
    from qlora_kit.data.text_rows import TextRows

    tokenizer = AutoTokenizer.from_pretrained(settings["tokenizer"], local_files_only=True)
    choose_template(tokenizer, None)
    memory, started = _memory_from_here(), time.perf_counter()
    samples = SampleStream(settings["file"], RecordOptions())
    first = replace(samples.head().first(1), stream=None)
    job = Job(TextRows, tokenizer, TokenOptions(max_length=_MAX_LENGTH), first)
    workers = settings["workers"]
    tokenizes = Beside(job, workers) if workers else Here(job)
    rows = StreamedRows(samples, tokenizes, seed=1, buffer=settings["buffer"], longest=[])
    others = _Others(tokenizes.pids if isinstance(tokenizes, Beside) else [])
    tokens = count = 0
    begun = started
    try:
        for _ in rows.windows(0, StreamPlace(), _ROWS_A_STEP):
            begun = begun if count else time.perf_counter()
            count += len(rows)
            tokens += sum(rows.lengths())
    finally:
        rows.close()
    return _figures([settings["file"]], count, tokens, started, begun, memory) | {
        "workers_mb": round(others.close() / 1e6)
    }


def _mixed(settings: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from qlora_kit.config import RecordOptions, TokenOptions
    from qlora_kit.data.batch import collate, collate_packed
    from qlora_kit.data.chat_template import choose_template
    from qlora_kit.data.mixed_stream import MixedStream
    from qlora_kit.data.packing import packed
    from qlora_kit.data.stream import MOST_HELD_BYTES, StreamedRows
    from qlora_kit.data.stream_worker import Beside, Here, Job, OfSource
    from qlora_kit.data.streamed_samples import SampleStream
    from qlora_kit.data.text_rows import TextRows

    tokenizer = AutoTokenizer.from_pretrained(settings["tokenizer"], local_files_only=True)
    choose_template(tokenizer, None)
    memory, started = _memory_from_here(), time.perf_counter()
    sources = [SampleStream(file, RecordOptions()) for file in settings["files"]]
    jobs = [
        Job(TextRows, tokenizer, TokenOptions(max_length=_MAX_LENGTH), first)
        for first in (replace(samples.head().first(1), stream=None) for samples in sources)
    ]
    workers = settings["workers"]
    tokenizes = Beside(jobs[0], workers, jobs[1:]) if workers else Here(*jobs)
    parts = [
        StreamedRows(
            samples, OfSource(tokenizes, number), seed=f"1 {number}", buffer=settings["buffer"],
            longest=[], held_bytes=MOST_HELD_BYTES // len(sources),
        )
        for number, samples in enumerate(sources)
    ]  # fmt: skip
    rows = MixedStream(parts, _WEIGHTS, settings["files"], longest=[])
    others = _Others(tokenizes.pids if isinstance(tokenizes, Beside) else [])
    tokens = count = micro_batches = 0
    begun = started
    try:
        for _ in rows.windows(0, rows.start(None), _ROWS_A_STEP):
            begun = begun if count else time.perf_counter()
            lengths = rows.lengths()
            window: list[tuple[int, ...]] = [(row,) for row in range(len(rows))]
            if settings["packs"]:
                window = packed(window, lengths, _MAX_LENGTH)
            makes = collate_packed if settings["packs"] else collate
            for indices in window:
                batch = makes([rows[index] for index in indices], 0)
                tokens += batch.tokens
            micro_batches += len(window)
            count += len(rows)
    finally:
        rows.close()
    found = _figures(settings["files"], count, tokens, started, begun, memory)
    return found | {"micro_batches": micro_batches, "workers_mb": round(others.close() / 1e6)}


def _bare(settings: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings["tokenizer"], local_files_only=True)
    memory, started = _memory_from_here(), time.perf_counter()
    tokens = count = 0
    begun = started
    for record in _read(Path(settings["file"])):
        turns = [
            {"role": "user", "content": record["instruction"]},
            {"role": "assistant", "content": record["output"]},
        ]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:_MAX_LENGTH]
        begun = begun if count else time.perf_counter()
        count, tokens = count + 1, tokens + len(ids)
    return _figures([settings["file"]], count, tokens, started, begun, memory) | {"workers_mb": 0}


def _read(file: Path) -> Iterator[dict[str, str]]:
    if file.suffix == ".jsonl":
        with file.open() as lines:
            yield from map(json.loads, lines)
        return
    from pyarrow import parquet

    for batch in parquet.ParquetFile(file).iter_batches(1024):
        yield from batch.to_pylist()


def _memory_from_here() -> AnonymousPeak:
    """Measure from here on; what was freed before is given back, or growth would hide in it."""
    from qlora_kit.model.memory import return_free_memory

    return_free_memory()
    return AnonymousPeak()


def _figures(
    files: Sequence[str],
    rows: int,
    tokens: int,
    started: float,
    begun: float,
    memory: AnonymousPeak,
) -> dict[str, Any]:
    return {
        "file_mb": round(sum(Path(file).stat().st_size for file in files) / 1e6),
        "rows": rows,
        "tokens": tokens,
        "first_row_s": round(begun - started, 2),
        "tokens_per_second": round(tokens / (time.perf_counter() - begun)),
        "growth_mb": round(memory.growth_bytes / 1e6),
    }


class _Others:
    """Looks at the anonymous memory of other processes until it is closed."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids, self._peak = pids, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._done.wait(_SECONDS_BETWEEN_LOOKS):
            self._peak = max(self._peak, sum(map(_anonymous_bytes, self._pids)))

    def close(self) -> int:
        """Return the most bytes that they had together."""
        self._done.set()
        self._thread.join()
        return self._peak


def _anonymous_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0  # it has ended


_SIDES = {"stream": _stream, "stream_half": _stream, "bare": _bare, "mixed": _mixed}


if __name__ == "__main__":
    sys.exit(main())
