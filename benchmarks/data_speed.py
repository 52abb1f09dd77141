r"""Compare reading and tokenising a large file with a bare script that does the same.

    python benchmarks/data_speed.py [--rows 200000] [--rounds 3] \
        [--data alpaca.json] [--tokenizer DIR]

The file repeats the records of `--data` (alpaca), each a little different. The sides run in turn,
for several rounds, each in its own process and timed after its imports. Ratios are taken round by
round. The sides:

- `ours` reads, validates, hashes, renders, tokenises, masks, truncates and counts rows, and keeps
  them in a cache;
- `ours_cached` does the same again, and takes the rows from that cache;
- `bare` uses `datasets.load_dataset` and `map`, with transformers' chat template and fast
  tokenizer: it renders, tokenises, masks the prompt and truncates. It validates nothing;
- `bare_unmasked` does the same without the mask, which saves half of the work.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import AnonymousPeak, print_table, run_side, save_results

_PROJECT = Path(__file__).parent.parent
_ASSETS = Path(os.environ.get("QLORA_KIT_ASSETS", _PROJECT.parent / "shared" / "assets"))
_MAX_LENGTH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=_ASSETS / "data" / "alpaca_en_demo.json")
    parser.add_argument(
        "--tokenizer", type=Path, default=_ASSETS / "tokenizers" / "deepseek-llm-7b"
    )
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        settings = json.loads(arguments.settings)
        os.environ["HF_DATASETS_CACHE"] = settings["cache"]
        print(json.dumps(_SIDES[arguments.side](settings)))
        return
    rounds = [_round(arguments) for _ in range(arguments.rounds)]
    found = _summary(rounds)
    print_table(found["sides"], list(found["sides"][0]))
    print(f"ours / bare: {found['ours_over_bare']:.2f}")
    if not arguments.no_save:
        about = {"rows": arguments.rows, "data": arguments.data.name,
                 "tokenizer": arguments.tokenizer.name, "max_length": _MAX_LENGTH}  # fmt: skip
        print(save_results("data_speed", {"settings": about, **found, "rounds": rounds}))


def _round(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run every side once on a fresh file and fresh caches."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "rows.jsonl"
        _write_rows(arguments.data, arguments.rows, file)
        found = {}
        for side in _SIDES:
            cache = Path(name) / side.removesuffix("_cached")
            settings = {
                "file": str(file), "tokenizer": str(arguments.tokenizer), "cache": str(cache),
            }  # fmt: skip
            found[side] = run_side(__file__, side, settings)
    tokens = {side["tokens"] for name, side in found.items() if name != "bare_unmasked"}
    supervised = {side["supervised_tokens"] for name, side in found.items() if "un" not in name}
    if len(tokens) != 1 or len(supervised) != 1:
        raise RuntimeError(f"the sides did not do the same: {found}")
    return found


def _write_rows(source: Path, rows: int, file: Path) -> None:
    records = json.loads(source.read_text())
    with file.open("w") as stream:
        for number in range(rows):
            record = dict(records[number % len(records)])
            # No two rows are alike, so that no side can gain from remembering one.
            record["instruction"] = f"Question {number}. {record['instruction']}"
            record["output"] = f"{record['output']} ({number})"
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def _summary(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    def ratio(one: str, other: str) -> float:
        return statistics.median(r[one]["seconds"] / r[other]["seconds"] for r in rounds)

    sides = [
        {
            "side": side,
            "seconds": round(statistics.median(r[side]["seconds"] for r in rounds), 2),
            "tokens_per_second": round(
                statistics.median(r[side]["tokens"] / r[side]["seconds"] for r in rounds)
            ),
            "growth_mb": round(max(r[side]["growth_bytes"] for r in rounds) / 1e6),
        }
        for side in _SIDES
    ]
    return {
        "sides": sides,
        "ours_over_bare": round(ratio("ours", "bare"), 3),
        "ours_over_bare_unmasked": round(ratio("ours", "bare_unmasked"), 3),
        "cached_over_bare": round(ratio("ours_cached", "bare"), 3),
    }


# ---------------------------------------------------------------- the sides


def _ours(settings: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from qlora_kit.config import TokenOptions
    from qlora_kit.data.samples import load_samples
    from qlora_kit.data.tokens import tokenize

    tokenizer = AutoTokenizer.from_pretrained(settings["tokenizer"], local_files_only=True)
    memory = AnonymousPeak()
    started = time.perf_counter()
    samples = load_samples(settings["file"])
    read = time.perf_counter() - started
    made = tokenize(samples, tokenizer, TokenOptions(max_length=_MAX_LENGTH))
    return {
        "seconds": time.perf_counter() - started,
        "reading_seconds": read,
        "tokens": made.counts.tokens,
        "supervised_tokens": made.counts.weight,
        "growth_bytes": memory.growth_bytes,
    }


def _bare(settings: dict[str, Any], masked: bool = True) -> dict[str, Any]:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(settings["tokenizer"], local_files_only=True)

    def render(instruction: str, extra: str, output: str) -> tuple[str, str]:
        question = f"{instruction}\n\n{extra}" if extra else instruction
        turns = [{"role": "user", "content": question}]
        answered = [*turns, {"role": "assistant", "content": output}]
        text = tokenizer.apply_chat_template(answered, tokenize=False)
        if not masked:
            return "", text
        return tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        ), text

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        columns = (batch["instruction"], batch["input"], batch["output"])
        rendered = [render(*fields) for fields in zip(*columns, strict=True)]
        encoded = tokenizer([text for _, text in rendered], add_special_tokens=False)["input_ids"]
        labels = [list(ids) for ids in encoded]
        if masked:
            prompts = tokenizer([prompt for prompt, _ in rendered], add_special_tokens=False)
            for row, prompt in zip(labels, prompts["input_ids"], strict=True):
                row[: len(prompt)] = [-100] * len(prompt)
        return {
            "input_ids": [ids[:_MAX_LENGTH] for ids in encoded],
            "labels": [row[:_MAX_LENGTH] for row in labels],
        }

    memory = AnonymousPeak()
    started = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=settings["file"], split="train")
    rows = rows.map(encode, batched=True, remove_columns=rows.column_names)
    seconds = time.perf_counter() - started
    table = rows.with_format("arrow")[:]
    supervised = table["labels"].combine_chunks().flatten().to_numpy() != -100
    return {
        "seconds": seconds,
        "tokens": len(supervised),
        "supervised_tokens": int(supervised.sum()),
        "growth_bytes": memory.growth_bytes,
    }


_SIDES = {
    "ours": _ours,
    "ours_cached": _ours,
    "bare": _bare,
    "bare_unmasked": lambda settings: _bare(settings, masked=False),
}


if __name__ == "__main__":
    sys.exit(main())
