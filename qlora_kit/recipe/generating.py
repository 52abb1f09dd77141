"""Lets a model answer prompts, with or without adapters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qlora_kit.config import GenerateConfig
from qlora_kit.data.fields import RowAdapters
from qlora_kit.data.samples import PromptRecord, read_prompts
from qlora_kit.data.shapes import Message
from qlora_kit.errors import ConfigError, DataError
from qlora_kit.events import Announce, Answered, silent
from qlora_kit.lora.files import read_base_record
from qlora_kit.model.environment import prepare_environment
from qlora_kit.opening.adapters import adapter_of, as_trained, check_base, put_by_row_on
from qlora_kit.opening.model import open_tokenizer
from qlora_kit.opening.tasks import check_generates, check_one_adapter
from qlora_kit.recipe.labelling import as_shown, labelled


def generate(config: GenerateConfig, announce: Announce = silent) -> dict[str, Any]:
    """Answer prompts, or continue them if the model has no chat template.

    Returns:
        The prompts with the new texts, for programs.
    """
    prepare_environment()
    config = as_trained(config)
    check_base(config.model, adapter_of(config))
    asked = _asked_prompts(config)

    from qlora_kit.infer.generate import Sampling
    from qlora_kit.infer.generate import generate as continue_prompts
    from qlora_kit.model.threads import choose_threads

    first = adapter_of(config)
    opened = open_tokenizer(config, announce, first, config.chat_template)
    if first is None:
        opened.check_head()
    if opened.task.classes is not None:
        return labelled(config, opened, asked, announce)
    check_generates(opened.task, "generate")
    check_one_adapter(opened.task, config.adapters)
    record = None if first is None else read_base_record(first)
    # An adapter whose record has no template was trained on texts as they are.
    on_texts = record is not None and not record.template_hash and config.chat_template is None
    raw = config.raw or not opened.has_template or on_texts
    if opened.task.has_sources:
        prompts = [prompt.content for prompt in asked]
    else:
        prompts = [_as_turns(prompt, raw) for prompt in asked]
    asks = opened.task.asks(opened.tokenizer, None)
    ids = [asks.ids(text, each.place) for text, each in zip(prompts, asked, strict=True)]
    base = opened.load(config, announce, choose_threads(config.threads))
    per_row = put_by_row_on(base, config, [prompt.adapter for prompt in asked], announce)
    answers = continue_prompts(
        base,
        opened.tokenizer,
        ids,
        Sampling(config.max_new_tokens, config.temperature, config.top_p, config.seed),
        per_row=per_row,
    )
    given = []
    for prompt, answer in zip(asked, answers, strict=True):
        given.append((prompt, answer))
        announce(Answered(as_shown(config, prompt, answer.strip())))
    if config.prompts is not None:
        rows = [{"place": p.place, "adapter": p.adapter, "text": text} for p, text in given]
        return {"prompts": str(config.prompts), "answers": rows}
    if config.adapters:
        return {"prompt": config.prompt, "texts": {p.adapter: text for p, text in given}}
    return {"prompt": config.prompt, "text": given[0][1]}


def _asked_prompts(config: GenerateConfig) -> list[PromptRecord]:
    """Return the prompts to continue; each once for every adapter if none of them names one."""
    if bool(config.prompt) is (config.prompts is not None):
        found = "both are given" if config.prompt else "missing"
        raise ConfigError(
            f'--prompt: {found}; give the text to continue, as --prompt "...", or a file of them, '
            "as --prompts FILE"
        )
    if config.prompts is None:
        prompts = [PromptRecord(config.prompt or "", "--prompt")]
    else:
        named = RowAdapters(config.adapter_field, tuple(config.adapters))
        prompts = read_prompts(config.prompts, named if config.adapters else None)
    if not config.adapters or any(prompt.adapter for prompt in prompts):
        return prompts
    return [replace(prompt, adapter=name) for prompt in prompts for name in config.adapters]


def _as_turns(prompt: PromptRecord, raw: bool) -> str | tuple[Message, ...]:
    """Return the turns that the chat template renders, or the text as it is."""
    if not isinstance(prompt.content, str):
        if raw:
            raise DataError(
                f"{prompt.place}: turns, and no chat template is used; expected a text; write the "
                "prompt as one, or pass --chat-template"
            )
        return prompt.content
    return prompt.content if raw else (Message("user", prompt.content),)
