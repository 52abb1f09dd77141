"""Turns samples into text, and says which characters of it are supervised.

Takes a tokenizer and samples; returns `Rendered`. Training and generation render their
prompts here and nowhere else. A template is a stranger's program: transformers renders it in
a sandbox that cannot change anything, and here it has limits of time and memory. Never
tokenises a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qlora_kit.data.probe import probe_template
from qlora_kit.data.shapes import Conversation, Message, Pair, Sample, Text
from qlora_kit.errors import DataError, ModelError
from qlora_kit.time_limit import TimeUp, time_limit

# For models without a chat template. Set on the tokenizer, so that generation and whoever
# loads the adapter use the same one.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}"
    "{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '### Response:\n' + message['content'] + eos_token }}"
    "{% if not loop.last %}{{ '\n\n' }}{% endif %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)

# Without and with a BOS token.
_OWN_TEMPLATES = (DEFAULT_TEMPLATE, "{{ bos_token }}" + DEFAULT_TEMPLATE)

SECONDS_A_RENDERING = 10.0

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of one sample."""

    text: str
    spans: tuple[Span, ...]
    """half-open character ranges that are supervised, in order, not overlapping"""
    answers: tuple[int, ...]
    """characters where an answer begins; the text before each is a generation prompt"""
    append_eos: bool
    """whether the end token follows the text, as a token and supervised"""


def wants_bos(tokenizer: Any) -> bool:
    """Return whether every sample of this tokenizer begins with its BOS token, exactly once.

    True where a BOS token exists and one of these holds: it is not the end token at the same
    time; the tokenizer's own encoding puts it first; the chat template starts with it.
    So Llama, Mistral, Gemma and DeepSeek have it; Qwen (no BOS) and GPT-2 (BOS = EOS) do not.
    """
    if not tokenizer.bos_token or tokenizer.bos_token_id is None:
        return False
    if tokenizer.bos_token_id != tokenizer.eos_token_id:
        return True
    if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return True
    try:
        text = _apply(tokenizer, [Message("user", "a")], "a short conversation")
    except DataError:
        return False
    return text.startswith(tokenizer.bos_token)


class Renderer:
    """Renders samples with the tokenizer's chat template.

    A tokenizer without one is given `DEFAULT_TEMPLATE`.

    Args:
        tokenizer: transformers' tokenizer; its `chat_template` is set where it has none.
        train_on: what is supervised: the answers, or everything but the BOS token.

    Raises:
        ModelError: the template takes too long or too much memory, see `probe_template`.
    """

    def __init__(
        self, tokenizer: Any, train_on: Literal["completion", "all"] = "completion"
    ) -> None:
        if not tokenizer.chat_template:
            tokenizer.chat_template = _OWN_TEMPLATES[wants_bos(tokenizer)]
        elif tokenizer.chat_template not in _OWN_TEMPLATES:
            probe_template(tokenizer)
        self.tokenizer = tokenizer
        self.train_on = train_on
        self._eos = str(tokenizer.eos_token)
        self._end_tokens = _end_tokens(tokenizer)

    def render(self, sample: Sample) -> Rendered:
        """Render one sample.

        A conversation goes through the template; pairs and texts are used as they are.

        Raises:
            DataError: the template refuses the turns, or, where only answers are supervised,
                does not render them so that each prompt is a prefix of the whole.
            ModelError: it takes longer than `SECONDS_A_RENDERING`.
        """
        if isinstance(sample, Conversation):
            return self._render_chat(sample)
        if isinstance(sample, Pair):
            start = len(sample.prompt)
            text = sample.prompt + sample.completion
            first = 0 if self.train_on == "all" else start
            return Rendered(text, ((first, len(text)),), (start,), append_eos=True)
        assert isinstance(sample, Text)
        return Rendered(sample.text, ((0, len(sample.text)),), (), append_eos=True)

    def prompt_text(self, prompt: str | Sequence[Message], place: str = "the prompt") -> str:
        """Return the text that generation continues.

        Args:
            prompt: raw text, returned as it is, or turns for the template.
            place: where the prompt stands, for errors.

        Raises:
            DataError: the template refuses the turns.
        """
        if isinstance(prompt, str):
            return prompt
        return _apply(self.tokenizer, prompt, place, generation=True)

    def _render_chat(self, sample: Conversation) -> Rendered:
        text = _apply(self.tokenizer, sample.messages, sample.place)
        ended = text.rstrip().endswith(self._end_tokens)
        if self.train_on == "all":
            return Rendered(text, ((0, len(text)),), (), append_eos=not ended)
        spans = self._answer_spans(sample, text)
        if not ended:
            # The EOS is learnt as what follows the text, so the white space before it is too.
            spans[-1] = (spans[-1][0], len(text))
        return Rendered(text, tuple(spans), tuple(start for start, _ in spans), not ended)

    def _answer_spans(self, sample: Conversation, text: str) -> list[Span]:
        """Find each answer by rendering the turns up to it."""
        messages, last = sample.messages, len(sample.messages) - 1
        spans = []
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt = self.prompt_text(messages[:index], sample.place)
            turn = text if index == last else self._up_to(messages[: index + 1], sample, text)
            if not turn.startswith(prompt):
                raise DataError(
                    f"{sample.place}: the chat template does not open turn {index + 1} with its "
                    "generation prompt; expected the prompt to be a prefix of the answer's "
                    "text; use --train-on all or another template"
                )
            spans.append((len(prompt), self._end_of_turn(turn, text)))
        return spans

    def _up_to(self, messages: Sequence[Message], sample: Conversation, text: str) -> str:
        turn = _apply(self.tokenizer, messages, sample.place)
        if not text.startswith(turn):
            # Some templates end the last message, and only that, with an EOS of its own.
            turn = turn.removesuffix(self._eos)
        if not text.startswith(turn):
            raise DataError(
                f"{sample.place}: the chat template rewrites earlier turns; expected each turn "
                "to extend the text before it; use --train-on all or another template"
            )
        return turn

    def _end_of_turn(self, turn: str, text: str) -> int:
        end = len(turn.rstrip())
        if not turn[:end].endswith(self._end_tokens) and text.startswith(self._eos, len(turn)):
            # Templates that close a turn only when the next one opens.
            end = len(turn) + len(self._eos)
        return end


