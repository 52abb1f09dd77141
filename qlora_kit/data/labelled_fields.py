"""Finds out which column of labelled data is which field, by the names that people give them.

Takes the names of a record's columns, or the first line of a table; returns names by field. Never
looks at a value, but for the nulls of a record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Names that data sets give to these fields, the likeliest first. Case does not count.
_TEXTS = (
    "text", "sentence", "content", "review", "review_text", "comment", "comment_text", "tweet",
    "message", "utterance", "query", "question", "document", "body", "description", "headline",
    "title", "input", "phrase",
)  # fmt: skip
_PAIRS = (
    ("text1", "text2"), ("text_1", "text_2"), ("sentence1", "sentence2"),
    ("sentence_1", "sentence_2"), ("sentence_a", "sentence_b"), ("sent1", "sent2"),
    ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
    ("question", "passage"), ("question", "context"), ("query", "passage"), ("query", "document"),
)  # fmt: skip
_IMAGES = ("image", "image_path", "img", "img_path", "file_name")
_LABELS = (
    "label", "labels", "class", "category", "target", "score", "sentiment", "rating", "stars",
    "intent", "emotion", "topic", "gold_label", "similarity_score", "is_duplicate", "label_text",
)  # fmt: skip
_TOKENS = ("tokens", "words", "text", "sentence")
_TAGS = (
    "tags", "ner_tags", "labels", "label", "ner", "ner_labels", "entities", "pos_tags", "upos",
    "pos", "tag_ids", "chunk_tags",
)  # fmt: skip

Columns = Mapping[str, str]
"""the name of a column by its field"""

_PAIR_FIELDS = ("text_a", "text_b")
# A field's own name goes before all others, and two texts go before one of them.
_TEXT_WAYS: Sequence[Columns] = (
    {name: name for name in _PAIR_FIELDS},
    {"text": "text"},
    *(dict(zip(_PAIR_FIELDS, pair, strict=True)) for pair in _PAIRS),
    *({"text": name} for name in _TEXTS),
    *({"image": name} for name in _IMAGES),
)
_LABEL_WAYS: Sequence[Columns] = tuple({"label": name} for name in _LABELS)
_KNOWN = frozenset(name for way in (*_TEXT_WAYS, *_LABEL_WAYS) for name in way.values())
_WAYS: Mapping[str, Sequence[Sequence[Columns]]] = {
    "classify": (_TEXT_WAYS, _LABEL_WAYS),
    "tag": (
        tuple({"tokens": name} for name in _TOKENS),
        tuple({"tags": name} for name in _TAGS),
    ),
}
"""of each task whose columns are found by their names, the ways to read what is given and wanted"""


def knows_columns(task: str) -> bool:
    """Return whether the columns of a task's data are found by their names."""
    return task in _WAYS


def find_columns(record: Mapping[str, Any], given: Columns, task: str = "classify") -> Columns:
    """Return which column of a record is which field, for the fields that are not given.

    What is given to a model and what it shall say are found together or not at all.

    Args:
        record: the fields of a record; a null counts only where nothing is found otherwise.
        given: the columns that the user names.
        task: the task whose fields are looked for, see `knows_columns`.
    """
    sides = [_not_given(ways, given) for ways in _WAYS[task]]
    for names in ([name for name, value in record.items() if value is not None], [*record]):
        columns = {name.lower(): name for name in names if name not in given.values()}
        found = [_first(ways, columns) for ways in sides]
        if None not in found:
            return {field: name for way in found for field, name in (way or {}).items()}
    return {}


def _not_given(ways: Sequence[Columns], given: Columns) -> Sequence[Columns]:
    """Return the ways to find some fields; only the empty one where the user names one of them."""
    fields = {field for way in ways for field in way}
    return ({},) if given.keys() & fields else ways


def _first(ways: Sequence[Columns], columns: Columns) -> Columns | None:
    """Return the first way of which all names are there, with the columns' own spelling."""
    for way in ways:
        if all(name in columns for name in way.values()):
            return {field: columns[name] for field, name in way.items()}
    return None


@dataclass
class TablesWithoutHeader:
    """Names the columns of tables whose first line is a row, and remembers these tables.

    Attributes:
        given: the columns that the user names; where there are some, every table has a header.
        found: the files without a header.
    """

    given: Columns
    found: list[str] = field(default_factory=list)

    def columns(self, first: Sequence[str], file: str) -> list[str] | None:
        """Return names for the columns of a table, or None if its first line has them.

        Args:
            first: the fields of the first line.
            file: the file of the table.
        """
        has_header = any(name.strip().lower() in _KNOWN for name in first)
        if has_header or self.given or len(first) not in (2, 3):
            return None
        self.found.append(file)
        return ["text", "label"] if len(first) == 2 else [*_PAIR_FIELDS, "label"]

    def notices(self) -> list[str]:
        """Return one line for each file without a header."""
        return [
            f"{file}: its first line names no known field, and is read as a row: the text first, "
            "the label last; if it is a header, say which column is which with --columns"
            for file in self.found
        ]
