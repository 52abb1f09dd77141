"""Requests that are answered together: each gets the answer that it would get alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import ADAPTERS, PROMPTS, Models, make_models
from tiny_models import load_folder

import qlora_kit as qk
from qlora_kit.data.template import end_token_ids
from qlora_kit.errors import ModelError
from qlora_kit.events import Event, LogLine
from qlora_kit.infer.generate import Sampling, configured_ends, generate
from qlora_kit.infer.serving import running
from qlora_kit.infer.serving.asked import Asked, Failed, Finished, Heard, Piece, QueueFull
from qlora_kit.infer.serving.choosing import Chooser, next_tokens
from qlora_kit.infer.serving.engine import Answer, Engine
from qlora_kit.model.tokenizer import load_tokenizer

NAMES = (None, *ADAPTERS)


class Ear:
    """Hears an answer."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.end: Finished | Failed | None = None
        self._ended = threading.Event()

    def __call__(self, heard: Heard) -> None:
        if isinstance(heard, Piece):
            self.pieces.append(heard.text)
        else:
            self.end = heard
            self._ended.set()

    def wait(self) -> str:
        assert self._ended.wait(60)
        return "".join(self.pieces)


class Loaded:
    """A base with its adapters, and engines on it."""

    def __init__(self, models: Models) -> None:
        self.base = load_folder(models.base, 16)
        self.adapters = qk.load_adapters(self.base, models.adapters)
        self.tokenizer: Any = load_tokenizer(models.base, writes=True, is_exact=True)
        self.ends = frozenset(end_token_ids(self.tokenizer, configured_ends(self.base)))

    def ids(self, prompt: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(prompt)["input_ids"])

    def asked(self, prompt: str, name: str | None = None, **more: Any) -> Asked:
        sampling = more.pop("sampling", Sampling(24, 0.0))
        return Asked(self.ids(prompt), sampling, self.tokenizer, name, self.ends, **more)

    def alone(self, prompt: str, name: str | None, sampling: Sampling) -> str:
        """Return the answer as transformers generates it."""
        self.adapters.set_adapter(name)
        return next(generate(self.base, self.tokenizer, [self.ids(prompt)], sampling))