def _apply(
    tokenizer: Any, messages: Sequence[Message], place: str, generation: bool = False
) -> str:
    """Render turns with the tokenizer's template, within the limit of time."""
    turns = [{"role": turn.role, "content": turn.content} for turn in messages]
    try:
        with time_limit(SECONDS_A_RENDERING):
            text: str = tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=generation
            )
    except (TimeUp, MemoryError) as error:
        found = "takes too long" if isinstance(error, TimeUp) else "needs too much memory"
        # Not a fault of one row, to be collected with others: each would take as long again.
        raise ModelError(
            f"{place}: the chat template {found} for these turns; expected at most "
            f"{SECONDS_A_RENDERING:.0f} s; shorten the row or use another template"
        ) from error
    except Exception as error:
        # A template may raise anything, and so may what it calls.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise DataError(
            f"{place}: the chat template refuses these turns ({reason}); expected turns it "
            "can render; change them or use another template"
        ) from error
    return text


def _end_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Return the special tokens that may end an answer: the EOS, and those like <|im_end|>."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {str(token) for token in added if token.special} | {*tokenizer.all_special_tokens}
    return tuple(sorted((special - {tokenizer.bos_token} | {str(tokenizer.eos_token)}) - {""}))


def end_token_ids(tokenizer: Any, configured: int | Sequence[int] | None = None) -> list[int]:
    """Return the tokens that end an answer.

    They are the tokenizer's EOS, what the model's configuration names, and the special token
    that the chat template ends an answer with: the one that training supervises.

    Args:
        tokenizer: transformers' tokenizer.
        configured: `eos_token_id` of a configuration: one, several or none.
    """
    named = [configured] if isinstance(configured, int) else (configured or [])
    ends = {tokenizer.eos_token_id, *named}
    probe = [Message("user", "a"), Message("assistant", "a")]
    if tokenizer.chat_template:
        try:
            text = _apply(tokenizer, probe, "a short conversation").rstrip()
        except DataError:
            text = ""
        last = [token for token in _end_tokens(tokenizer) if text.endswith(token)]
        ends.update(tokenizer.convert_tokens_to_ids(token) for token in last)
    return sorted(ends)
