"""Measure a model, or let it answer; with adapters or without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from qlora_kit.config import (
    AdapterOption,
    EvaluateConfig,
    GenerateConfig,
)
from qlora_kit.data.fields import RowAdapters
from qlora_kit.data.samples import PromptRecord, Samples, load_samples, read_prompts
from qlora_kit.data.shapes import Message
from qlora_kit.errors import (
    ConfigError,
    DataError,
)
from qlora_kit.events import (
    Announce,
    Answered,
    Facts,
    Notice,
    silent,
)
from qlora_kit.lora.files import UNKNOWN_TEMPLATE, read_base_record
from qlora_kit.model.environment import prepare_environment
from qlora_kit.opening import adapter_of, as_trained, check_base, open_tokenizer, put_on

if TYPE_CHECKING:
    from qlora_kit.data.tokens import Tokenized
    from qlora_kit.infer.evaluate import Evaluation
    from qlora_kit.lora.several import AdapterSet
    from qlora_kit.model.load import Base


def evaluate(config: EvaluateConfig, announce: Announce = silent) -> dict[str, Any]:
    """Measure a model, with or without an adapter, on a data file."""
    prepare_environment()
    config = as_trained(config)
    check_base(config.model, adapter_of(config))
    named = RowAdapters(config.adapter_field, tuple(config.adapters)) if config.adapters else None
    samples = load_samples(config.data, "test", config, named)
    by_row = any(sample.adapter for sample in samples.items)
    samples = samples.first(config.max_rows)
    for text in samples.notices:
        announce(Notice(text))
    if config.data is None:
        announce(Notice(f"no --data: the {len(samples.items)} held-out rows of the sample data"))

    from qlora_kit.data.tokens import tokenize
    from qlora_kit.model.threads import choose_threads

    opened = open_tokenizer(config, announce, adapter_of(config), config.chat_template)
    rows = tokenize(samples, opened.tokenizer, config)
    announce(Notice(f"data: {rows.describe()}"))
    opened.check_positions(config, rows)
    base = opened.load(config, announce, choose_threads(config.threads))
    if config.adapters:
        measure = _evaluate_mixed if by_row else _evaluate_several
        return measure(config, base, rows, samples, opened.tokenizer, announce)
    put_on(base, config, announce)
    result = _measured(config, base, rows, samples, opened.tokenizer, announce)
    facts = [
        ("model", f"{config.model}, {base.quantization.describe()}"),
        ("adapter", str(config.adapter or "none")),
        ("rows", f"{result['rows']:,}, {result['supervised_tokens']:,} supervised tokens"),
        ("loss", f"{result['loss']:.4f} nats per token"),
        ("perplexity", f"{result['perplexity']:.3f}"),
        ("token accuracy", f"{result['token_accuracy']:.2%}"),
    ]
    if config.exact_match:
        count = len(samples.items)
        share = result["exact_match"]
        facts.append(("exact match", f"{round(share * count)} of {count} ({share:.1%})"))
    announce(Facts("evaluation", tuple(facts)))
    return result


def _measured(
    config: EvaluateConfig,
    base: Base,
    rows: Tokenized,
    samples: Samples,
    tokenizer: Any,
    announce: Announce,
) -> dict[str, Any]:
    """Measure a base with the adapter that is on it, or chosen."""
    from qlora_kit.infer.evaluate import evaluate as measure
    from qlora_kit.infer.exact_match import exact_answers

    measured = measure(
        base,
        rows.rows,
        batch_size=config.batch_size,
        pad_token_id=tokenizer.pad_token_id,
        chunk_tokens=config.loss_chunk_tokens,
        announce=announce,
    )
    result = _figures(measured)
    if config.exact_match:
        right = exact_answers(base, tokenizer, samples, config.max_new_tokens)
        result["exact_match"] = sum(right) / len(right)
    return result


def _evaluate_several(
    config: EvaluateConfig,
    base: Base,
    rows: Tokenized,
    samples: Samples,
    tokenizer: Any,
    announce: Announce,
) -> dict[str, Any]:
    """Measure all rows with one adapter after the other, on a base that is loaded once."""
    adapters = _load_several(config, base, announce)
    results = {}
    for name in adapters.names:
        adapters.set_adapter(name)
        results[name] = _measured(config, base, rows, samples, tokenizer, announce)
    facts = [
        ("model", f"{config.model}, {base.quantization.describe()}"),
        ("rows", f"{len(rows.rows):,}"),
        ("adapters", f"{len(results)}, {adapters.bytes / 1e6:.1f} MB beside the base"),
    ]
    facts += [(name, _in_short(result)) for name, result in results.items()]
    announce(Facts("evaluation", tuple(facts)))
    return {"adapters": results}


def _evaluate_mixed(
    config: EvaluateConfig,
    base: Base,
    rows: Tokenized,
    samples: Samples,
    tokenizer: Any,
    announce: Announce,
) -> dict[str, Any]:
    """Measure rows that name their adapter, batches mixed, each row with its own."""
    from qlora_kit.infer.evaluate import evaluate_mixed
    from qlora_kit.infer.exact_match import exact_answers
    from qlora_kit.lora.several import PerRow

    adapters = _load_several(config, base, announce)
    asked = [sample.adapter for sample in samples.items]
    measured = evaluate_mixed(
        base,
        rows.rows,
        PerRow(adapters, [asked[row] for row in rows.rows["row"]]),
        batch_size=config.batch_size,
        pad_token_id=tokenizer.pad_token_id,
        chunk_tokens=config.loss_chunk_tokens,
        announce=announce,
    )
    total = _figures(measured.total)
    by_name = {name: _figures(part) for name, part in measured.by_adapter.items()}
    if config.exact_match:
        per_row = PerRow(adapters, asked)
        right = exact_answers(base, tokenizer, samples, config.max_new_tokens, per_row)
        total["exact_match"] = sum(right) / len(right)
        for name, result in by_name.items():
            own = [each for each, asks in zip(right, asked, strict=True) if asks == name]
            result["exact_match"] = sum(own) / len(own)
    facts = [
        ("model", f"{config.model}, {base.quantization.describe()}"),
        ("adapters", f"{len(adapters.names)}, {adapters.bytes / 1e6:.1f} MB beside the base"),
        ("all rows", f"{total['rows']:,}: {_in_short(total)}"),
    ]
    for name in (*adapters.names, None):
        if name in by_name:
            own_rows = f"{by_name[name]['rows']:,}: {_in_short(by_name[name])}"
            facts.append((name or "the base alone", own_rows))
        elif name is not None:
            facts.append((name, "no row asks for it"))
    announce(Facts("evaluation, each row with its adapter", tuple(facts)))
    alone = by_name.pop(None, None)
    return {"total": total, "base": alone, "adapters": by_name}


def _figures(measured: Evaluation) -> dict[str, Any]:
    return {**asdict(measured), "perplexity": measured.perplexity}


def _in_short(result: Mapping[str, Any]) -> str:
    text = f"loss {result['loss']:.4f}  token accuracy {result['token_accuracy']:.2%}"
    if "exact_match" in result:
        text += f"  exact match {result['exact_match']:.1%}"
    return text


def generate(config: GenerateConfig, announce: Announce = silent) -> dict[str, Any]:
    """Continue prompts, or answer them where the model has a chat template."""
    prepare_environment()
    config = as_trained(config)
    check_base(config.model, adapter_of(config))
    asked = _asked_prompts(config)

    from qlora_kit.data.encode import prompt_ids
    from qlora_kit.data.template import Renderer
    from qlora_kit.infer.generate import Sampling
    from qlora_kit.infer.generate import generate as continue_prompts
    from qlora_kit.lora.several import PerRow
    from qlora_kit.model.threads import choose_threads

    first = adapter_of(config)
    opened = open_tokenizer(config, announce, first, config.chat_template)
    record = None if first is None else read_base_record(first)
    # An adapter without a template was trained on texts as they are.
    on_texts = record is not None and not record.template_hash and config.chat_template is None
    raw = config.raw or not opened.has_template or on_texts
    renderer = Renderer(opened.tokenizer)
    texts = [renderer.prompt_text(_as_turns(p, raw), p.place) for p in asked]
    base = opened.load(config, announce, choose_threads(config.threads))
    put_on(base, config, announce)
    per_row = None
    if config.adapters:
        adapters = _load_several(config, base, announce)
        per_row = PerRow(adapters, [prompt.adapter for prompt in asked])
    answers = continue_prompts(
        base,
        opened.tokenizer,
        [prompt_ids(opened.tokenizer, text) for text in texts],
        Sampling(config.max_new_tokens, config.temperature, config.top_p, config.seed),
        per_row=per_row,
    )
    given = []
    for prompt, answer in zip(asked, answers, strict=True):
        given.append((prompt, answer))
        announce(Answered(_answer_line(config, prompt, answer)))
    if config.prompts is not None:
        rows = [{"place": p.place, "adapter": p.adapter, "text": text} for p, text in given]
        return {"prompts": str(config.prompts), "answers": rows}
    if config.adapters:
        return {"prompt": config.prompt, "texts": {p.adapter: text for p, text in given}}
    return {"prompt": config.prompt, "text": given[0][1]}


def _load_several(config: AdapterOption, base: Base, announce: Announce) -> AdapterSet:
    """Put several adapters on a base; say which of them it does not hold as in their training."""
    from qlora_kit.lora.several import load_adapters

    adapters = load_adapters(base, config.adapters)
    records = {name: read_base_record(folder) for name, folder in config.adapters.items()}
    first = next(iter(records.values()))
    for name, record in records.items():
        if record is None:
            continue
        if record.bits != base.quantization.bits:
            announce(
                Notice(
                    f"adapter {name}: trained on {record.bits} bits and used on "
                    f"{base.quantization.bits}: expect other numbers"
                )
            )
        if first is None or UNKNOWN_TEMPLATE in (record.template_hash, first.template_hash):
            continue
        if record.template_hash != first.template_hash:
            announce(
                Notice(
                    f"adapter {name}: trained with another chat template than "
                    f"{next(iter(records))}, whose is used for all: expect other answers"
                )
            )
    return adapters


def _asked_prompts(config: GenerateConfig) -> list[PromptRecord]:
    """Return what is to be continued; once by each adapter where no prompt asks for one."""
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
    """Return what the chat template makes a text of, or the text as it is."""
    if not isinstance(prompt.content, str):
        if raw:
            raise DataError(
                f"{prompt.place}: turns, and no chat template is used; expected a text; write the "
                "prompt as one, or pass --chat-template"
            )
        return prompt.content
    return prompt.content if raw else (Message("user", prompt.content),)


def _answer_line(config: GenerateConfig, prompt: PromptRecord, answer: str) -> str:
    labels = [prompt.place] if config.prompts is not None else []
    labels += [prompt.adapter or "the base alone"] if config.adapters else []
    return f"{', '.join(labels)}: {answer.strip()}" if labels else answer.strip()
