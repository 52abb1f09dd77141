"""Reads sentences written in columns, as CoNLL's files are: a word a line, its tag the last column.

Takes the lines of a file; yields sentences with the place of their first line. A blank line ends a
sentence. Never looks at the meaning of a tag.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from qlora_kit.errors import DataError
from qlora_kit.storage import Line

_DOCUMENT = "-DOCSTART-"
_CONLLU_COLUMNS = 10
_CONLLU_WORD, _CONLLU_TAG = 1, 3

Sentence = tuple[str, dict[str, Any] | DataError]
"""the place of a sentence, and its fields or its fault"""


def sentences(lines: Iterable[Line], *, is_conllu: bool = False) -> Iterator[Sentence]:
    """Yield the sentences of a file.

    The fields are `tokens`, the first column, and `tags`, the last; the columns between are named
    by their numbers. Columns are parted by tabs, or by spaces where a line has no tab. Lines that
    begin with -DOCSTART-, and comments before a sentence, are left out.

    Args:
        lines: of the file.
        is_conllu: whether the columns are CoNLL-U's: the second is a word, the fourth its part of
            speech; ranges such as 1-2 and words such as 1.1 that are not in the text are left out.
    """
    reader = _Reader(is_conllu)
    for line in lines:
        yield from reader.take(line)
    yield from reader.end()


class _Reader:
    """Collects the rows of one sentence at a time."""

    def __init__(self, is_conllu: bool) -> None:
        self.is_conllu = is_conllu
        self.width: int | None = None
        """number of columns of the file, which is that of its first row"""
        self.rows: list[list[str]] = []
        self.place = ""
        self.fault: DataError | None = None

    def take(self, line: Line) -> Iterator[Sentence]:
        """Add a line; yield the sentence that it ends, if it ends one."""
        text = line.record
        fields = [each.strip() for each in text.split("\t")] if "\t" in text else text.split()
        if not any(fields) or fields[0] == _DOCUMENT:
            yield from self.end()
        elif not (text.startswith("#") and self._is_comment(fields)):
            self._add(fields, f"{line.file}:{line.line}")

    def _is_comment(self, fields: Sequence[str]) -> bool:
        """Return whether a line with # is a comment: before a sentence, and of another width."""
        return not self.rows and len(fields) != self.width

    def _add(self, fields: list[str], where: str) -> None:
        self.place = self.place or where
        try:
            self._check(fields, where)
        except DataError as error:
            self.fault = self.fault or error
        # A faulty row counts as well, so that no line behind it is taken for a comment.
        self.rows.append(fields)

    def _check(self, fields: Sequence[str], where: str) -> None:
        if len(fields) == 1:
            raise DataError(
                f"{where}: one column; expected a word and its tag, with a tab or a space between; "
                "add the tag, or pass --skip-bad-lines"
            )
        if self.width is None:
            self.width = len(fields)
        if len(fields) != self.width:
            raise DataError(
                f"{where}: {len(fields):,} columns; expected {self.width:,} as in the first row; "
                "correct it, or pass --skip-bad-lines"
            )
        for column, name in (self._columns()[0], "word"), (self._columns()[1], "tag"):
            if not fields[column]:
                raise DataError(
                    f"{where}: the {name} is empty; expected one in its column; fill it in, or "
                    "pass --skip-bad-lines"
                )

    def _columns(self) -> tuple[int, int]:
        """Return the columns of words and tags."""
        is_conllu = self.is_conllu and self.width == _CONLLU_COLUMNS
        return (_CONLLU_WORD, _CONLLU_TAG) if is_conllu else (0, -1)

    def end(self) -> Iterator[Sentence]:
        """Yield the sentence that has been collected, if there is one."""
        rows, place, fault = self.rows, self.place, self.fault
        self.rows, self.place, self.fault = [], "", None
        if fault is not None:
            yield place, fault
        elif rows:
            yield place, self._fields(rows)

    def _fields(self, rows: Sequence[Sequence[str]]) -> dict[str, Any]:
        word, tag = self._columns()
        if word:
            rows = [row for row in rows if row[0].isdecimal()]
        by_column = [list(column) for column in zip(*rows, strict=True)]
        if not by_column:
            return {"tokens": [], "tags": []}
        others = enumerate(by_column[1:-1], 2)
        return {
            **{str(number): column for number, column in others},
            "tokens": by_column[word],
            "tags": by_column[tag],
        }
