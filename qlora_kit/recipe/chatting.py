"""Holds a conversation with a model, with or without adapters, in a terminal or through a pipe."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.config import ChatConfig
from qlora_kit.errors import ConfigError, QloraKitError
from qlora_kit.events import Announce, AnswerEnded, AnswerPart, Notice, Told, silent
from qlora_kit.lora.files import read_base_record
from qlora_kit.model.environment import prepare_environment
from qlora_kit.opening.adapters import (
    adapter_of,
    as_trained,
    check_base,
    put_on,
    put_several_on,
)
from qlora_kit.opening.model import Opened, open_tokenizer
from qlora_kit.opening.tasks import check_generates
from qlora_kit.recipe.chat_commands import Quit, carried_out, records_of
from qlora_kit.recipe.typed import history_kept, is_typed, piped_texts, typed_texts
from qlora_kit.redact import redacted
from qlora_kit.signals import interrupts_to

if TYPE_CHECKING:
    from qlora_kit.infer.chat import Answer, Chat, Speakers, Voice
    from qlora_kit.lora.attach import Adapter
    from qlora_kit.model.load import Base


def chat(config: ChatConfig, announce: Announce = silent) -> dict[str, Any]:
    """Answer what is typed, or each line of standard input if nobody types.

    Returns:
        The conversation as records of data, for programs.
    """
    prepare_environment()
    named = next(iter(config.adapters), None)
    config = as_trained(_with_one_adapter(config))
    first = adapter_of(config)
    check_base(config.model, first)

    from qlora_kit.infer.chat import Chat
    from qlora_kit.infer.generate import Sampling
    from qlora_kit.infer.unpacked import keep_unpacked
    from qlora_kit.model.threads import choose_threads

    opened = open_tokenizer(config, announce, first, config.chat_template)
    check_generates(opened.task, "chat")
    if opened.task.has_sources:
        raise ConfigError(
            "chat: the model answers a source, and has no memory of turns; expected a decoder; "
            "ask it with `qlora-kit generate`"
        )
    voices = _voices(config, opened, named)
    base = opened.load(config, announce, choose_threads(config.threads))
    base, speakers = _speakers(base, config, voices, announce)
    keep_unpacked(base, announce)
    context = _context(config, opened)
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, config.seed)
    talk = Chat(base, speakers, sampling, context)
    if config.system:
        talk.set_system(config.system)
    if talk.is_raw:
        announce(
            Notice(
                "no chat template is used: each text is continued as it is, and those before it "
                "are not seen"
            )
        )
    if is_typed():
        _converse(talk, config, announce)
    else:
        for text in piped_texts():
            _answer(talk, text, announce, lambda: False)
    return {"adapter": talk.speaker, "records": records_of(talk)}


def _with_one_adapter(config: ChatConfig) -> ChatConfig:
    """Return a configuration of which one adapter, with a name or without, is `adapter`.

    An adapter that is alone may replace parts of the base; several share it.
    """
    if config.adapter is not None or len(config.adapters) != 1:
        return config
    (folder,) = config.adapters.values()
    fields = config.model_fields_set
    given = {name: getattr(config, name) for name in fields - {"adapters"}}
    return ChatConfig(**{**given, "adapter": folder})


def _context(config: ChatConfig, opened: Opened) -> int | None:
    """Return how many tokens the model sees at most; None for any number."""
    positions = opened.positions(config)
    if config.context is not None and positions is not None and config.context > positions:
        raise ConfigError(
            f"--context {config.context}: the model has {positions} positions; expected no more; "
            f"pass --context {positions}, or leave it out"
        )
    return config.context or positions


# ---------------------------------------------------------------- who answers


def _voices(config: ChatConfig, first: Opened, named: str | None) -> dict[str | None, Voice]:
    """Return how each adapter is spoken to, by name: through the template that it learnt with.

    Args:
        config: names the adapters.
        first: the model, opened for the first of them.
        named: the name of an adapter that is alone; None for that of its folder.
    """
    if config.adapter is not None:
        name = named or config.adapter.resolve().name
        return {name: _voice(config, config.adapter, first)}
    if not config.adapters:
        return {None: _voice(config, None, first)}
    return {
        name: _voice(config, folder, open_tokenizer(config, silent, folder, config.chat_template))
        for name, folder in config.adapters.items()
    }


def _voice(config: ChatConfig, adapter: Path | None, opened: Opened) -> Voice:
    from qlora_kit.infer.chat import Voice

    record = None if adapter is None else read_base_record(adapter)
    # An adapter whose record has no template was trained on texts as they are.
    on_texts = record is not None and not record.template_hash and config.chat_template is None
    raw = config.raw or not opened.has_template or on_texts
    return Voice(opened.tokenizer, opened.task.asks(opened.tokenizer, None), raw)


def _speakers(
    base: Base, config: ChatConfig, voices: Mapping[str | None, Voice], announce: Announce
) -> tuple[Base, Speakers]:
    """Put the adapters on a base; return it with them, and the choice among them."""
    from qlora_kit.infer.chat import Speakers

    if config.adapters:
        several = put_several_on(base, config, announce, own_templates=True)
        return base, Speakers(voices, several.set_adapter)
    adapter = put_on(base, config, announce)
    if adapter is None:
        return base, Speakers(voices, lambda name: None)
    return adapter.base, Speakers(voices, _OneAdapter(adapter))


class _OneAdapter:
    """Takes one adapter off its base and puts it back, without loading anything."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._off = contextlib.ExitStack()

    def __call__(self, name: str | None) -> None:
        """Let the adapter compute if it is named, and the base alone with None.

        Raises:
            ConfigError: the base without the adapter is not there.
        """
        self._off.close()
        if name is not None:
            return
        own = self._adapter
        if own.originals or own.start or own.stacks or own.resized_from is not None:
            raise ConfigError(
                "/adapter off: this adapter replaces parts of its base (modules_to_save, biases, "
                "tokens, experts or a start); expected LoRA alone; start another chat with --model"
            )
        self._off.enter_context(own.disabled())


