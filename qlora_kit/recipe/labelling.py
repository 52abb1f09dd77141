"""Let a classifier label texts, or their words: what `generate` does where a model writes none."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qlora_kit.config import GenerateConfig
from qlora_kit.data.samples import PromptRecord
from qlora_kit.errors import DataError
from qlora_kit.events import Announce, Answered, Notice
from qlora_kit.opening.adapters import put_by_row_on
from qlora_kit.opening.tasks import is_of_images
from qlora_kit.recipe.showing_images import ImageReader
from qlora_kit.recipe.tagging import WordReader

if TYPE_CHECKING:
    from qlora_kit.data.batch import Row
    from qlora_kit.model.class_head import ClassHead
    from qlora_kit.opening.model import Opened

# Of a model that does not say how many positions it has.
_MOST_TOKENS = 1024
_MOST_SHOWN = 5
_OF_TEXT = ("max_new_tokens", "temperature", "top_p", "seed", "chat_template")


def labelled(
    config: GenerateConfig, opened: Opened, asked: Sequence[PromptRecord], announce: Announce
) -> dict[str, Any]:
    """Label texts.

    Args:
        config: the options.
        opened: the classifier.
        asked: the texts.
        announce: receives the events.

    Returns:
        The labels of the texts and how likely they are, for programs.

    Raises:
        DataError: a prompt is made of turns, or has no word to label.
    """
    from qlora_kit.infer.labels import likelihoods
    from qlora_kit.model.threads import choose_threads

    reader = _reader(config, opened, announce)
    rows = reader.rows([_text(prompt) for prompt in asked])
    _check_all_read(asked, rows)
    base = opened.load(config, announce, choose_threads(config.threads))
    per_row = put_by_row_on(base, config, [asked[row["row"]].adapter for row in rows], announce)
    objective: Any = opened.task.objective(base, opened.tokenizer.pad_token_id, 1, None)
    found = zip(rows, likelihoods(objective, rows, per_row=per_row), strict=True)
    answers = []
    # A long text has several rows, one after the other.
    for index, parts in groupby(found, key=lambda pair: pair[0]["row"]):
        answers.append(reader.answer(index, [values for _, values in parts]))
        announce(Answered(as_shown(config, asked[index], reader.in_words(answers[-1]))))
    given = list(zip(asked, answers, strict=True))
    if config.prompts is not None:
        listed = [{"place": p.place, "adapter": p.adapter, **answer} for p, answer in given]
        return {"prompts": str(config.prompts), "answers": listed}
    if config.adapters:
        return {"prompt": config.prompt, "answers": {p.adapter: answer for p, answer in given}}
    return {"prompt": config.prompt, **answers[0]}


def _reader(config: GenerateConfig, opened: Opened, announce: Announce) -> _Reader:
    """Return what reads the prompts; say which options have no effect on it."""
    classes = opened.task.classes
    assert classes is not None, "it is a classifier"
    tags_words = classes.kind == "tags"
    for name in _OF_TEXT if tags_words else ("raw", *_OF_TEXT):
        if name in config.model_fields_set:
            flag = name.replace("_", "-")
            announce(Notice(f"--{flag} has no effect: a classifier labels a text and writes none"))
    if is_of_images(opened.task):
        folder = Path() if config.prompts is None else config.prompts.parent
        return ImageReader(classes, opened.tokenizer, folder, _answer, _in_words)
    most = min(opened.positions(config) or _MOST_TOKENS, opened.tokenizer.model_max_length)
    if tags_words:
        return WordReader(classes, opened.tokenizer, most, is_raw=config.raw)
    return _TextReader(classes, opened.tokenizer, most, announce)


def _text(prompt: PromptRecord) -> str:
    if not isinstance(prompt.content, str):
        raise DataError(
            f"{prompt.place}: turns, and a classifier labels one text; expected a text; write the "
            "prompt as one"
        )
    return prompt.content


def _check_all_read(asked: Sequence[PromptRecord], rows: Sequence[Row]) -> None:
    read = {row["row"] for row in rows}
    for index, prompt in enumerate(asked):
        if index not in read:
            raise DataError(
                f"{prompt.place}: no word, or one that the tokenizer has no token for; expected "
                "words to label; correct it"
            )


class _Reader(Protocol):
    """Reads prompts for a classifier, and says what its outputs mean."""

    def rows(self, texts: Sequence[str]) -> list[Row]:
        """Return the rows of all texts; `row` is the index of a text.

        A text without words has no row.
        """
        ...

    def answer(self, index: int, values: Sequence[list[Any]]) -> dict[str, Any]:
        """Return the answer to a text, for programs; `values` are the likelihoods of its rows."""
        ...

    def in_words(self, answer: dict[str, Any]) -> str:
        """Return an answer as one line."""
        ...


class _TextReader:
    """Reads each text as a whole, see `_Reader`."""

    def __init__(
        self, classes: ClassHead, tokenizer: Any, max_length: int, announce: Announce
    ) -> None:
        from qlora_kit.data.labelled_rows import TextEncoder

        self._classes = classes
        self._encoder = TextEncoder(tokenizer, max_length)
        self._most = max_length
        self._announce = announce

    def rows(self, texts: Sequence[str]) -> list[Row]:
        """See `_Reader`."""
        no_label: list[float] = [0.0] if self._classes.kind != "multi" else []
        encoded = [self._encoder.encode(text) for text in texts]
        cut = sum(self._encoder.length(text) > self._most for text in texts)
        if cut:
            self._announce(
                Notice(
                    f"{cut:,} of {len(texts):,} texts are cut: the model reads {self._most:,} "
                    "tokens at most"
                )
            )
        return [
            {"input_ids": each.ids, "token_types": each.token_types, "labels": no_label, "row": row}
            for row, each in enumerate(encoded)
            if texts[row].strip()
        ]

    def answer(self, index: int, values: Sequence[list[Any]]) -> dict[str, Any]:
        """See `_Reader`."""
        return _answer(self._classes, values[0])

    def in_words(self, answer: dict[str, Any]) -> str:
        """See `_Reader`."""
        return _in_words(answer)


def _answer(classes: ClassHead, values: Sequence[float]) -> dict[str, Any]:
    """Return the label, labels or number of a text, and how likely each label is."""
    if classes.kind == "regression":
        return {"value": values[0]}
    by_name = dict(zip(classes.names, values, strict=True))
    if classes.kind == "multi":
        chosen = [name for name, value in by_name.items() if value > 0.5]
        return {"labels": chosen, "probabilities": by_name}
    return {"label": max(by_name, key=by_name.__getitem__), "probabilities": by_name}


def _in_words(answer: dict[str, Any]) -> str:
    if "value" in answer:
        return f"{answer['value']:.4f}"
    likely = sorted(answer["probabilities"].items(), key=lambda item: -item[1])[:_MOST_SHOWN]
    shares = ", ".join(f"{name} {value:.3f}" for name, value in likely)
    chosen = answer["label"] if "label" in answer else ", ".join(answer["labels"]) or "none"
    return f"{chosen}  ({shares})"


def as_shown(config: GenerateConfig, prompt: PromptRecord, answer: str) -> str:
    """Return an answer in words, behind what tells its prompt from other prompts, if any."""
    labels = [prompt.place] if config.prompts is not None else []
    labels += [prompt.adapter or "the base alone"] if config.adapters else []
    return f"{', '.join(labels)}: {answer}" if labels else answer
