"""Texts that a model writes before and after its training, for a few prompts of the run's data.

Takes token rows, so that a prompt has exactly the ids that training sees. Keeps the texts in
`samples.json`, so that a resumed run still has those from before training. They contain text of the
data, so they belong in this file and on the run's page, and never in a log, a notice or an error.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from qlora_kit.data.batch import TokenRows
from qlora_kit.data.encode import IGNORED
from qlora_kit.errors import DataError, StorageError
from qlora_kit.events import Announce, Notice
from qlora_kit.infer.generate import Sampling, generate
from qlora_kit.model.load import Base
from qlora_kit.model.memory import release_memory
from qlora_kit.redact import redacted_values
from qlora_kit.storage import read_json, write_json

NAME = "samples.json"
MOST_NEW_TOKENS = 64
_LEAST_NEW_TOKENS = 8
# Samples are an extra, so their time and their memory must be small beside those of training.
_MOST_SECONDS = 30.0
_MOST_PROMPT_TOKENS = 256
# The number of tokens of a text without a prompt that the model is given to continue.
_OPENING_TOKENS = 32
_ROWS_LOOKED_AT = 50


@dataclass(frozen=True)
class GeneratedSample:
    """A prompt of the data, with its continuation in the data and those by the model.

    Attributes:
        prompt_ids: the ids that the model was given.
        prompt: the prompt as text, special tokens shown.
        expected: the continuation in the data, with at most as many tokens as are generated.
        before: the text by the model before training.
        after: the text by the model after training; None until training is done.
    """

    prompt_ids: tuple[int, ...]
    prompt: str
    expected: str
    before: str
    after: str | None = None

    def rows(self) -> tuple[tuple[str, str], ...]:
        """Return the texts for people, each with its title."""
        after = "not generated" if self.after is None else self.after.strip()
        return (*self.rows_before(), ("after", after))

    def rows_before(self) -> tuple[tuple[str, str], ...]:
        """Return the texts from before training, each with its title."""
        return (
            ("prompt", self.prompt.strip()),
            ("in the data", self.expected.strip()),
            ("before", self.before.strip()),
        )


@dataclass(frozen=True)
class _Prompt:
    """The tokens of a row, divided into the prompt and the tokens that follow it."""

    ids: tuple[int, ...]
    following: tuple[int, ...]


@dataclass
class SampleAccount:
    """Writes the samples of a run before and after training, and keeps them in the run's folder.

    Generation is greedy, so that before and after differ by the training alone. The run does not
    depend on the samples: the random states stay as they were; and if generation fails, or would
    take long, the run goes on without samples, and a notice gives the reason.

    Attributes:
        output: the run's folder.
        base: the model, with the adapter that is trained on it.
        tokenizer: the model's tokenizer.
        announce: receives a notice if there are no samples.
        continues: continues prompts in place of `generate`, with the same arguments.
    """

    output: Path
    base: Base
    tokenizer: Any
    announce: Announce
    continues: Callable[..., Iterator[str]] | None = None
    samples: tuple[GeneratedSample, ...] = field(default=(), init=False)
    _asked_for: int = field(default=0, init=False)
    _new_tokens: int = field(default=MOST_NEW_TOKENS, init=False)
    _tokens_at_once: int = field(default=0, init=False)

    def begin(self, count: int, rows: TokenRows, tokens_at_once: int) -> None:
        """Choose prompts and continue them, unless the run did so when it first started.

        Args:
            count: number of samples; 0 for none.
            rows: token rows to take the prompts from.
            tokens_at_once: number of tokens, in prompts and answers, that fit in memory together.
        """
        self._asked_for, self._tokens_at_once = count, tokens_at_once
        if not count or self._take_up():
            return
        positions = self._positions()
        self._new_tokens = min(MOST_NEW_TOKENS, positions // 2)
        most_tokens = min(_MOST_PROMPT_TOKENS, positions - self._new_tokens)
        prompts = choose_prompts(rows, count, most_tokens)
        if not prompts:
            self.announce(Notice("no samples: no prompt of the data is short enough"))
            return
        asked = [prompt.ids for prompt in prompts]
        before = self._written(asked, is_timed=True)
        if before is None:
            return
        self.samples = tuple(
            GeneratedSample(
                prompt_ids=prompt.ids,
                prompt=self.tokenizer.decode(prompt.ids),
                expected=self._text(prompt.following[: self._new_tokens]),
                before=text,
            )
            for prompt, text in zip(prompts, before, strict=True)
        )
        self._save()

    def close(self) -> tuple[GeneratedSample, ...]:
        """Continue the same prompts with the trained adapter, and return the samples."""
        if not self.samples:
            return ()
        after = self._written([sample.prompt_ids for sample in self.samples])
        if after is not None:
            pairs = zip(self.samples, after, strict=True)
            self.samples = tuple(replace(sample, after=text) for sample, text in pairs)
            self._save()
        return self.samples

    # ------------------------------------------------------------ writing text

    def _written(
        self, prompts: Sequence[Sequence[int]], is_timed: bool = False
    ) -> list[str] | None:
        """Return the continuations of prompts; None if that fails, or would take long."""
        device = self.base.hardware.device
        on_gpu = [device] if device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=on_gpu):
                if is_timed and not self._is_soon_done(prompts):
                    return None
                return list(self._continue(prompts, self._new_tokens))
        except Exception as error:
            if self.base.shards is not None:
                raise  # the other processes wait in the midst of a forward
            # A run of hours must not end for a few lines of text, whatever the error is.
            self.announce(Notice(f"no samples: generating them failed ({type(error).__name__})"))
        # Here the error is gone, and so are the tensors that its frames held.
        release_memory(device)
        return None

    def _is_soon_done(self, prompts: Sequence[Sequence[int]]) -> bool:
        """Limit the new tokens to those that time allows; return whether these are enough."""
        longest = max(prompts, key=len)
        seconds = min(self._seconds_of_a_token(longest) for _ in range(2))
        batches = math.ceil(len(prompts) / self._batch_size(prompts))
        fitting = int(_MOST_SECONDS / max(seconds * batches, 1e-9))
        self._new_tokens = min(self._new_tokens, fitting)
        if self._new_tokens < _LEAST_NEW_TOKENS:
            self.announce(Notice(f"no samples: here a token takes {seconds:.1f} s to generate"))
            return False
        return True

    def _seconds_of_a_token(self, prompt: Sequence[int]) -> float:
        start = time.perf_counter()
        list(self._continue([prompt], 1))
        return time.perf_counter() - start

    def _continue(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Iterator[str]:
        sampling = Sampling(max_new_tokens=new_tokens, temperature=0.0)
        continues, batch = self.continues or generate, self._batch_size(prompts)
        return continues(self.base, self.tokenizer, prompts, sampling, batch)

    def _batch_size(self, prompts: Sequence[Sequence[int]]) -> int:
        return max(1, self._tokens_at_once // (max(map(len, prompts)) + self._new_tokens))

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _positions(self) -> int:
        config: Any = self.base.model.config
        named = getattr(config.get_text_config(), "max_position_embeddings", None)
        return int(named or _MOST_PROMPT_TOKENS + MOST_NEW_TOKENS)

    # ------------------------------------------------------------ the file

    def _save(self) -> None:
        content = {
            "asked_for": self._asked_for,
            "max_new_tokens": self._new_tokens,
            "samples": [asdict(sample) for sample in self.samples],
        }
        write_json(self.output / NAME, redacted_values(content))

    def _take_up(self) -> bool:
        """Take the samples of the run's first start; return whether they are those asked for."""
        if not (self.output / NAME).is_file():
            return False
        try:
            stored = read_json(self.output / NAME)
            samples = tuple(_stored(item, len(self.tokenizer)) for item in stored["samples"])
            is_wanted = bool(samples) and stored["asked_for"] == self._asked_for
            new_tokens = min(MOST_NEW_TOKENS, max(1, int(stored["max_new_tokens"])))
        except (DataError, StorageError, ValueError, OverflowError, KeyError, TypeError):
            return False
        if is_wanted:
            self.samples, self._new_tokens = samples, new_tokens
        return is_wanted


