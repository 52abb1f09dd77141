"""Tokenizers and samples made on the spot for the tests of data/."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qlora_kit.data.samples import Samples
from qlora_kit.data.shapes import Conversation, Message, Pair, Sample, Shape, Text

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Treats reasoning as Qwen3's template does: it keeps the reasoning of answers to the last question,
# and of no other answer.
QWEN3 = (
    "{%- set last = namespace(question=0) -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set last.question = loop.index0 -%}"
    "{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'assistant' -%}"
    "{%- set parts = m.content.split('</think>') -%}"
    "{%- set thought = parts[0].split('<think>')[-1].strip('\n') if parts|length > 1 else '' -%}"
    "{%- set said = parts[-1].lstrip('\n') -%}"
    "{{- '<|im_start|>assistant\n' -}}"
    "{%- if loop.index0 > last.question and (loop.last or thought) -%}"
    "{{- '<think>\n' + thought + '\n</think>\n\n' -}}{%- endif -%}"
    "{{- said + '<|im_end|>\n' -}}"
    "{%- else -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
_CORPUS = [
    "Once upon a time there was a little girl named Lily. She loved to play outside.",
    "### Instruction:\nWhat is 12 + 30?\n\n### Response:\nIt is 42, of course.",
    "User: the the the  in in ing ing\n\nAssistant: 1234 5678\n\n    indented",
] * 4
_SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<eos>", "<bos>"]


@lru_cache
def _byte_level() -> str:
    """Train a byte-level BPE as GPT-2's: offsets trimmed, white space looked ahead."""
    tokenizer: Any = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(vocab_size=420, special_tokens=_SPECIAL, initial_alphabet=alphabet),
    )
    return str(tokenizer.to_str())


@lru_cache
def _space_marking() -> str:
    """Train a BPE as Llama 2's: a space is put before every text."""
    tokenizer: Any = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=_SPECIAL)
    tokenizer.train_from_iterator([text.replace(" ", "▁") for text in _CORPUS], trainer)
    return str(tokenizer.to_str())


def make_tokenizer(kind: str = "bytes", **names: Any) -> Any:
    """Make a tokenizer; `kind` is "bytes" or "spaces"; padding is the end token by default."""
    content = _byte_level() if kind == "bytes" else _space_marking()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", **names}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(content), **names)


def conversation(*turns: tuple[str, str], place: str = "data.jsonl:1") -> Conversation:
    return Conversation(tuple(Message(role, content) for role, content in turns), place)


def chat(question: str, answer: str) -> Conversation:
    return conversation(("user", question), ("assistant", answer))


def samples_of(*items: Sample) -> Samples:
    kinds = {Conversation: Shape.CHAT, Pair: Shape.PAIR, Text: Shape.TEXT}
    return Samples(items, kinds[type(items[0])], "data.jsonl")