# ---------------------------------------------------------------- a person


@dataclass
class _Interrupts:
    """What Ctrl-C does: while an answer comes, the first stops it, and a second drops it."""

    is_answering: bool = False
    is_asked: bool = False

    def __call__(self) -> None:
        if not self.is_answering or self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        self.is_answering, self.is_asked = True, False
        try:
            yield
        finally:
            self.is_answering = False


def _converse(talk: Chat, config: ChatConfig, announce: Announce) -> None:
    interrupts = _Interrupts()

    def tell(text: str) -> None:
        announce(Told(text))

    tell(f"{config.model}{_with(talk)}; /help lists commands, Ctrl-D ends")
    with history_kept(tell), interrupts_to(interrupts):
        for text in typed_texts(tell):
            try:
                if text.startswith("/") and not text.startswith("//"):
                    tell(carried_out(talk, text))
                    continue
                with interrupts.answering():
                    said = text[1:] if text.startswith("//") else text
                    _answer(talk, said, announce, lambda: interrupts.is_asked)
            except Quit:
                return
            except KeyboardInterrupt:
                tell("the answer is dropped")
            except QloraKitError as error:
                tell(f"error: {redacted(str(error))}")


def _with(talk: Chat) -> str:
    return f", adapter {talk.speaker}" if talk.speaker is not None else ""


def _answer(talk: Chat, text: str, announce: Announce, is_stopped: Callable[[], bool]) -> None:
    answer = talk.say(text, lambda piece: announce(AnswerPart(piece)), is_stopped)
    announce(_end_of(answer))
    if answer.cut:
        announce(
            Notice(f"the context is full: the {answer.cut // 2} oldest turn(s) are seen no more")
        )


def _end_of(answer: Answer) -> AnswerEnded:
    return AnswerEnded(
        answer.ended,
        answer.prompt_tokens,
        answer.kept_tokens,
        answer.new_tokens,
        answer.first_seconds,
        answer.seconds,
    )