def _stored(item: Mapping[str, Any], vocabulary: int) -> GeneratedSample:
    ids = tuple(item["prompt_ids"])
    # On a GPU, an id without an embedding would end the whole process.
    if not all(isinstance(each, int) and 0 <= each < vocabulary for each in ids):
        raise ValueError("not token ids")
    texts = {name: str(item[name]) for name in ("prompt", "expected", "before")}
    return GeneratedSample(ids[:_MOST_PROMPT_TOKENS], **texts)


# ---------------------------------------------------------------- prompts


def choose_prompts(rows: TokenRows, count: int, most_tokens: int) -> list[_Prompt]:
    """Return the prompts of some rows, spread evenly over them.

    Args:
        rows: token rows.
        count: number of prompts that are wanted; fewer are returned if rows are few, or if their
            prompts are long.
        most_tokens: the most tokens that a prompt may have.
    """
    looked_at = min(len(rows), max(count, _ROWS_LOOKED_AT))
    stride = max(1, looked_at // count)
    found: list[_Prompt] = []
    # Take the first row of each part of the data; if they are not enough, the second of each part.
    for number in (n for first in range(stride) for n in range(first, looked_at, stride)):
        if len(found) == count:
            break
        prompt = _prompt_of(rows[number * len(rows) // looked_at])
        if prompt.following and len(prompt.ids) <= most_tokens:
            found.append(prompt)
    return found


def _prompt_of(row: Mapping[str, Any]) -> _Prompt:
    """Divide a row where its first answer begins; plain text has none, and is divided early on."""
    ids, labels = row["input_ids"], row["labels"]
    start = next((i for i, label in enumerate(labels) if label != IGNORED), len(ids))
    # A BOS alone, before tokens that are all supervised, is no prompt.
    if start <= 1:
        start = min(_OPENING_TOKENS, len(ids) // 2)
    end = next((i for i in range(start, len(ids)) if labels[i] == IGNORED), len(ids))
    return _Prompt(tuple(ids[:start]), tuple(ids[start:end]))
