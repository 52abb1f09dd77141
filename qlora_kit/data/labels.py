"""The labels of a task that classifies: their kind, names and weights, and what a sample aims at.

Takes samples and what the user asks for; returns `Labels`. Never reads a text of the data, and an
error repeats a label only where it is a plain name or a number.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from qlora_kit.config import LabelKind, TaskOptions
from qlora_kit.data.fields import is_plain
from qlora_kit.data.samples import Samples
from qlora_kit.data.shapes import LabelledImage, LabelledText, Shape, TaggedWords
from qlora_kit.data.tag_schemes import has_scheme, scheme_of, without_prefix
from qlora_kit.errors import ConfigError, DataError

Label = str | float | tuple[str, ...]
LabelledSample = LabelledText | TaggedWords | LabelledImage

MOST_LABELS = 10_000
_MOST_NAMED = 6

# Words that programs write for a number that is missing belong to it: they are told, not learnt.
_NUMBER = re.compile(r"[+-]?(\d{1,18}(\.\d*)?|\.\d+)(e[+-]?\d{1,3})?|[+-]?(nan|inf|infinity)", re.I)
_WHOLE = re.compile(r"[+-]?\d{1,18}(\.0*)?")
# Among names they may be classes, but hardly are.
_ABSENT = ("nan", "null", "n/a", "#n/a", "<na>")
# A table has no lists: with several labels a sample, this is what people write between them.
_BETWEEN = re.compile(r"[|,;]")


@dataclass(frozen=True)
class Labels:
    """The labels that a head tells apart, or the value that it gives.

    Attributes:
        kind: one label a sample, several, a number, or a tag for each of its words.
        names: of the classes, in the order of the head's outputs; none for a number.
        weights: of the classes in the loss, in the same order.
    """

    kind: LabelKind
    names: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def outputs(self) -> int:
        """Return the number of values that a head gives for a sample."""
        return len(self.names) or 1

    @cached_property
    def _places(self) -> Mapping[str, int]:
        """The place of each class, by its name; by its number as well, where names are no numbers.

        People give names to data whose labels are numbers: `--labels negative,positive`.
        """
        by_name = {name: place for place, name in enumerate(self.names)}
        if any(_WHOLE.fullmatch(name) for name in self.names):
            return by_name
        return {**{str(place): place for place in by_name.values()}, **by_name}

    def target(self, sample: LabelledSample) -> list[float]:
        """Return what a head shall say of a sample: the index of its class, of each, or a value.

        Of tagged words it is the index of each tag, in the order of the words.

        Raises:
            DataError: the sample has no label, or one that is not known here.
        """
        label = sample.label
        if label is None:
            raise DataError(
                f'{sample.place}: no "label"; expected one to learn or to compare with; add it'
            )
        if self.kind == "regression":
            return [_value(label, sample.place)]
        names = names_in(label, self.kind, sample.place)
        unknown = [name for name in names if name not in self._places]
        if unknown:
            word = f": word {names.index(unknown[0]) + 1:,}" if self.kind == "tags" else ""
            raise DataError(f"{sample.place}{word}: {self._unknown(unknown[0])}")
        places: list[float] = [self._places[name] for name in names]
        return places if self.kind == "tags" else sorted({*places})

    def _unknown(self, name: str) -> str:
        found = f"the label {name}" if is_shown(name) else "a label"
        return (
            f"{found} that is none of the {len(self.names):,} known ones; expected "
            f"{_listed(self.names)}; correct it, add it to the training data or to --labels, or "
            "remove the record"
        )

    def check(self, samples: Samples) -> None:
        """Check that the label of every sample is known.

        Raises:
            DataError: one is not; the first is named, and the number of samples like it.
        """
        first, count = None, 0
        for sample in labelled(samples):
            try:
                self.target(sample)
            except DataError as error:
                first, count = first or error, count + 1
        if first is None:
            return
        others = f" ({count:,} records have such a label)" if count > 1 else ""
        raise DataError(f"{first.faults[0]}{others}")

    def name_of(self, target: Sequence[float]) -> str:
        """Return a target in words: the name of a class, the names of several, or the value."""
        if self.kind == "regression":
            return f"{target[0]:g}"
        names = [self.names[int(place)] for place in target if place >= 0]
        return (" " if self.kind == "tags" else ", ").join(names) or "none"

    def counts(self, targets: Sequence[float]) -> tuple[int, ...]:
        """Return how often each class is in targets that were joined to one list."""
        found = Counter(map(int, targets))
        return tuple(found[place] for place in range(len(self.names)))

    def content_hash(self) -> str:
        """Return the SHA-256 of kind, names and weights."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()

    def describe(self) -> str:
        """Return one line for people, which says how labels were understood."""
        if self.kind == "regression":
            return "a number each, to be predicted (--label-kind regression)"
        weighed = "" if set(self.weights) == {1.0} else ", weighed"
        if self.kind == "tags":
            return f"one of {len(self.names):,} ({_listed(self.names)}) for each word{weighed}"
        how = "one" if self.kind == "single" else "none, one or several"
        return (
            f"{how} of {len(self.names):,} ({_listed(self.names)}) each{weighed} "
            f"(--label-kind {self.kind})"
        )


