"""Tiny random encoder-decoders of every kind, and a tokenizer as T5's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

import qlora_kit as qk
from qlora_kit.model.encoder_decoder import SEQ2SEQ_LM
from qlora_kit.tasks.seq2seq import Seq2SeqObjective

SIZES: dict[str, Any] = {
    "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 4, "vocab_size": 96, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16, "pad_token_id": 0, "eos_token_id": 1,
    "decoder_start_token_id": 0, "dropout_rate": 0.0,
}  # fmt: skip
_GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
# The first T5 has a tied head whose input it scales; T5 v1.1 (and Flan-T5) and mT5 have gated MLPs
# and a head of their own.
KINDS: dict[str, dict[str, Any]] = {
    "t5": {"model_type": "t5", **SIZES},
    "t5-v1.1": {"model_type": "t5", **SIZES, **_GATED},
    "mt5": {"model_type": "mt5", **SIZES, **_GATED},
}
# Sources of unequal length, and targets that end with an EOS.
ROWS = [
    {"input_ids": [*source, 1, *target, 1],
     "labels": [-100] * (len(source) + 1) + [*target, 1], "row": row}
    for row, (source, target) in enumerate(
        [(range(3, 20), range(30, 36)), (range(40, 47), range(60, 71)), (range(70, 82), [5])]
    )
]  # fmt: skip


def save_t5(folder: Path, kind: str = "t5", **changes: Any) -> Path:
    """Save a random model; norms get other values than at their start."""
    torch.manual_seed(0)
    numbers = {**KINDS[kind], **changes}
    model: Any = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**numbers))
    if kind != "t5":
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.2)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def t5_spec(folder: Path, bits: int = 16) -> qk.BaseSpec:
    """Return the spec of a base in a model folder."""
    source = qk.find_model(str(folder))
    return qk.BaseSpec(source, folder, qk.Quantization(bits), loads=SEQ2SEQ_LM)


def t5_adapter(folder: Path, bits: int = 16, **options: Any) -> qk.Adapter:
    """Load a base and attach an adapter to all of its linear layers."""
    asked = {"rank": 4, "targets": ("all-linear",), **options}
    base = qk.load_base(t5_spec(folder, bits), qk.choose_hardware("cpu"))
    return qk.attach(base, qk.LoraSpec(task_type="SEQ_2_SEQ_LM", **asked), seed=1)


def objective_of(adapter: qk.Adapter) -> Seq2SeqObjective:
    """Return the objective of an adapter."""
    return Seq2SeqObjective(adapter.base, 0)


def t5_tokenizer(words: str) -> Any:
    """Return a tokenizer as T5's: unigrams that mark spaces, an EOS behind every text.

    Args:
        words: words that are a token each; any other text is spelt in letters.
    """
    pieces = [f"▁{word}" for word in words.split()]
    letters = [*"▁abcdefghijklmnopqrstuvwxyz0123456789.:", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    scored = [(name, 0.0) for name in ("<pad>", "</s>", "<unk>")]
    scored += [(piece, -1.0) for piece in pieces] + [(letter, -9.0) for letter in letters]
    made: Any = tokenizers.Tokenizer(models.Unigram(scored, unk_id=2))
    made.normalizer = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    named = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **named)
