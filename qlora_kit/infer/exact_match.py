"""Exact match: whether each answer, generated greedily, equals the expected answer.

Takes samples that have a question and an answer; returns a yes or no for each. White space around
an answer does not count. Keeps no text.
"""

from __future__ import annotations

from typing import Any

from qlora_kit.data.encode import prompt_ids
from qlora_kit.data.samples import Samples
from qlora_kit.data.shapes import Conversation, Pair, Sample
from qlora_kit.data.template import Renderer
from qlora_kit.errors import DataError
from qlora_kit.infer.generate import Sampling, generate
from qlora_kit.lora.several import PerRow
from qlora_kit.model.load import Base


def exact_answers(
    base: Base,
    tokenizer: Any,
    samples: Samples,
    max_new_tokens: int,
    per_row: PerRow | None = None,
) -> list[bool]:
    """Answer the last question of every sample; return whether each answer is exactly right.

    Args:
        base: the model, with the adapter it may carry.
        tokenizer: the model's tokenizer.
        samples: the questions and the expected answers.
        max_new_tokens: the most tokens of an answer.
        per_row: the adapter of each sample, if several adapters are on the base.

    Raises:
        DataError: a sample is plain text, which has no question.
    """
    renderer = Renderer(tokenizer)
    asked = [_question(sample, renderer) for sample in samples.items]
    prompts = [prompt_ids(tokenizer, prompt) for prompt, _ in asked]
    sampling = Sampling(max_new_tokens=max_new_tokens)
    answers = generate(base, tokenizer, prompts, sampling, per_row=per_row)
    return [
        answer.strip() == expected.strip()
        for answer, (_, expected) in zip(answers, asked, strict=True)
    ]


def _question(sample: Sample, renderer: Renderer) -> tuple[str, str]:
    """Return the prompt of a sample's last answer as text, and the expected answer."""
    if isinstance(sample, Pair):
        return sample.prompt, sample.completion
    if isinstance(sample, Conversation):
        prompt = renderer.prompt_text(sample.messages[:-1], sample.place, sample.tools)
        return prompt, sample.messages[-1].content
    raise DataError(f"{sample.place}: plain text has no answer to match; leave out --exact-match")
