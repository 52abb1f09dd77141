"""Rows of new tokens: trained alone, saved as PEFT's, merged, resumed; and grown vocabularies."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from data_fixtures import make_tokenizer
from merging import plain, spec_of
from peft import LoraConfig, PeftModel, get_peft_model
from support import relative_error
from t5_models import save_t5, t5_spec
from tiny_models import load_folder
from transformers import AutoModelForCausalLM

import qlora_kit as qk
from qlora_kit.errors import AdapterError, ConfigError
from qlora_kit.export.verify import verify_merge
from qlora_kit.lora.attach import count_trainable
from qlora_kit.lora.token_files import vocabulary_of
from qlora_kit.lora.whole import TokenRows
from qlora_kit.model.load import Placement
from qlora_kit.model.new_tokens import add_tokens, changed_by_decoding
from qlora_kit.tasks import CAUSAL
from qlora_kit.train.loop import Saving

ROWS_OF_BASE = 96
# 90 is a spare row of the base, and 96 and 97 are rows that it gets.
SPARE, GROWN = (90, 91), (90, 96, 97)
CASES = [(tied, ids) for tied in (False, True) for ids in (SPARE, GROWN)]


def a_base(folder: Path, ids: tuple[int, ...], bits: int = 16, **how: Any) -> qk.Base:
    """Load a base with rows for these tokens."""
    needed = max(ids) + 1 if max(ids) >= ROWS_OF_BASE else None
    spec = replace(spec_of(folder, bits), vocabulary=needed)
    return qk.load_base(spec, qk.choose_hardware("cpu"), **how)


def a_spec(base: qk.Base, ids: tuple[int, ...], **others: Any) -> qk.LoraSpec:
    rows = TokenRows.of(base.spec.skeleton(), ids, frozenset(ids[1:]), known=80)
    return qk.LoraSpec(rank=4, targets=("attention",), token_rows=rows, **others)


def data(ids: tuple[int, ...], count: int = 6) -> list[dict[str, Any]]:
    """Return rows in which each of the new tokens stands, and is supervised."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for row in range(count):
        own = torch.randint(3, 90, (12,), generator=generator)
        own[3 : 3 + len(ids)] = torch.tensor(ids)
        rows.append({"input_ids": own.tolist(), "labels": own.tolist(), "row": row})
    return rows