@pytest.fixture(scope="module")
def loaded(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return Loaded(make_models(tmp_path_factory.mktemp("models"), stories))


@pytest.fixture
def engine_of(loaded: Loaded) -> Iterator[Callable[..., Engine]]:
    """Return a function that starts an engine; all are stopped after the test."""
    made: list[Engine] = []

    def start(**options: Any) -> Engine:
        made.append(Engine(loaded.base, loaded.adapters, **options))
        made[-1].start()
        return made[-1]

    yield start
    for each in made:
        each.stop()


def test_mixed_rows_that_join_and_leave_get_their_answers_alone(
    loaded: Loaded, engine_of: Callable[..., Engine]
) -> None:
    lengths = [7, 24, 40]
    wanted = [
        (prompt, name, Sampling(lengths[number % 3], 0.0))
        for number, prompt in enumerate(PROMPTS[:4])
        for name in NAMES
    ]
    expected = [loaded.alone(*each) for each in wanted]
    assert len(set(expected)) > 8, "the adapters answer otherwise than the base"
    said: list[Event] = []
    engine, ears = engine_of(max_batch=5, announce=said.append), [Ear() for _ in wanted]
    for (prompt, name, sampling), ear in zip(wanted, ears, strict=True):
        engine.submit(loaded.asked(prompt, name, sampling=sampling), ear)
    assert [ear.wait() for ear in ears] == expected
    lines = [event.text for event in said if isinstance(event, LogLine)]
    assert any("batch of 5 (base" in line and "lily" in line for line in lines), lines
    for (_, _, sampling), ear in zip(wanted, ears, strict=True):
        assert isinstance(ear.end, Finished)
        assert (ear.end.reason, ear.end.tokens) == ("length", sampling.max_new_tokens)


def test_a_sampled_answer_is_that_of_its_seed_whatever_is_beside_it(
    loaded: Loaded, engine_of: Callable[..., Engine]
) -> None:
    engine = engine_of()
    asked = [
        loaded.asked("The girl", "tom", sampling=Sampling(16, 0.9, 0.8, seed)) for seed in (1, 2, 1)
    ]
    alone = []
    for each in asked:
        ear = Ear()
        engine.submit(each, ear)
        alone.append(ear.wait())
    ears = [Ear() for _ in range(6)]
    for each, ear in zip([*asked, *asked], ears, strict=True):
        engine.submit(each, ear)
    assert [ear.wait() for ear in ears] == [*alone, *alone]
    assert alone[0] == alone[2] != alone[1]


@pytest.mark.parametrize("stop", ["Lily", "big, red b", "."])
def test_an_answer_ends_before_a_stop_text_and_never_shows_its_beginning(
    loaded: Loaded, engine_of: Callable[..., Engine], stop: str
) -> None:
    whole = loaded.alone("Once upon a time", None, Sampling(60, 0.0))
    engine, ear = engine_of(), Ear()
    engine.submit(
        loaded.asked("Once upon a time", sampling=Sampling(60, 0.0), stops=(stop, "\x00")), ear
    )
    assert stop in whole
    assert ear.wait() == whole.partition(stop)[0]
    assert isinstance(ear.end, Finished)
    assert ear.end.reason == "stop"


def test_an_end_token_ends_an_answer(loaded: Loaded, engine_of: Callable[..., Engine]) -> None:
    text = loaded.alone("The girl", None, Sampling(3, 0.0))
    first = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    engine, ear = engine_of(), Ear()
    asked = Asked(
        loaded.ids("The girl"), Sampling(20, 0.0), loaded.tokenizer, None, frozenset(first)
    )
    engine.submit(asked, ear)
    ear.wait()
    assert isinstance(ear.end, Finished)
    assert (ear.end.reason, ear.end.tokens) == ("stop", 1)
    assert ear.pieces == [], "an end token is no text"


def test_what_is_cancelled_or_late_makes_room(
    loaded: Loaded, engine_of: Callable[..., Engine]
) -> None:
    engine = engine_of(max_batch=1, queue=2)
    long, short = Sampling(10_000, 0.0), Sampling(2, 0.0)
    first, late, third = Ear(), Ear(), Ear()
    answer = engine.submit(loaded.asked("He ran", sampling=long), first)
    while not first.pieces:
        time.sleep(0.01)
    engine.submit(loaded.asked("He ran", sampling=short, seconds=0.05), late)
    engine.submit(loaded.asked("He ran", sampling=short), third)
    with pytest.raises(QueueFull) as full:
        engine.submit(loaded.asked("He ran"), Ear())
    assert 1 <= full.value.retry_seconds <= 60
    late.wait()
    assert isinstance(late.end, Failed)
    assert late.end.status == 504
    answer.cancel()
    assert third.wait()
    assert first.end is None, "nobody waits for it"
    assert engine.counts() == (0, 0)


def test_a_row_that_fails_takes_no_other_with_it(
    loaded: Loaded, engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = loaded.alone("The girl", "tom", Sampling(60, 0.0))
    engine, ear = engine_of(), Ear()
    engine.submit(loaded.asked("The girl", "tom", sampling=Sampling(60, 0.0)), ear)
    while len(ear.pieces) < 3:
        time.sleep(0.001)
    # A prompt that the model has no embedding for, behind the checks of the server.
    wrong = Asked((10**6,), Sampling(3, 0.0), loaded.tokenizer)
    fails = Ear()
    engine.submit(wrong, fails)
    fails.wait()
    assert isinstance(fails.end, Failed)
    assert fails.end.status == 500
    assert ear.wait() == expected


def test_where_memory_runs_out_the_last_row_gives_way_and_the_others_keep_their_answers(
    loaded: Loaded, engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = loaded.alone("The girl", "tom", Sampling(40, 0.0))
    real, failed = running.Batch.step, list[Any]()

    def step(batch: running.Batch) -> Any:
        if len(batch.rows) == 2 and not failed:
            failed.append(batch)
            # Half of the layers have the keys of this token already.
            layer = batch._cache.layers[0]
            layer.update(layer.keys[..., :1, :], layer.values[..., :1, :])
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(batch, "_model", _without_memory)
                return real(batch)
        return real(batch)

    monkeypatch.setattr(running.Batch, "step", step)
    engine, kept, given_up = engine_of(), Ear(), Ear()
    engine.submit(loaded.asked("The girl", "tom", sampling=Sampling(40, 0.0)), kept)
    engine.submit(loaded.asked("One day", "lily", sampling=Sampling(40, 0.0)), given_up)
    assert kept.wait() == expected
    given_up.wait()
    assert isinstance(given_up.end, Failed)
    assert given_up.end.status == 503


def _without_memory(**_: Any) -> Any:
    raise torch.OutOfMemoryError("no memory")


def test_stopping_ends_what_is_not_whole(loaded: Loaded, engine_of: Callable[..., Engine]) -> None:
    engine, ears = engine_of(max_batch=1), [Ear(), Ear()]
    for ear in ears:
        engine.submit(loaded.asked("He ran", sampling=Sampling(10_000, 0.0)), ear)
    engine.stop()
    for ear in ears:
        ear.wait()
        assert isinstance(ear.end, Failed)
        assert ear.end.status == 503
    assert not engine.is_alive
    with pytest.raises(QueueFull):
        engine.submit(loaded.asked("He ran"), Ear())


@pytest.mark.parametrize("name", ["mistral-7b", "gemma-2-9b", "qwen3-8b", "phi-4-mini", "gpt2"])
def test_rows_of_other_families_are_their_own(
    name: str, folder_of: Callable[[str], Path], loaded: Loaded
) -> None:
    """Sliding windows, soft caps, learnt positions: longer than the tiny window of 16."""
    base = load_folder(folder_of(name), 16)
    engine = Engine(base, max_batch=4)
    engine.start()
    generator = torch.Generator().manual_seed(0)
    prompts = [
        tuple(torch.randint(3, 90, (n,), generator=generator).tolist()) for n in (3, 20, 9, 1)
    ]
    sampling = Sampling(8, 0.0)
    answers = [_tokens_of(engine, ids, sampling) for ids in prompts]
    alone = [answers_of([answer]) for answer in answers]
    together = answers_of([_tokens_of(engine, ids, sampling, wait=False) for ids in prompts])
    engine.stop()
    assert together == [each for one in alone for each in one]
    with torch.no_grad(), base.in_evaluation():
        for ids, given in zip(prompts, together, strict=True):
            whole = torch.tensor([[*ids, *given[:-1]]])
            logits = base.model(input_ids=whole).logits[0, len(ids) - 1 :]
            assert logits.argmax(-1).tolist() == given


class _Ids:
    """A tokenizer that shows ids."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f"{each} " for each in ids)


def _tokens_of(
    engine: Engine, ids: tuple[int, ...], sampling: Sampling, wait: bool = True
) -> tuple[Answer, Ear]:
    ear = Ear()
    answer = engine.submit(Asked(ids, sampling, _Ids()), ear)
    if wait:
        ear.wait()
    return answer, ear


def answers_of(answers: list[tuple[Answer, Ear]]) -> list[list[int]]:
    return [[int(each) for each in ear.wait().split()] for _, ear in answers]


def test_a_model_of_which_rows_cannot_be_padded_is_refused(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Without(torch.nn.Module):
        config = loaded.base.model.config

        def forward(self, input_ids: Any) -> Any:
            raise AssertionError

    base = replace(loaded.base, model=Without())
    with pytest.raises(ModelError, match="takes no positions of tokens"):
        Engine(base).start()
    kinds = ["full_attention", "linear_attention"]
    monkeypatch.setattr(loaded.base.model.config, "layer_types", kinds, raising=False)
    with pytest.raises(ModelError, match="layers of linear attention"):
        Engine(loaded.base).start()


def test_the_share_of_the_probability_is_kept() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    chooser = Chooser(Sampling(1, 1.0, 0.7, 3))
    drawn = [chooser.sampled(logits) for _ in range(4000)]
    assert set(drawn) == {0, 1}, "0.5 alone does not reach 0.7"
    assert abs(drawn.count(0) / len(drawn) - 0.5 / 0.8) < 0.03
    cold = Chooser(Sampling(1, 1e-300, 1.0, 3))
    assert {cold.sampled(logits * 1e30) for _ in range(50)} == {0}


def test_what_is_no_number_is_no_token() -> None:
    logits = torch.zeros(3, 4)
    logits[0, 2], logits[1, 3], logits[2, 1] = 1.0, float("nan"), float("inf")
    greedy = Chooser(Sampling(1, 0.0))
    assert next_tokens(logits, [greedy] * 3) == [2, None, None]
