"""What a row of tags spells: entities of several words, by prefixes such as B- and I-.

Takes the tags of sentences; returns entities, and the name of the scheme that they are written in.
Entities are those that seqeval and conlleval find: a tag that continues nothing begins an entity.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

OUTSIDE = "O"
_TAG = re.compile(r"([BIESULMW])(?:-(.+))?")
# Other letters for the same four places: BILOU says U and L, BMEWO says M and W.
_ONE_WAY = {"U": "S", "L": "E", "W": "S", "M": "I"}
# seqeval's name for the type of a tag that is a prefix alone.
_NO_TYPE = "_"


class Entity(NamedTuple):
    """An entity: its type, its first word, and the word behind its last."""

    type: str
    start: int
    end: int


def has_scheme(names: Iterable[str]) -> bool:
    """Return whether tags mark entities: all are O or have a prefix, and B or I is among these."""
    found = [_TAG.fullmatch(name) for name in names if name != OUTSIDE]
    prefixes = {match[1] for match in found if match}
    return all(found) and bool(prefixes & {"B", "I"})


def without_prefix(name: str) -> str:
    """Return the type of a tag that has a prefix; any other name as it is."""
    match = _TAG.fullmatch(name)
    return match[2] if match and match[2] else name


def entities(tags: Sequence[str]) -> list[Entity]:
    """Return the entities of a sentence whose tags have a scheme.

    A word belongs to the entity of the word before it if both have one type, its own prefix is I or
    E, and the prefix before it is B or I. Every other word with a type begins an entity.
    """
    return [Entity(kind, start, end) for kind, start, end, _ in _found(tags)]


class _Found(NamedTuple):
    type: str
    start: int
    end: int
    is_opened: bool
    """whether the prefix of the first word says that an entity begins there"""


def _found(tags: Iterable[str]) -> Iterator[_Found]:
    kind, start, is_opened, before = None, 0, True, ""
    for place, tag in enumerate([*tags, OUTSIDE]):
        prefix, own = _parted(tag)
        if own is not None and own == kind and prefix in "IE" and before in "BI":
            before = prefix
            continue
        if kind is not None:
            yield _Found(kind, start, place, is_opened)
        kind, start, is_opened, before = own, place, prefix in "BS", prefix


def _parted(tag: str) -> tuple[str, str | None]:
    """Return the place that a prefix means, one of BIES, and the type; ("", None) of no entity."""
    match = _TAG.fullmatch(tag)
    if match is None:
        return "", None
    return _ONE_WAY.get(match[1], match[1]), match[2] or _NO_TYPE


# ---------------------------------------------------------------- the scheme


@dataclass(frozen=True)
class Scheme:
    """How the tags of data mark entities.

    Attributes:
        name: BIO (also called IOB2), IOB1, BIOES (IOBES), BILOU or BMEWO.
        types: of the entities, by name.
        unopened: entities of the data that the scheme would begin with another prefix.
    """

    name: str
    types: tuple[str, ...]
    unopened: int

    def describe(self) -> str:
        """Return one line for people."""
        types = "1 type" if len(self.types) == 1 else f"{len(self.types):,} types"
        broken = (
            f"; {self.unopened:,} begin without the prefix that says so, and are counted as "
            "conlleval counts them"
        )
        return f"{self.name}, entities of {types}{broken if self.unopened else ''}"


def scheme_of(sentences: Iterable[Sequence[str]]) -> Scheme:
    """Return the scheme of the tags of sentences, which have one, see `has_scheme`."""
    prefixes: set[str] = set()
    types: set[str] = set()
    unopened = plainly_opened = 0
    for tags in sentences:
        prefixes.update(tag[0] for tag in tags if tag != OUTSIDE)
        end, kind = -1, ""
        for entity in _found(tags):
            types.add(entity.type)
            unopened += not entity.is_opened
            # IOB1 writes B only where an entity follows another of its type at once.
            is_divided = entity.start == end and entity.type == kind
            plainly_opened += entity.is_opened and not is_divided
            end, kind = entity.end, entity.type
    name = _name(prefixes)
    if name == "BIO" and unopened and not plainly_opened:
        name, unopened = "IOB1", 0
    return Scheme(name, tuple(sorted(types)), unopened)


def _name(prefixes: set[str]) -> str:
    for letters, name in (("UL", "BILOU"), ("MW", "BMEWO"), ("ES", "BIOES")):
        if prefixes & set(letters):
            return name
    return "BIO"