def inputs(ids: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([row["input_ids"] for row in data(ids, 2)])


def options(**changes: Any) -> qk.TrainConfig:
    values = {"batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 1e-2,
              "weight_decay": 0.1, **changes}  # fmt: skip
    return qk.TrainConfig(**values)


@torch.no_grad()
def logits(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    return model(input_ids=inputs(ids)).logits  # type: ignore[no-any-return]


def in_peft(folder: Path, adapter: Path, ids: tuple[int, ...], **how: Any) -> Any:
    """Open an adapter in PEFT, with the base resized as PEFT demands."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if max(ids) >= ROWS_OF_BASE:
        model.resize_token_embeddings(max(ids) + 1)
    return PeftModel.from_pretrained(model, adapter, **how)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize(("tied", "ids"), CASES)
def test_rows_start_as_said_and_nothing_else_changes(
    save_tiny: Callable[..., Path], tied: bool, ids: tuple[int, ...]
) -> None:
    base = a_base(save_tiny("tinyllama", tie_word_embeddings=tied), ids, bits=4)
    table: torch.Tensor = base.model.get_input_embeddings().weight.detach().clone()
    head = base.model.lm_head.weight.dequantize(torch.float32).clone()
    adapter = qk.attach(base, a_spec(base, ids))
    own = adapter.whole["model.embed_tokens"].rows.detach().clone()  # type: ignore[attr-defined]
    assert torch.equal(own[0], table[90]), "a token that the tokenizer had starts as it was"
    assert torch.allclose(own[1:], table[:80].mean(0).expand(len(ids) - 1, -1), atol=1e-6)
    assert adapter.trainable == count_trainable(base.spec.skeleton(), adapter.spec)
    assert len(adapter.whole_parameters()) == (1 if tied else 2)
    qk.train_adapter(adapter, data(ids), options(max_steps=3))
    moved = adapter.whole["model.embed_tokens"].rows - own  # type: ignore[attr-defined]
    assert (moved.abs().amax(1) > 1e-3).all(), "every row was trained"
    qk.merge(adapter)
    others = [row for row in range(len(table)) if row not in ids]
    now = base.model.get_input_embeddings().weight, base.model.lm_head.weight
    for merged, frozen in ((now[0], table), (now[1].dequantize(torch.float32), head)):
        assert torch.equal(merged[others], frozen[others]), "bit by bit"
        assert not torch.equal(merged[[*ids]], frozen[[*ids]])


@pytest.mark.parametrize(("tied", "ids"), CASES)
def test_forward_gradients_file_and_merge_are_those_of_peft(
    save_tiny: Callable[..., Path], tmp_path: Path, tied: bool, ids: tuple[int, ...]
) -> None:
    folder = save_tiny("tinyllama", tie_word_embeddings=tied)
    base = a_base(folder, ids)
    before = logits(base.model, ids)
    adapter = qk.attach(base, a_spec(base, ids))
    qk.train_adapter(adapter, data(ids), options(max_steps=2))
    (tmp_path / "adapter").mkdir()
    qk.save_adapter(adapter, tmp_path / "adapter", qk.BaseRecord.of(base))
    trained = logits(base.model, ids)

    theirs = in_peft(folder, tmp_path / "adapter", ids, is_trainable=True)
    assert relative_error(logits(theirs.eval(), ids), trained) <= 1e-5
    found = inputs(ids)
    predicted = theirs(input_ids=found).logits[:, :-1].flatten(0, 1)
    F.cross_entropy(predicted, found[:, 1:].flatten(), reduction="sum").backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for parameter in adapter.parameters().values():
        parameter.grad = None
    objective = CAUSAL.objective(base, 0, 5, None)
    objective.loss_sum(objective.batch(data(ids, 2))).backward()
    for path, layer in adapter.whole.items():
        for _, own in layer.named_parameters():
            name = f"base_model.model.{path}.token_adapter.trainable_tokens_delta.default"
            assert relative_error(own.grad, wanted[name]) <= 1e-4, name

    again = load_folder(folder)
    loaded = qk.load_adapter(again, tmp_path / "adapter")
    assert relative_error(logits(again.model, ids), trained) <= 1e-5
    stored = qk.read_adapter(tmp_path / "adapter")
    bare = spec_of(folder, 16)
    spec = replace(bare, vocabulary=vocabulary_of(stored, bare))
    qk.merge_to(
        tmp_path / "merged", stored, spec, make_tokenizer(), dtype=torch.float32,
        check=lambda merge, made: verify_merge(merge, made) and None,
    )  # fmt: skip
    merged = plain(tmp_path / "merged")
    assert merged.config.vocab_size == max(ROWS_OF_BASE, max(ids) + 1)
    assert bool(merged.config.tie_word_embeddings) == tied
    assert relative_error(logits(merged, ids), trained) <= 1e-5
    assert torch.equal(logits(qk.detach(adapter).model, ids), before)
    assert qk.detach(loaded).model.config.vocab_size == ROWS_OF_BASE


@pytest.mark.parametrize("head_bits", [8, 16])
def test_a_resumed_run_has_the_bits_of_the_unbroken_one(
    save_tiny: Callable[..., Path], tmp_path: Path, head_bits: Any
) -> None:
    folder = save_tiny("tinyllama", tie_word_embeddings=True)
    found = []
    for resumes in (False, True):
        placement = Placement(head_bits=head_bits)
        base = a_base(folder, GROWN, bits=4, placement=placement)
        adapter = qk.attach(base, a_spec(base, GROWN))
        (tmp_path / "second").mkdir(exist_ok=True)
        saving = Saving(tmp_path, qk.BaseRecord.of(base))
        if resumes:
            saving = Saving(tmp_path / "second", saving.record, tmp_path / "checkpoint-2")
        qk.train_adapter(adapter, data(GROWN), options(max_steps=4, save_steps=2), saving=saving)
        found.append({name: p.detach().clone() for name, p in adapter.parameters().items()})
    assert "model.embed_tokens.rows" in found[0]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_scaled_embedding_scales_trained_rows(save_tiny: Callable[..., Path]) -> None:
    base = a_base(save_tiny("gemma-2-9b"), SPARE)
    before = logits(base.model, SPARE)
    rows = TokenRows.of(base.spec.skeleton(), SPARE, frozenset(), 80)
    qk.attach(base, qk.LoraSpec(rank=4, targets=("attention",), token_rows=rows))
    assert relative_error(logits(base.model, SPARE), before) <= 1e-6


def test_a_generated_text_has_trained_tokens(save_tiny: Callable[..., Path]) -> None:
    base = a_base(save_tiny("tinyllama", tie_word_embeddings=True), GROWN)
    adapter = qk.attach(base, a_spec(base, GROWN))
    qk.train_adapter(adapter, data(GROWN), options(max_steps=60, learning_rate=2e-2))
    prompt = torch.tensor([data(GROWN, 1)[0]["input_ids"][:4]])
    out = base.model.eval().generate(prompt, max_new_tokens=2, do_sample=False)
    assert out[0, 4:].tolist() == [*GROWN[1:]]


# ---------------------------------------------------------------- files


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("grown", [False, True])
@pytest.mark.parametrize(
    "indices",
    [[90, 91], {"embed_tokens": [90, 91], "lm_head": [90, 91]},
     {"embed_tokens": [90, 91], "lm_head": [89]}],
)  # fmt: skip
def test_every_form_that_peft_writes_is_read(
    save_tiny: Callable[..., Path], tmp_path: Path, tied: bool, grown: bool, indices: Any
) -> None:
    folder = save_tiny("tinyllama", tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if grown:
        model.resize_token_embeddings(100)
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=indices)
    theirs = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name or "tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = logits(theirs, SPARE)
    base = load_folder(folder)
    qk.load_adapter(base, tmp_path / "theirs")
    assert relative_error(logits(base.model, SPARE), expected) <= 1e-5
    stored, bare = qk.read_adapter(tmp_path / "theirs"), spec_of(folder, 16)
    spec = replace(bare, vocabulary=vocabulary_of(stored, bare))
    assert spec.vocabulary == (100 if grown else None)
    qk.merge_to(
        tmp_path / "merged", stored, spec, make_tokenizer(), dtype=torch.float32,
        check=lambda merge, made: verify_merge(merge, made) and None,
    )  # fmt: skip
    assert relative_error(logits(plain(tmp_path / "merged"), SPARE), expected) <= 1e-5


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("rows", [80, 100])
@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_that_was_resized_before_training_is_loaded(
    save_tiny: Callable[..., Path], tmp_path: Path, tied: bool, rows: int
) -> None:
    folder = save_tiny("tinyllama", tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(rows)
    theirs = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        base = load_folder(folder)
        before = base.model(input_ids=ids).logits
        adapter = qk.load_adapter(base, tmp_path / "theirs")
        assert relative_error(base.model(input_ids=ids).logits, expected) <= 1e-5
        assert torch.equal(qk.detach(adapter).model(input_ids=ids).logits, before)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"trainable_token_indices": [90]}, "a row for each"),
        ({"trainable_token_indices": [90, 90]}, "a row for each"),
        ({"trainable_token_indices": None}, "a row for each"),
        ({"trainable_token_indices": [-1, 2]}, "greater than or equal to 0"),
    ],
)
def test_files_that_do_not_go_together_are_refused(
    save_tiny: Callable[..., Path], tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    base = a_base(save_tiny("tinyllama"), SPARE)
    qk.save_adapter(qk.attach(base, a_spec(base, SPARE)), tmp_path, qk.BaseRecord.of(base))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(AdapterError, match=says):
        qk.read_adapter(tmp_path)


def test_a_number_in_a_file_takes_no_memory(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = a_base(save_tiny("tinyllama"), SPARE)
    qk.save_adapter(qk.attach(base, a_spec(base, SPARE)), tmp_path, qk.BaseRecord.of(base))
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "trainable_token_indices": [90, 2_000_000_000]}))
    with pytest.raises(AdapterError, match=r"row 2000000000 of .* is beyond the 96 rows"):
        qk.load_adapter(load_folder(save_tiny("tinyllama")), tmp_path)


def test_several_adapters_do_not_share_trained_rows(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save_tiny("tinyllama")
    base = a_base(folder, SPARE)
    qk.save_adapter(qk.attach(base, a_spec(base, SPARE)), tmp_path, qk.BaseRecord.of(base))
    with pytest.raises(AdapterError, match=r"has rows of tokens of its own .*; use it by itself"):
        qk.load_adapters(load_folder(folder), {"a": tmp_path})


# ---------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("kind", ["bytes", "spaces"])
def test_tokens_are_added_once_and_found_in_the_middle_of_a_text(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    before = len(tokenizer)
    tokens = add_tokens(tokenizer, ["<think>", "<|im_end|>"], "a model")
    assert tokens.added == ("<think>",), "the tokenizer has the other one"
    assert tokens.ids[0] == before == tokens.known
    assert tokens.fresh == {before}
    again = add_tokens(tokenizer, ["<think>"], "a model")
    assert (again.ids, again.added) == (tokens.ids[:1], ())
    text = "one<think>two"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(before) == 1
    back = tokenizer.decode(ids).lstrip()
    assert back == (text if kind == "bytes" else "one<think> two")
    assert [*changed_by_decoding(tokenizer, tokens)] == (
        [] if kind == "bytes" else [("one <think> two", "one <think>  two")]
    )


def test_spare_rows_are_used_before_tables_grow() -> None:
    tokens = add_tokens(make_tokenizer(), ["<a>", "<b>"], "a model")
    assert tokens.rows_needed(tokens.known + 2) is None
    assert tokens.rows_needed(tokens.known + 1) == tokens.known + 2
    assert "spare rows" in next(tokens.describe(1000))
    assert f"grow from {tokens.known}" in next(tokens.describe(tokens.known))


# ---------------------------------------------------------------- refusals


def test_models_without_one_embedding_and_head_are_refused(
    tmp_path: Path,
) -> None:
    skeleton = t5_spec(save_t5(tmp_path / "t5")).skeleton()
    with pytest.raises(ConfigError, match="t5 has no single embedding and head of tokens"):
        TokenRows.of(skeleton, (1,), frozenset(), 1)
