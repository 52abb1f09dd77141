"""Counts right answers in a file of predictions, without any code of the kit.

    python tests/infer/gsm8k_script.py predictions.jsonl

`marked_number` follows the extraction that was published with gsm8k (Cobbe et al. 2021): the
digits, points, commas and minus behind the first "#### ", without commas, compared as text; an
answer without the mark is wrong. `last_number` takes the last number of each text instead, wherever
it stands, and compares values: it is what `--metrics final_number` measures.
"""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path

_MARK = "#### "


def marked(text: str) -> str | None:
    """Return the number behind the mark as it is written, without commas."""
    _, mark, rest = text.partition(_MARK)
    if not mark:
        return None
    digits = rest[1:] if rest.startswith("-") else rest
    length = next((at for at, each in enumerate(digits) if each not in "0123456789.,"), len(digits))
    number = digits[:length].replace(",", "")
    return ("-" if rest.startswith("-") else "") + number if number else None


def last(text: str) -> Fraction | None:
    """Return the value of the last number of a text."""
    ends = [at for at, each in enumerate(text) if each in "0123456789"]
    if not ends:
        return None
    end = begin = ends[-1]
    while begin and text[begin - 1] in "0123456789.,":
        begin -= 1
    number = Fraction(text[begin : end + 1].replace(",", ""))
    before = text[:begin].removesuffix("$")
    # In "5-3" it is no sign.
    is_negative = before.endswith("-") and not before[:-1][-1:].isalnum()
    return -number if is_negative else number


def share(found: list[tuple[object, list[object]]]) -> float:
    """Return the share of answers that are there and equal a reference."""
    return sum(answer is not None and answer in texts for answer, texts in found) / len(found)


def main(file: Path) -> None:
    """Print both shares as JSON."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    counted = {
        name: share([(of(row["answer"]), [of(text) for text in row["references"]]) for row in rows])
        for name, of in (("marked_number", marked), ("last_number", last))
    }
    print(json.dumps(counted))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