def labelled(samples: Samples) -> Iterator[LabelledSample]:
    """Yield the samples, which are labelled texts, tagged words or labelled images all."""
    for sample in samples.items:
        assert isinstance(sample, LabelledSample)
        yield sample


def tags_in_words(labels: Labels, samples: Samples) -> str:
    """Return one line for people: how the tags of samples were understood.

    Args:
        labels: the tags.
        samples: tagged words, whose tags are known.
    """
    if not has_scheme(labels.names):
        numbers = all(map(_WHOLE.fullmatch, labels.names))
        remedy = "; where they stand for B-PER and the like, name them with --labels"
        return (
            "no scheme of entities (B-, I- …): tags are measured word by word"
            f"{remedy if numbers else ''}"
        )
    names = (
        [labels.names[int(place)] for place in labels.target(sample)]
        for sample in labelled(samples)
    )
    return f"scheme {scheme_of(names).describe()}"


def is_shown(name: str) -> bool:
    """Return whether an error may repeat the name of a label: a plain name, or a number."""
    return is_plain(without_prefix(name)) or bool(_WHOLE.fullmatch(name))


def _listed(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    shown = [name for name in names if is_shown(name)][:_MOST_NAMED]
    more = len(names) - len(shown)
    return " and ".join(
        [*([", ".join(shown)] if shown else []), *([f"{more:,} more"] if more else [])]
    )


# ---------------------------------------------------------------- one label


def names_in(label: Label, kind: LabelKind, where: str) -> list[str]:
    """Return the names of the classes in a label; each is written in one way.

    Raises:
        DataError: there are several, and each sample has one.
    """
    if isinstance(label, tuple):
        if kind == "single":
            raise DataError(
                f"{where}: the label is a list; expected one name with --label-kind single; write "
                "one, or train with --label-kind multi"
            )
        return [*map(_one_way, label)]
    if kind == "multi" and isinstance(label, str):
        return [_one_way(part.strip()) for part in _BETWEEN.split(label) if part.strip()]
    return [_one_way(label)]


def _one_way(label: str | float) -> str:
    """Return a whole number in one way: 1, 1.0, "1" and "1.0" name one class."""
    if isinstance(label, str):
        return label.partition(".")[0] if "." in label and _WHOLE.fullmatch(label) else label
    return str(int(label)) if float(label).is_integer() else repr(label)


def _parts(label: Label) -> tuple[str, ...]:
    """Return the names in a label, as the data writes them."""
    return label if isinstance(label, tuple) else (_one_way(label),)


def _number(label: Label) -> float | None:
    """Return the number that a label is, or that its text writes; None if it is neither."""
    if isinstance(label, str):
        return float(label) if _NUMBER.fullmatch(label) else None
    return None if isinstance(label, tuple) else float(label)


def _value(label: Label, where: str) -> float:
    value = _number(label)
    if value is None or not math.isfinite(value):
        found = "is no number" if value is None else "is no finite number"
        raise DataError(
            f"{where}: the label {found}; expected one with --label-kind regression; correct it, "
            "remove the record, or train with another --label-kind"
        )
    return value


# ---------------------------------------------------------------- the labels of data


def labels_of(samples: Samples, options: TaskOptions) -> Labels:
    """Return the labels of training samples, as the data has them or as they are asked for.

    Args:
        samples: labelled texts.
        options: names, kind and weights that the user gives.

    Raises:
        DataError: a label does not fit the kind or the names; or there is nothing to tell apart.
        ConfigError: the options contradict each other or the data.
    """
    return _Search(samples, options).labels()


class _Search:
    """Finds the labels of samples, by each label that differs and the first sample that has it."""

    def __init__(self, samples: Samples, options: TaskOptions) -> None:
        self.samples = samples
        self.options = options
        self.counts: Counter[Label] = Counter()
        self.first: dict[Label, str] = {}
        for sample in labelled(samples):
            for label in _labels_in(sample):
                self.counts[label] += 1
                self.first.setdefault(label, sample.place)
        self.known = options.labels or self._class_names()

    def _class_names(self) -> tuple[str, ...]:
        """Return the names that the data set has, if its labels are the numbers of these."""
        is_number = (_WHOLE.fullmatch(name) for label in self.counts for name in _parts(label))
        return self.samples.class_names if all(is_number) else ()

    def labels(self) -> Labels:
        """Return the labels, checked on every sample."""
        kind = self._kind()
        if kind == "regression":
            self._check_no_names()
            found = Labels(kind)
        else:
            names = self._names(kind)
            found = Labels(kind, names, (1.0,) * len(names))
        found.check(self.samples)
        self._check_several(found)
        return found if kind == "regression" else self._weighed(found)

    @property
    def _tags_words(self) -> bool:
        return self.samples.shape is Shape.TAG

    @property
    def _has_folders(self) -> bool:
        return self.samples.shape is Shape.IMAGE and bool(self.samples.class_names)

    @property
    def _column(self) -> str:
        """The option that names the right column."""
        return f"--columns {'tags' if self._tags_words else 'label'}=COLUMN"

    # ------------------------------------------------------------ kind

    def _kind(self) -> LabelKind:
        asked = self.options.label_kind
        if self._tags_words:
            if asked != "auto":
                raise ConfigError(
                    f"--label-kind {asked}: each word has one tag; expected no other kind with "
                    "--task tag; leave it out"
                )
            return "tags"
        if self._has_folders:
            if asked not in ("auto", "single"):
                raise ConfigError(
                    f"--label-kind {asked}: each image lies in the folder of its class; expected "
                    "no other kind of folders; leave it out, or name images and labels in a JSONL"
                )
            return "single"  # a folder may be named 1.5, and it is a name all the same
        if asked == "single":
            self._check_no_fractions()
        if asked != "auto":
            return asked
        lists = [label for label in self.counts if isinstance(label, tuple)]
        if lists:
            self._check_all_lists(lists)
            return "multi"
        numbers = [_number(label) for label in self.counts]
        if any(number is None for number in numbers) or self.known:
            return "single"
        odd = self._where(lambda number: not math.isfinite(number))
        if odd:
            raise DataError(
                f"{odd}: the label is no finite number among numbers; expected one as in the other "
                "records; correct it, or remove the record"
            )
        return "regression" if self._where(_has_fraction) else "single"

    def _where(self, is_meant: Callable[[float], bool]) -> str | None:
        """Return the place of the first label that is such a number; None if none is."""
        for label, place in self.first.items():
            number = _number(label)
            if number is not None and is_meant(number):
                return place
        return None

    def _check_all_lists(self, lists: Sequence[Label]) -> None:
        other = next((label for label in self.counts if not isinstance(label, tuple)), None)
        if other is not None:
            raise DataError(
                f"{self.first[other]}: the label is no list; expected one as in "
                f"{self.first[lists[0]]}; write one in [ ], or pass --label-kind multi"
            )

    def _check_no_fractions(self) -> None:
        place = None if self.options.labels else self._where(_has_fraction)
        if place:
            raise DataError(
                f"{place}: the label is a number with a fraction; expected a name or a whole "
                "number with --label-kind single; pass --label-kind regression, or name them all "
                "with --labels"
            )

    def _check_no_names(self) -> None:
        for flag, given in (
            ("--labels", self.options.labels),
            ("--class-weights", self.options.class_weights),
        ):
            if given:
                raise ConfigError(
                    f"{flag}: the label is a number to predict, without classes; expected neither "
                    f"names nor weights; leave {flag} out, or pass --label-kind single"
                )

    # ------------------------------------------------------------ names

    def _names(self, kind: LabelKind) -> tuple[str, ...]:
        if self.known:
            return self._known_names()
        found = dict.fromkeys(
            name for label in self.counts for name in names_in(label, kind, self.first[label])
        )
        if len(found) > MOST_LABELS:
            raise DataError(
                f"{self.samples.source}: {len(found):,} different labels; expected {MOST_LABELS:,} "
                f"at most; name the right column with {self._column}"
                f"{'' if self._tags_words else ', or pass --label-kind regression for numbers'}"
            )
        in_order = all(re.fullmatch(r"[+-]?\d{1,18}", name) for name in found)
        return tuple(sorted(found, key=_by_number if in_order else _by_text))

    def _known_names(self) -> tuple[str, ...]:
        names = tuple(map(_one_way, self.known))
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None or len(names) > MOST_LABELS:
            found = f"{twice!r} twice" if twice is not None else f"{len(names):,} names"
            raise ConfigError(
                f"--labels: {found}; expected {MOST_LABELS:,} names at most, each once; correct it"
            )
        return names

    def _check_several(self, labels: Labels) -> None:
        """A single answer to everything needs no model."""
        of_samples = map(labels.target, labelled(self.samples))
        targets = {part for target in of_samples for part in _answers(target, labels.kind)}
        if len(targets) > 1 or self.options.labels:
            return
        only = labels.name_of(next(iter(targets)))
        named = f" ({only})" if all(map(is_shown, only.split(", "))) else ""
        raise DataError(
            f"{self.samples.source}: one label only{named} in {len(self.samples.items):,} records; "
            "expected two or more to tell apart; add records of another, or name the right column "
            f"with {self._column}"
        )

    # ------------------------------------------------------------ weights

    def _weighed(self, labels: Labels) -> Labels:
        asked = self.options.class_weights
        if not asked:
            return labels
        if asked == "balanced":
            return Labels(labels.kind, labels.names, tuple(self._balanced(labels)))
        unknown = [name for name in asked if name not in labels.names]
        if unknown:
            raise ConfigError(
                f"--class-weights: no label {unknown[0]!r}; expected labels of the data, as "
                f"{_listed(labels.names)}; correct it"
            )
        return Labels(
            labels.kind, labels.names, tuple(asked.get(name, 1.0) for name in labels.names)
        )

    def _balanced(self, labels: Labels) -> Iterator[float]:
        """Yield n / (K n_k): with these weights all classes of the data count alike."""
        counts = class_counts(labels, self.samples)
        occurring = sum(count > 0 for count in counts)
        for count in counts:
            yield sum(counts) / (occurring * count) if count else 1.0


def _labels_in(sample: LabelledSample) -> Iterator[Label]:
    """Yield the label of a text, where it has one, or those of each of its words."""
    if isinstance(sample, TaggedWords):
        yield from sample.tags
    elif sample.label is not None:
        yield sample.label


def _answers(target: list[float], kind: LabelKind) -> Iterator[tuple[float, ...]]:
    """Yield the answers in a target: one of a text, one for each word of a sentence."""
    if kind == "tags":
        yield from ((place,) for place in target)
    else:
        yield tuple(target)


def class_counts(labels: Labels, samples: Samples) -> tuple[int, ...]:
    """Return how many samples have each class."""
    return labels.counts([each for sample in labelled(samples) for each in labels.target(sample)])


def missing_from(labels: Labels, counts: Sequence[int], what: str) -> Iterator[str]:
    """Yield a notice if there are classes that no row has.

    Args:
        labels: the classes.
        counts: rows of each.
        what: the rows that were counted, in words.
    """
    missing = [name for name, count in zip(labels.names, counts, strict=True) if not count]
    if missing:
        one = len(missing) == 1
        yield (
            f"labels that no row of {what} has: {len(missing):,} ({_listed(missing)}); "
            f"{'it is' if one else 'they are'} never learnt; add rows of "
            f"{'it' if one else 'them'}, or leave {'it' if one else 'them'} out of --labels"
        )


def doubtful(labels: Labels) -> Iterator[str]:
    """Yield a notice if names of classes look like a slip: two spellings, or a missing value."""
    spellings = defaultdict(list)
    for name in labels.names:
        spellings[name.casefold()].append(name)
    alike = [name for names in spellings.values() if len(names) > 1 for name in names]
    if alike:
        yield (
            f"labels that differ in capitals only: {len(alike):,} ({_listed(alike)}); each is a "
            "class of its own; write them alike if they mean the same"
        )
    absent = [name for name in labels.names if name.casefold() in _ABSENT]
    if absent:
        yield (
            f"labels that programs write where there is none: {len(absent):,} "
            f"({_listed(absent)}); each is learnt as a class; remove the records if it is none"
        )


def held_out_whole(labels: Labels, counts: Sequence[int], kept: Sequence[int]) -> Iterator[str]:
    """Yield a notice if all rows of a class were held out for validation.

    Args:
        labels: the classes.
        counts: rows of each class.
        kept: those of them that are left to learn from.
    """
    pairs = zip(labels.names, counts, kept, strict=True)
    gone = [name for name, count, left in pairs if count and not left]
    if gone:
        yield (
            f"labels all of whose rows are held out: {len(gone):,} ({_listed(gone)}); "
            "they are never learnt; add rows of them, pass another --seed or give --validation FILE"
        )


def _has_fraction(number: float) -> bool:
    return math.isfinite(number) and not number.is_integer()


def _by_number(name: str) -> tuple[int, str]:
    return int(name), name


def _by_text(name: str) -> tuple[int, str]:
    return 0, name
